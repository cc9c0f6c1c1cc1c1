"""One frame of a transforms.json: its image, its mask, its camera and its lens.

A camera in these files is an OpenGL camera-to-world matrix: x right, y up, z backward. What is not understood
is refused by name, or is one of the frame's notes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError, near, quoted
from recon_torch.views.axes import ENTRY
from recon_torch.views.camera_entries import (
    CAMERA_KEYS,
    FOCAL_KEYS,
    SIDES,
    focal_of,
    intrinsics_of,
    lens_of,
    number,
    w2c_of,
)
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import QUARTER_TURNS, stored_size
from recon_torch.views.lens import Undistortion, undo

T = TypeVar("T")

FILENAMES = ("train_filenames", "val_filenames", "test_filenames")
LARGEST_SIDE_PX = 8192  # of a picture to render
MOST_FOLDERS = 32  # of a path that is searched
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # tried for names that have none
OTHER_KEYS = ("file_path", "mask_path", "transform_matrix", "frames", *FILENAMES)
SAME_FOCAL = 0.01  # relative difference of two focal lengths in a file that may be rounding
# What other programs write for their own use and what says nothing of pictures or cameras: where a scene's
# box is, how it was turned, how sharp a picture is, the rotation of the original NeRF's turntable, and the
# axes of an asset beside the file.
WITHOUT_EFFECT = {
    *("aabb", "aabb_scale", "render_aabb", "scale", "offset", "up", "sharpness", "rotation", "timestamp"),
    *("applied_transform", "applied_scale", "orientation_override", "ply_file_path", "colmap_im_id"),
    *("n_extra_learnable_dims", "enable_depth_loading", "integer_depth_scale"),
    ENTRY,
}

UNKNOWN_TURN = (
    "its EXIF entry asks for a turn, and nothing in the file shows whether the camera is of the turned "
    "picture: it is taken as it is stored, as COLMAP and nerfstudio do"
)
NO_LENS = "its lens distortion is left out: it is the pinhole that a fit sees"


class Frame(NamedTuple):
    """A frame that can be used.

    Attributes:
        image, mask: paths, relative to the folder of the file.
        w2c: float64, because worlds may be large and far from their origin.
        intrinsics_px: of the pinhole, for an image of `width` x `height`.
        upright: whether the image is turned as its EXIF entry says.
        undistortion: what makes a pinhole's picture of the image; None if it is one.
        notes: what a report should say about the frame.
    """

    image: Path
    mask: Path | None
    w2c: Float[np.ndarray, "4 4"]
    intrinsics_px: Float[np.ndarray, "3 3"]
    width: int
    height: int
    upright: bool = False
    undistortion: Undistortion | None = None
    notes: tuple[str, ...] = ()

    def intrinsics_at(self, width: int, height: int) -> Float[np.ndarray, "3 3"]:
        """The intrinsics for the image resized to another size."""
        return self.intrinsics_px * np.array([[width / self.width], [height / self.height], [1.0]])


class _Size(NamedTuple):
    width: int
    height: int
    upright: bool = False
    note: str = ""


def parse_frame(folder: Path, shared: dict, own: dict) -> Frame:
    """Makes a frame of the entries that all frames of a file in `folder` share, and of its own.

    Raises UserError that tells all that is wrong with the frame in one line, but not which frame it is.
    """
    problems: list[str] = []

    def attempt(function: Callable[..., T], *args: Any) -> T | None:
        try:
            return function(*args)
        except UserError as error:
            problems.append(str(error))
            return None

    entries = _merged(shared, own)
    image = attempt(_image_path, folder, entries)
    mask = attempt(_mask_path, folder, entries)
    size = (attempt(_size, folder, entries, image) if image else None) or _Size(1, 1)
    w2c = attempt(w2c_of, entries)
    intrinsics_px = attempt(intrinsics_of, entries, size.width, size.height)
    lens = attempt(lens_of, entries)
    undistortion = None
    if lens is not None and intrinsics_px is not None and size.width > 1:
        (fx, _, cx), (_, fy, cy) = intrinsics_px[:2].tolist()
        undistortion = attempt(undo, lens, (fx, fy, cx, cy), size.width, size.height)
    if problems or image is None or w2c is None or intrinsics_px is None:
        raise UserError("; ".join(problems))
    notes = [*_notes(shared, own, entries), size.note]
    if undistortion is not None:
        intrinsics_px = intrinsics_px * [[undistortion.factor, 1, 1], [1, undistortion.factor, 1], [1, 1, 1]]
        what = "fisheye lens" if undistortion.lens.fisheye else "lens distortion"
        notes.append(f"its {what} is undone")
    told = tuple(note for note in notes if note)
    return Frame(image, mask, w2c, intrinsics_px, size.width, size.height, size.upright, undistortion, told)


def parse_camera(folder: Path, shared: dict, own: dict) -> tuple[Cameras, list[str]]:
    """(the camera of a frame as a pinhole, K = 1; notes on what of its entries is left out).

    Its image is needed only where nothing gives w and h.

    Raises UserError as `parse_frame` does.
    """
    entries = _merged(shared, own)
    if {"w", "h"} <= entries.keys():
        width, height = (_side_px(entries, key) for key in "wh")
        w2c, intrinsics_px = w2c_of(entries), intrinsics_of(entries, width, height)
        lens = lens_of(entries)
        if lens is not None:
            (fx, _, cx), (_, fy, cy) = intrinsics_px[:2].tolist()
            factor = undo(lens, (fx, fy, cx, cy), width, height).factor
            intrinsics_px = intrinsics_px * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]]
    else:
        frame = parse_frame(folder, shared, own)
        w2c, intrinsics_px, width, height = frame.w2c, frame.intrinsics_px, frame.width, frame.height
        lens = None if frame.undistortion is None else frame.undistortion.lens
    notes = [*_notes(shared, own, entries), *[NO_LENS] * (lens is not None)]
    return Cameras(w2c[None], intrinsics_px[None], width, height), notes


def _side_px(entries: dict, key: str) -> int:
    value = number(entries, key)
    if value != round(value) or not 1 <= value <= LARGEST_SIDE_PX:
        raise UserError(f"{key} is {quoted(value)}; give a whole number from 1 to {LARGEST_SIDE_PX}")
    return int(value)


def plain_name(name: str) -> str:
    """A file_path in one spelling, so that two of them can be compared."""
    return str(PurePosixPath(name.replace("\\", "/")))


def find_image(folder: Path, name: str) -> Path | None:
    """The image that a file_path with or without a suffix means, relative to the folder; None if missing.

    A name whose folders are joined by backslashes, as on Windows, means what it means there.
    """
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        for candidate in (spelling, *(spelling + suffix for suffix in IMAGE_SUFFIXES)):
            # The system raises errors for names that are too long or hold a NUL; such images are missing.
            with contextlib.suppress(OSError, ValueError):
                if (folder / candidate).is_file():
                    return Path(candidate)
    return None


def missing_image(folder: Path, name: str) -> str:
    """A line that says that there is no such image, with a hint at one that may be meant.

    It has the same name in other letters, or without the folders at the beginning, as on another machine.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    for start in range(min(len(parts), MOST_FOLDERS)):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            found = folder
            for part in parts[start:]:
                wanted = {(part + suffix).lower() for suffix in ("", *IMAGE_SUFFIXES)}
                found = next(each for each in sorted(found.iterdir()) if each.name.lower() in wanted)
            if found.is_file():
                return f"{quoted(name)} does not exist; is it {quoted(str(found.relative_to(folder)))}?"
    return f"{quoted(name)} does not exist"


def _merged(shared: dict, own: dict) -> dict:
    """The entries of a frame: its own before the shared ones, also where they say the same by another key."""
    shadowed = [key for keys in FOCAL_KEYS.values() if own.keys() & set(keys) for key in keys]
    return {key: value for key, value in shared.items() if key not in shadowed} | own


def _notes(shared: dict, own: dict, entries: dict) -> Iterator[str]:
    differing = [key for key in CAMERA_KEYS if key in own and key in shared and own[key] != shared[key]]
    if differing:
        yield (
            f"it differs from the file in {', '.join(differing)}: the frame's own is taken, "
            "where nerfstudio 1.1.5 takes the file's"
        )
    for side, index in SIDES.items():
        keys = [key for key in FOCAL_KEYS[side] if key in entries]
        if len(keys) > 1 and {"w", "h"} <= entries.keys():
            length_px = number(entries, "wh"[index])
            first, *others = (focal_of(entries, key, length_px) for key in keys)
            if any(abs(other / first - 1) > SAME_FOCAL for other in others):
                yield f"its {', '.join(keys)} contradict each other: {keys[0]} is taken"
    unread = entries.keys() - {*CAMERA_KEYS, *OTHER_KEYS, *WITHOUT_EFFECT}
    if unread:
        yield f"it has entries that are not read: {shortened(sorted(unread))}"


def shortened(names: list[str], most: int = 6) -> str:
    """Names in one line, of which a few stand for many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:80] for name in names[:most]) + more


def grouped(names: list[str], notes: list[list[str]]) -> list[str]:
    """Notes on several views, each once, with the names of the views that it is of."""
    having: dict[str, list[str]] = {}
    for name, own in zip(names, notes, strict=True):
        for note in own:
            having.setdefault(note, []).append(name)
    return [
        f"{note}: {f'all {len(names)} views' if len(own) == len(names) > 1 else ', '.join(own)}"
        for note, own in sorted(having.items())
    ]


def _image_path(folder: Path, entries: dict) -> Path:
    name = entries.get("file_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"it has no file_path{near('file_path', entries.keys() - {'file_path'})}")
    found = find_image(folder, name)
    if found is None:
        raise UserError(f"image {missing_image(folder, name)}")
    return found


def _mask_path(folder: Path, entries: dict) -> Path | None:
    if entries.get("mask_path") is None:
        return None
    name = entries["mask_path"]
    if not isinstance(name, str) or not name:
        raise UserError(f"mask_path {quoted(name)} is not a file name")
    found = find_image(folder, name)
    if found is None:
        raise UserError(f"mask {missing_image(folder, name)}")
    return found


def _size(folder: Path, entries: dict, image: Path) -> _Size:
    """The size of the image, and whether it is turned as its EXIF entry asks.

    Cameras are mostly of the stored picture, as COLMAP, nerfstudio and instant-ngp ignore that entry. What
    the file says of the size decides, or else where it says that the centre is.

    Raises UserError if the file gives another size, because its intrinsics would then mean nothing.
    """
    stored, orientation = stored_size(folder / image)
    turned = stored[::-1] if orientation in QUARTER_TURNS else stored
    given = {key: number(entries, key) for key in ("w", "h") if key in entries}

    def agrees(size: tuple[int, int]) -> bool:
        return all(given.get(key, length) == length for key, length in zip("wh", size, strict=True))

    if not agrees(stored) and not agrees(turned):
        said = "x".join(f"{given.get(key, length):g}" for key, length in zip("wh", stored, strict=True))
        sizes = f"{stored[0]}x{stored[1]} px"
        sizes += f" and turned by EXIF {turned[0]}x{turned[1]}" if turned != stored else ""
        raise UserError(f"image {quoted(str(image))} is {sizes}, w and h say {said}; make them agree")
    if orientation == 1:
        return _Size(*stored)
    if turned == stored or not (given or {"cx", "cy"} <= entries.keys()):
        return _Size(*stored, note=UNKNOWN_TURN)
    upright, keys = not agrees(stored), "w and h"
    if not given:
        upright, keys = _is_center_of(turned, stored, entries), "cx and cy"
    how = "turned as its EXIF entry says" if upright else "as it is stored, not turned by EXIF"
    return _Size(*(turned if upright else stored), upright, f"it is taken {how}: {keys} are of that picture")


def _is_center_of(size: tuple[int, int], other: tuple[int, int], entries: dict) -> bool:
    """Whether cx and cy are nearer to the middle of the one size than of the other."""
    center = number(entries, "cx"), number(entries, "cy")
    apart = [math.dist(center, (width / 2, height / 2)) for width, height in (size, other)]
    return apart[0] < apart[1]
