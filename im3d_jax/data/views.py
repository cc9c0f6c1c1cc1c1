"""Objects as directories of rendered views, from which data sets of turntables are built.

The directory of an object has a transforms.json, or what else `im3d fit` reads in its place, the pictures
that this names (RGBA, or with masks), and a caption. Of views that are split, those to train with are the
object's. The caption is in a caption.txt, or in a metadata.json with "caption", perhaps "elevation_deg", and
what `im3d dataset` knows of the object besides. An object's name is the path of its directory below the
directory of all objects.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from im3d_jax.data.turntables import Record, decode_views
from recon_torch import locks, outputs
from recon_torch.errors import UserError
from recon_torch.files import TEMPORARY, make_directory, write_json
from recon_torch.text_files import is_utf8, read_json, read_text
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import Views, load_views, read_frame, write_views
from recon_torch.views.frames import Frame
from recon_torch.views.images import straight, to_uint8
from recon_torch.views.masks import by_white, threshold_masks
from recon_torch.views.transforms import TRANSFORMS, is_source, parts_of, read_part

TOLERANCE_DEG = 0.5  # for azimuths, elevations and viewing directions
TOLERANCE_RADIUS = 0.01  # relative


class Unfit(Exception):
    """An object that is no turntable. The message says why, in one line."""


def write_object(
    directory: Path,
    rgba: Float[np.ndarray, "K H W 4"],
    cameras: Cameras,
    caption: str,
    elevation_rad: float,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes an object, whole or not at all.

    Args:
        rgba: in [0, 1], with colours that are not multiplied by alpha.
        elevation_rad: of all cameras.
        more: what else the metadata.json says of the object, as values that JSON has.

    Raises UserError if the directory is there and not empty.
    """
    make_directory(directory.parent)
    with outputs.owned(directory.parent) as staging:
        whole = staging / directory.name
        write_views(whole, cameras, rgba, "images")
        elevation_deg = float(np.rad2deg(elevation_rad))
        metadata = {"caption": caption, "elevation_deg": elevation_deg, **(more or {})}
        write_json(whole / "metadata.json", metadata)
        try:
            os.replace(whole, directory)
        except OSError as error:
            raise UserError(f"cannot write {directory} ({error.strerror}); choose another place") from error


def remove_unfinished(directory: Path) -> None:
    """Removes what processes left behind that died while they wrote an object beside this directory."""
    locks.clear(directory.parent, TEMPORARY)


def is_object(directory: Path) -> bool:
    """Whether an object was written to this directory."""
    return (directory / TRANSFORMS).is_file()


def find_objects(root: str | Path) -> list[Path]:
    """The directories of all objects below `root`, sorted.

    Raises UserError if there are none, or if one has a name that no table can hold.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no directory {root}; give one with a directory of views for each object")
    found = []
    for name, folders, _ in os.walk(root):
        directory = Path(name)
        folders[:] = [] if is_source(directory) else [each for each in folders if each[0] != "."]
        if is_source(directory):
            found.append(directory)
    if not found:
        raise UserError(f"no {TRANSFORMS} below {root}; render objects with `im3d dataset render`")
    for directory in found:
        if not is_utf8(str(directory.relative_to(root))):
            raise UserError(f"{directory} has a name that is not UTF-8; rename it")
    return sorted(found)


def read_object(directory: Path, name: str) -> Record:
    """Reads an object. Raises Unfit if something is missing or cannot be read, or if it is no turntable."""
    try:
        metadata = read_metadata(directory)
        if "caption" not in metadata:
            raise Unfit("it has no caption: write a caption.txt or a metadata.json")
        views = load_views(directory, by_white)
        if views.masks is None:
            raise Unfit(
                "its views have no alpha, and what is not white in them contradicts itself; give alpha"
            )
        elevation_rad = check_turntable(views.cameras)
        files = list(_png_files(directory, views))
        source = source_digest(directory, name)
    except UserError as error:
        raise Unfit(str(error)) from error
    stated_deg, found_deg = metadata.get("elevation_deg"), np.rad2deg(elevation_rad)
    if stated_deg is not None and abs(stated_deg - found_deg) > TOLERANCE_DEG:
        raise Unfit(f"metadata.json says elevation_deg {stated_deg:g}, its cameras stand at {found_deg:.1f}")
    mesh = str(metadata.get("mesh_sha256", ""))
    return Record(name, metadata["caption"], views.cameras, elevation_rad, files, source=source, mesh=mesh)


def read_pictures(directory: Path, count: int) -> Float[np.ndarray, "N H W 3"]:
    """Evenly spaced views of an object, composited on white, see `read_views`."""
    return read_views(directory, count)[0]


def read_views(
    directory: Path, count: int | None = None
) -> tuple[Float[np.ndarray, "N H W 3"], Float[np.ndarray, "N H W 1"]]:
    """Evenly spaced views of an object: (rgb over white, alpha), in [0, 1]. They may be empty.

    count: the number of views; None, or no fewer than there are, stands for all.

    Raises Unfit if they cannot be read.
    """
    try:
        frames, _ = read_part(parts_of(directory).train)
        count = min(count or len(frames), len(frames))
        chosen = [frames[at * len(frames) // count] for at in range(count)]
        width, height = chosen[0].width, chosen[0].height
        pictures = np.stack([read_frame(directory, frame, width, height).rgbm for frame in chosen])
    except UserError as error:
        raise Unfit(str(error)) from error
    rgb, alpha = pictures[..., :3], pictures[..., 3:]
    unmasked = np.isnan(alpha[:, 0, 0, 0])
    if unmasked.any():
        alpha[unmasked] = threshold_masks(rgb[unmasked])
    return rgb, alpha


def source_digest(directory: Path, name: str) -> str:
    """The SHA-256, in hex, of its name, caption, cameras and pictures, and of its mesh if that is known.

    Raises Unfit or UserError if one of these cannot be read.
    """
    metadata = read_metadata(directory)
    part = parts_of(directory).train
    frames, _ = read_part(part)
    said = [name, metadata.get("caption", ""), metadata.get("mesh_sha256", "")]
    sha = hashlib.sha256(json.dumps(said).encode())
    for file in (part.path.relative_to(directory), *_files_of(frames)):
        sha.update(hashlib.sha256((directory / file).read_bytes()).digest())
    return sha.hexdigest()


def _files_of(frames: list[Frame]) -> Iterator[Path]:
    for frame in frames:
        yield from (frame.image,) if frame.mask is None else (frame.image, frame.mask)


def check_turntable(cameras: Cameras) -> float:
    """The elevation, in radians, of cameras on a turntable as the video model has them (Sec. 3.1).

    Raises Unfit unless the cameras take equal steps counter-clockwise at one elevation and distance, look at
    the origin, stand upright, and take square pictures.
    """
    if cameras.width != cameras.height:
        raise Unfit(f"the pictures are {cameras.width}x{cameras.height}, not square")
    positions = cameras.positions.astype(np.float64)
    radius = np.linalg.norm(positions, axis=-1)
    if np.ptp(radius) > 2 * TOLERANCE_RADIUS * radius.mean():
        raise Unfit(
            f"cameras are {radius.min():.3g} to {radius.max():.3g} from the origin, not at one distance"
        )
    elevation = np.arcsin(positions[:, 2] / radius)
    if np.rad2deg(np.ptp(elevation)) > 2 * TOLERANCE_DEG:
        low, high = np.rad2deg([elevation.min(), elevation.max()])
        raise Unfit(f"cameras stand at {low:.1f} to {high:.1f} degrees, not at one elevation")
    azimuth = np.arctan2(positions[:, 1], positions[:, 0])
    steps = np.rad2deg(np.diff(azimuth, append=azimuth[0]) % (2 * np.pi))
    step = 360 / len(cameras)
    if len(cameras) > 1 and np.abs(steps - step).max() > TOLERANCE_DEG:
        worst = steps[np.argmax(np.abs(steps - step))]
        way = "; it is clockwise" if np.allclose(steps, 360 - step, atol=TOLERANCE_DEG) else ""
        raise Unfit(f"azimuth steps are {worst:.1f} degrees, not {step:g} counter-clockwise{way}")
    rotation, sine = cameras.w2c[:, :3, :3], np.sin(np.deg2rad(TOLERANCE_DEG))
    aim = np.einsum("kj,kj->k", rotation[:, 2], -positions / radius[:, None])
    if aim.min() < np.sqrt(1 - sine**2):
        raise Unfit("cameras do not look at the origin")
    if np.abs(rotation[:, 0, 2]).max() > sine or rotation[:, 1, 2].max() > 0:
        raise Unfit("cameras are tilted: pictures must be upright, with +Z up")
    return float(elevation.mean())


def read_metadata(directory: Path) -> dict[str, Any]:
    """What is known of an object: its metadata.json, or else the "caption" of its caption.txt, or else {}.

    Raises Unfit for files that cannot be read, or whose caption or elevation is of another type.
    """
    path, text = directory / "metadata.json", directory / "caption.txt"
    try:
        if not path.is_file():
            return {"caption": read_text(text).strip()} if text.is_file() else {}
        content = read_json(path)
    except UserError as error:
        raise Unfit(f"what is said of it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unfit("its metadata.json cannot be read, because it is no JSON object")
    if not isinstance(content.get("caption", ""), str) or not isinstance(
        content.get("elevation_deg"), int | float | None
    ):
        raise Unfit("in its metadata.json caption must be text and elevation_deg a number")
    return content | {"caption": content["caption"].strip()} if "caption" in content else content


def write_caption(directory: Path, caption: str, origin: Mapping[str, Any]) -> None:
    """Gives an object a caption in its metadata.json, with a note of where it comes from.

    A caption that the object had before is kept there as "caption_before", unless a network made that, too.

    Raises Unfit if the metadata.json is a link, or cannot be read.
    """
    if (directory / "metadata.json").is_symlink():
        raise Unfit("its metadata.json is a symbolic link, which is not written through")
    content = read_metadata(directory)
    before = content.get("caption")
    if before and "caption_origin" not in content:
        content["caption_before"] = before
    write_json(directory / "metadata.json", content | {"caption": caption, "caption_origin": dict(origin)})


def _png_files(directory: Path, views: Views) -> Iterator[bytes]:
    """The views as PNG files with alpha. Files that already show exactly that are kept byte for byte."""
    assert views.masks is not None
    for name, image, mask in zip(views.names, views.images, views.masks, strict=True):
        content = (directory / name).read_bytes()
        if not _shows(content, image, mask):
            buffer = io.BytesIO()
            Image.fromarray(to_uint8(straight(image, mask))).save(buffer, format="PNG")
            content = buffer.getvalue()
        yield content


def _shows(content: bytes, image: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W 1"]) -> bool:
    """Whether a file can be stored as it is: an RGBA PNG that decodes to this picture and mask."""
    try:
        rgb, alpha = decode_views([content], len(image))
    except (ValueError, OSError):  # another size, mode or format
        return False
    return bool(max(np.abs(rgb[0] - image).max(), np.abs(alpha[0] - mask).max()) < 1e-3)
