"""Cameras on disk, in nerfstudio's transforms.json.

In these files a camera is an OpenGL camera-to-world matrix: x right, y up, z backward. What a file asks for
and a pinhole camera cannot do, such as lens distortion, is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError, first_line
from recon_torch.files import write_json
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import image_size

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # tried for names that have none
LENS_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")  # OPENCV is one where its distortion is 0
MAX_COORDINATE, MAX_INTRINSIC_PX = 1e8, 1e6  # what is larger is a mistake in the file
QUOTED_CHARACTERS = 80  # how much of a wrong value a message shows


def write_transforms(
    path: str | os.PathLike, cameras: Cameras, image_names: Sequence[str], **extra: Any
) -> None:
    """Writes a transforms.json.

    Args:
        cameras: K cameras. Intrinsics that all of them share are written once, others for each frame.
        image_names: K paths of images, relative to the folder of the file.
        extra: further top-level entries, as values that JSON has.
    """
    if len(image_names) != len(cameras):
        raise ValueError(f"{len(image_names)} image names for {len(cameras)} cameras")
    c2w = np.linalg.inv(cameras.w2c.astype(np.float64)) @ OPENGL_FROM_OPENCV
    intrinsics = [_intrinsics_entry(matrix) for matrix in cameras.intrinsics_px]
    shared = all(entry == intrinsics[0] for entry in intrinsics)
    frames = [
        {"file_path": str(name), "transform_matrix": matrix.tolist()} | ({} if shared else entry)
        for name, matrix, entry in zip(image_names, c2w, intrinsics, strict=True)
    ]
    content = {"camera_model": "PINHOLE", "w": cameras.width, "h": cameras.height}
    content |= (intrinsics[0] if shared and intrinsics else {}) | extra | {"frames": frames}
    write_json(path, content)


class Frame(NamedTuple):
    """A frame of a transforms.json that can be used. Paths are relative to the folder of the file."""

    image: Path
    mask: Path | None
    w2c: Float[np.ndarray, "4 4"]  # float64, because worlds may be large and far from their origin
    intrinsics_px: Float[np.ndarray, "3 3"]
    width: int
    height: int

    def intrinsics_at(self, width: int, height: int) -> Float[np.ndarray, "3 3"]:
        """The intrinsics for the image resized to another size."""
        return self.intrinsics_px * np.array([[width / self.width], [height / self.height], [1.0]])


def read_transforms(path: str | os.PathLike) -> tuple[Cameras, list[Path]]:
    """The cameras of a file whose images have one size, and the image of each frame, relative to its folder.

    Raises UserError as `read_frames` does, and for images of different sizes.
    """
    frames, _ = read_frames(path)
    sizes = {(frame.width, frame.height) for frame in frames}
    if len(sizes) > 1:
        raise UserError(f"{path}: frames have different sizes {sorted(sizes)}; resize the images to one size")
    w2c, intrinsics_px = (
        np.stack([getattr(frame, name) for frame in frames]).astype(np.float32)
        for name in ("w2c", "intrinsics_px")
    )
    return Cameras(w2c, intrinsics_px, *sizes.pop()), [frame.image for frame in frames]


def read_frames(path: str | os.PathLike, allow_missing: bool = False) -> tuple[list[Frame], list[str]]:
    """Reads a transforms.json of nerfstudio, or of the original NeRF (camera_angle_x, names without suffix).

    Each frame may have intrinsics, an image size and a mask_path of its own. A size that the file does not
    give is that of the image.

    Args:
        allow_missing: leave out frames whose image does not exist.

    Returns:
        The frames, and the names of the missing images.

    Raises:
        UserError: the file is missing, is not JSON, has no frames, or `parse_frame` refuses one.
    """
    path = Path(path)
    content = load_transforms_json(path)
    frames, missing = [], []
    for index, entry in enumerate(content["frames"]):
        name = entry.get("file_path")
        if allow_missing and isinstance(name, str) and find_image(path.parent, name) is None:
            missing.append(name)
            continue
        try:
            frames.append(parse_frame(path.parent, content | entry))
        except UserError as error:
            raise UserError(f"{path}: frame {index}: {error}") from None
    if not frames:
        raise UserError(f"{path}: none of the {len(missing)} images exists")
    return frames, missing


def load_transforms_json(path: Path) -> dict:
    """Parses a transforms.json, whose "frames" must be a list of objects that is not empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a directory of views needs a transforms.json") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError for thousands of brackets
        raise UserError(f"{path} cannot be read as JSON: {first_line(error)}") from None
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path} has no frames; it needs a list of file_path and transform_matrix")
    return content


def parse_frame(folder: Path, entries: dict) -> Frame:
    """Makes a frame of the entries of a transforms.json in `folder`, and of those of the frame itself.

    Raises UserError that tells all that is wrong with the frame in one line, but not which frame it is.
    """
    problems = []

    def attempt(function, *args):
        try:
            return function(*args)
        except UserError as error:
            problems.append(str(error))

    image = attempt(_image_path, folder, entries)
    mask = attempt(_mask_path, folder, entries)
    size_px = (attempt(_size_px, folder, entries, image) if image else None) or (1, 1)
    w2c = attempt(_w2c, entries)
    intrinsics_px = attempt(_intrinsics, entries, *size_px)
    if problems:
        raise UserError("; ".join(problems))
    return Frame(image, mask, w2c, intrinsics_px, *size_px)


def find_image(folder: Path, name: str) -> Path | None:
    """The image that a file_path with or without a suffix means, relative to the folder; None if missing."""
    for candidate in (name, *(name + suffix for suffix in IMAGE_SUFFIXES)):
        # The system raises errors for names that are too long or hold a NUL; such images are missing.
        with contextlib.suppress(OSError, ValueError):
            if (folder / candidate).is_file():
                return Path(candidate)
    return None


def _intrinsics_entry(matrix: np.ndarray) -> dict[str, float]:
    return {
        "fl_x": float(matrix[0, 0]),
        "fl_y": float(matrix[1, 1]),
        "cx": float(matrix[0, 2]),
        "cy": float(matrix[1, 2]),
    }


def _image_path(folder: Path, entries: dict) -> Path:
    name = entries.get("file_path")
    if not isinstance(name, str) or not name:
        raise UserError("it has no file_path")
    found = find_image(folder, name)
    if found is None:
        raise UserError(f"image {_quoted(name)} does not exist")
    return found


def _mask_path(folder: Path, entries: dict) -> Path | None:
    if entries.get("mask_path") is None:
        return None
    name = entries["mask_path"]
    if not isinstance(name, str) or not name:
        raise UserError(f"mask_path {_quoted(name)} is not a file name")
    found = find_image(folder, name)
    if found is None:
        raise UserError(f"mask {_quoted(name)} does not exist")
    return found


def _size_px(folder: Path, entries: dict, image: Path) -> tuple[int, int]:
    """The (width, height) of the image. The file's must be the same, or its intrinsics would mean nothing."""
    found = image_size(folder / image)
    if "w" in entries and "h" in entries:
        given = _number(entries, "w"), _number(entries, "h")
        if given != found:
            raise UserError(
                f"image {_quoted(str(image))} is {found[0]}x{found[1]} px, "
                f"w and h say {given[0]:g}x{given[1]:g}; make them agree"
            )
    return found


def _number(entries: dict, key: str) -> float:
    value = entries.get(key)
    with contextlib.suppress(OverflowError):  # raised for whole numbers with hundreds of digits
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise UserError(f"{key} is {_quoted(value)}, not a finite number")


def _intrinsics(entries: dict, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    model = entries.get("camera_model", "PINHOLE")
    bent = [key for key in LENS_DISTORTION if entries.get(key)]
    if model not in PINHOLE_MODELS or bent:
        what = ", ".join(bent) if bent else f"camera_model {_quoted(model)}"
        raise UserError(f"lens distortion ({what}) is not supported; undistort the images")
    fx, fy = (_focal_px(entries, axis, side) for axis, side in (("x", width), ("y", height)))
    if fx is None:
        raise UserError("neither fl_x (pixels) nor camera_angle_x (radians) is given")
    fy = fx if fy is None else fy
    if not (0 < fx < MAX_INTRINSIC_PX and 0 < fy < MAX_INTRINSIC_PX):
        raise UserError(
            f"the focal length ({fx:g}, {fy:g}) px must be positive, and below {MAX_INTRINSIC_PX:g}"
        )
    cx = _number(entries, "cx") if "cx" in entries else width / 2
    cy = _number(entries, "cy") if "cy" in entries else height / 2
    if not (abs(cx) < MAX_INTRINSIC_PX and abs(cy) < MAX_INTRINSIC_PX):
        raise UserError(f"the image centre ({cx:g}, {cy:g}) px is beyond {MAX_INTRINSIC_PX:g}")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _focal_px(entries: dict, axis: str, side_px: int) -> float | None:
    """The focal length from fl_x or camera_angle_x (or _y); None if neither is given."""
    if f"fl_{axis}" in entries:
        return _number(entries, f"fl_{axis}")
    name = f"camera_angle_{axis}"
    if name not in entries:
        return None
    angle_rad = _number(entries, name)
    if not 0 < angle_rad < math.pi:
        raise UserError(f"{name} is {angle_rad:g}; an angle of view lies between 0 and pi")
    return 0.5 * side_px / math.tan(angle_rad / 2)


def _w2c(entries: dict) -> Float[np.ndarray, "4 4"]:
    try:
        c2w = np.asarray(entries.get("transform_matrix"), np.float64)
    except (TypeError, ValueError, OverflowError):
        c2w = np.zeros(0)
    if c2w.shape != (4, 4):
        raise UserError("transform_matrix is missing or is not 4x4")
    if not (np.abs(c2w) < MAX_COORDINATE).all():  # false for NaN as well
        raise UserError(f"transform_matrix has values that are not finite, or beyond {MAX_COORDINATE:g}")
    rotation = c2w[:3, :3]
    if abs(np.linalg.det(rotation)) < 1e-6:
        raise UserError("transform_matrix is singular")
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise UserError("transform_matrix is not a rotation and a translation; remove its scale or mirroring")
    if not np.allclose(c2w[3], [0, 0, 0, 1], atol=1e-6):
        raise UserError("transform_matrix does not end with the row 0 0 0 1")
    return np.linalg.inv(c2w @ OPENGL_FROM_OPENCV)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "..."
