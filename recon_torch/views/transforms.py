"""Cameras on disk, in nerfstudio's transforms.json and its relatives: which files, and which frames of them.

`frames` reads a frame. Views may be split into those to train with and those to test with: by files named
transforms_train.json and transforms_test.json, as the original NeRF and Blender's exporters have them, or by
nerfstudio's lists train_filenames and test_filenames in one file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recon_torch.errors import UserError, near, quoted
from recon_torch.files import write_json
from recon_torch.text_files import read_json
from recon_torch.views.camera_entries import OPENGL_FROM_OPENCV
from recon_torch.views.cameras import Cameras
from recon_torch.views.frames import (
    FILENAMES,
    Frame,
    find_image,
    grouped,
    parse_camera,
    parse_frame,
    plain_name,
    shortened,
)

TRANSFORMS = "transforms.json"
TRAIN, TEST, VAL = "transforms_train.json", "transforms_test.json", "transforms_val.json"


@dataclass(frozen=True)
class Part:
    """Some frames of a file.

    Attributes:
        path: the file.
        shared: its entries that are of all frames.
        frames: the entries of each frame.
        notes: what a report should say about the choice of the frames.
    """

    path: Path
    shared: dict[str, Any]
    frames: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """The views to train with, and those to test with; None if the views are not split."""

    train: Part
    test: Part | None = None


def write_transforms(
    path: str | os.PathLike, cameras: Cameras | Sequence[Cameras], image_names: Sequence[str], **extra: Any
) -> None:
    """Writes a transforms.json.

    Args:
        cameras: K cameras, or several rigs with K cameras in all. Sizes and intrinsics that all of them share
            are written once, others for each frame.
        image_names: K paths of images, relative to the folder of the file.
        extra: further top-level entries, as values that JSON has.
    """
    rigs = [cameras] if isinstance(cameras, Cameras) else cameras
    w2c = np.concatenate([rig.w2c.astype(np.float64) for rig in rigs])
    if len(image_names) != len(w2c):
        raise ValueError(f"{len(image_names)} image names for {len(w2c)} cameras")
    c2w = np.linalg.inv(w2c) @ OPENGL_FROM_OPENCV
    content: dict[str, Any] = {"camera_model": "PINHOLE"}
    frames: list[dict[str, Any]] = [
        {"file_path": str(name), "transform_matrix": matrix.tolist()}
        for name, matrix in zip(image_names, c2w, strict=True)
    ]
    sizes: list[dict[str, Any]] = [{"w": rig.width, "h": rig.height} for rig in rigs for _ in range(len(rig))]
    intrinsics: list[dict[str, Any]] = [
        _intrinsics_entry(matrix) for rig in rigs for matrix in rig.intrinsics_px
    ]
    for entries in (sizes, intrinsics):
        if all(entry == entries[0] for entry in entries):
            content |= entries[0] if entries else {}
        else:
            frames = [frame | entry for frame, entry in zip(frames, entries, strict=True)]
    write_json(path, content | extra | {"frames": frames})


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


def read_cameras(source: str | os.PathLike) -> tuple[list[Cameras], list[str]]:
    """The cameras of all frames of a file, or of a directory's transforms.json, in float64, to render from.

    Lens distortion is left out: they are the pinholes to which `load_views` brings the images.

    Returns:
        The cameras in the file's order, those of one size that follow each other together; and notes.

    Raises UserError as `read_file` and `parse_camera` do.
    """
    source = Path(source)
    if not source.is_file() and not (source / TRANSFORMS).is_file():
        raise UserError(_nothing_at(source))
    part = read_file(source if source.is_file() else source / TRANSFORMS)
    cameras, notes = [], []
    for index, entry in enumerate(part.frames):
        try:
            camera, told = parse_camera(part.path.parent, part.shared, entry)
        except UserError as error:
            raise UserError(f"{part.path}: frame {index}: {error}") from None
        cameras.append(camera)
        notes.append(told)
    names = [f"frame {index}" for index in range(len(cameras))]
    rigs = [list(rig) for _, rig in itertools.groupby(cameras, lambda each: (each.width, each.height))]
    return [_together(rig) for rig in rigs], grouped(names, notes)


def _together(cameras: Sequence[Cameras]) -> Cameras:
    """Cameras of one size as one rig."""
    w2c, intrinsics_px = (
        np.concatenate([getattr(each, name) for each in cameras]) for name in ("w2c", "intrinsics_px")
    )
    return Cameras(w2c, intrinsics_px, cameras[0].width, cameras[0].height)


def read_frames(path: str | os.PathLike, allow_missing: bool = False) -> tuple[list[Frame], list[str]]:
    """Reads all frames of a file, see `read_part`."""
    return read_part(read_file(Path(path)), allow_missing)


def read_part(part: Part, allow_missing: bool = False) -> tuple[list[Frame], list[str]]:
    """Reads frames.

    Each frame may have intrinsics, an image size and a mask_path of its own. A size that the file does not
    give is that of the image.

    Args:
        allow_missing: leave out frames whose image does not exist.

    Returns:
        The frames, and the names of the missing images.

    Raises:
        UserError: `parse_frame` refuses a frame, or no image exists.
    """
    frames, missing, folder = [], [], part.path.parent
    for index, entry in enumerate(part.frames):
        name = entry.get("file_path")
        if allow_missing and isinstance(name, str) and find_image(folder, name) is None:
            missing.append(name)
            continue
        try:
            frames.append(parse_frame(folder, part.shared, entry))
        except UserError as error:
            raise UserError(f"{part.path}: frame {index}: {error}") from None
    if not frames:
        raise UserError(f"{part.path}: none of the {len(missing)} images exists")
    return frames, missing


def parts_of(source: str | os.PathLike) -> Parts:
    """The parts of a directory of views or of a file.

    Raises UserError where there is no file, or `read_file` refuses it.
    """
    source = Path(source)
    if source.is_file():
        return _listed(read_file(source))
    present = [name for name in (TRAIN, TEST, VAL) if (source / name).is_file()]
    if (source / TRANSFORMS).is_file():
        notes = [f"{', '.join(present)} beside {TRANSFORMS} is not read"] if present else []
        return _listed(read_file(source / TRANSFORMS, notes))
    if TRAIN not in present:
        raise UserError(_nothing_at(source))
    test = next((read_file(source / name) for name in (TEST, VAL) if name in present), None)
    notes = [f"{VAL} is not read"] if {TEST, VAL} <= set(present) else []
    if test is not None and not any(
        _has_image(test, frame) for frame in test.frames
    ):  # Blender's, not rendered
        notes.append(f"{test.path.name} is not read, because none of its images exists")
        test = None
    return Parts(read_file(source / TRAIN, notes), test)


def is_source(directory: Path) -> bool:
    """Whether `parts_of` finds a file of cameras in a directory."""
    return any((directory / name).is_file() for name in (TRANSFORMS, TRAIN))


def read_file(path: Path, notes: Sequence[str] = ()) -> Part:
    """All frames of a file. Raises UserError if it cannot be read or its "frames" is no list of objects."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; a directory of views needs a {TRANSFORMS}")
    if path.suffix.lower() != ".json":
        raise UserError(f"{path} is no .json file of cameras; `im3d fit --video` takes a video of one turn")
    content = read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        hint = near("frames", content) if isinstance(content, dict) and frames is None else ""
        raise UserError(f"{path} has no frames; it needs a list of file_path and transform_matrix{hint}")
    return Part(path, {key: value for key, value in content.items() if key != "frames"}, frames, list(notes))


def _has_image(part: Part, frame: dict) -> bool:
    name = frame.get("file_path")
    return isinstance(name, str) and find_image(part.path.parent, name) is not None


def _nothing_at(source: Path) -> str:
    """A line that says that there is no file of cameras, with a hint at what there is instead."""
    if source.is_dir():
        others = sorted(path.name for path in source.glob("*.json"))
        hint = f"; if it is {shortened(others)}, give the path of that file" if others else ""
        return f"{source / TRANSFORMS} does not exist; a directory of views needs one{hint}"
    beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
    path = source if source.suffix == ".json" else source / TRANSFORMS
    return f"{path} does not exist; a directory of views needs a {TRANSFORMS}{near(source.name, beside)}"


def _listed(part: Part) -> Parts:
    """The parts by the lists of file names in a file; all is for training where it has none."""
    lists = {key: _names(part, key) for key in FILENAMES if key in part.shared}
    if not lists:
        return Parts(part)
    train, val, test = (lists.get(key) for key in FILENAMES)
    others = (val or set()) | (test or set())

    def having(wanted: Callable[[str], bool]) -> list[dict]:
        return [frame for frame in part.frames if wanted(plain_name(str(frame.get("file_path"))))]

    trained = having(lambda name: name not in others if train is None else name in train)
    tested = having(lambda name: name in (test or ()))
    both = sum(frame in trained for frame in tested)
    left_out = len(part.frames) - len(trained) - len(tested) + both
    notes = [*part.notes]
    if left_out:
        notes.append(f"{left_out} frames that are neither to train nor to test with are left out")
    if both:
        notes.append(f"{both} frames are to train and to test with: their scores are too good")
    if not trained:
        raise UserError(f"{part.path}: its lists of file names leave no frame to train with")
    held_out = Part(part.path, part.shared, tested) if tested else None
    return Parts(Part(part.path, part.shared, trained, notes), held_out)


def _names(part: Part, key: str) -> set[str]:
    """The names of a list in a file. Raises UserError for those that no frame has."""
    listed = part.shared[key]
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise UserError(f"{part.path}: {key} is {quoted(listed)}, not a list of file names")
    names = {plain_name(name) for name in listed}
    unknown = sorted(names - {plain_name(str(frame.get("file_path"))) for frame in part.frames})
    if unknown:
        raise UserError(f"{part.path}: {key} names {shortened(unknown)}, which no frame has as its file_path")
    return names


def _intrinsics_entry(matrix: np.ndarray) -> dict[str, float]:
    return {
        "fl_x": float(matrix[0, 0]),
        "fl_y": float(matrix[1, 1]),
        "cx": float(matrix[0, 2]),
        "cy": float(matrix[1, 2]),
    }
