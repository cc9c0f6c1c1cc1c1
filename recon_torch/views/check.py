"""Looks for mistakes in a directory of views, frame by frame and between frames (`im3d fit --check`).

An error is what a fit refuses, or what cannot give a good fit. A remark is what may be intended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.views import defects, hull, masks, world
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import MaskSource, Picture, read_frame
from recon_torch.views.frames import Frame, parse_frame
from recon_torch.views.resizing import resize
from recon_torch.views.silhouettes import CONTRADICTED, EXPLAINED
from recon_torch.views.transforms import Part, parts_of

_ADVICE = "; give masks or alpha, or use --isnet-weights"
CHECKED_PX = 128  # height at which images are checked
NARROWEST_DEG, WIDEST_DEG = 1.0, 150.0  # vertical fields of view that a lens may have
MOST_STRETCHED = 1.5  # largest fx / fy
# Two cameras are the same if they are closer than this share of the distance to the focus, and if the cosine
# of the angle between their axes is larger than this.
SAME_PLACE, SAME_WAY = 1e-4, 1 - 1e-7
NEAREST, FARTHEST = 0.1, 10.0  # distances to the focus as shares of their median


class Finding(NamedTuple):
    """What is wrong with a frame, or with all of them together; nothing if all is well."""

    name: str
    errors: list[str]
    remarks: list[str]
    mask: list[str]  # how much of a frame its mask covers, and what the mask is from

    def __str__(self) -> str:
        words = [f"ERROR: {text}" for text in self.errors] + [f"remark: {text}" for text in self.remarks]
        return f"{self.name}: {'; '.join([*(words or ['ok']), *self.mask])}"


class Checked(NamedTuple):
    """What is wrong with a directory of views."""

    frames: list[Finding]  # one for each frame
    general: list[Finding]  # about all frames together; may be empty

    @property
    def has_errors(self) -> bool:
        return any(finding.errors for finding in self.frames + self.general)

    @property
    def summary(self) -> str:
        good = sum(not finding.errors for finding in self.frames)
        return f"{good} of {len(self.frames)} frames are good"


class PoseError(NamedTuple):
    """What is wrong with the camera of a frame beside the others."""

    frame: int  # the frame's number
    text: str
    looks_away: bool = False  # from where the axes of the cameras meet


def check(source: str | os.PathLike, isnet_weights: str | os.PathLike | None = None) -> Checked:
    """Checks each frame of a directory of views or of a transforms.json, and all of them together.

    Frames to test with are checked with those to train with, because they are of one world.

    isnet_weights: what finds the foreground of frames without a mask; default: `masks.by_backdrop`.

    Raises UserError if the file is missing, is not JSON or has no frames.
    """
    parts = parts_of(source)
    findings: list[Finding] = []
    frames: dict[int, tuple[Frame, np.ndarray]] = {}
    for part in (parts.train, parts.test):
        if part is None:
            continue
        for entry in part.frames:
            number, use = len(findings), "" if part is parts.train else ", to test with"
            finding = Finding(f"frame {number} ({str(entry.get('file_path'))[:80]!r}{use})", [], [], [])
            findings.append(finding)
            view = _check_frame(part, entry, finding, isnet_weights)
            if view is not None:
                frames[number] = view
    general = Finding("all frames", [], [*parts.train.notes], [])
    _compare(frames, findings, general)
    return Checked(findings, [general] if general.errors or general.remarks else [])


def _check_frame(
    part: Part, entry: dict, finding: Finding, isnet_weights: str | os.PathLike | None
) -> tuple[Frame, np.ndarray] | None:
    """Adds what is wrong with a frame to its finding. Returns frame and picture unless there is an error."""
    try:
        frame = parse_frame(part.path.parent, part.shared, entry)
        picture, seen = _picture(part.path.parent, frame, isnet_weights)
    except UserError as error:
        finding.errors.append(str(error))
        return None
    finding.errors.extend(lens_errors(frame))
    if np.isnan(picture.rgbm[..., 3]).any():
        finding.errors.append(f"its foreground cannot be told from its background{_ADVICE}")
        finding.remarks.extend([*frame.notes, *seen])
        return None
    share = masks.covered_share(picture.rgbm[..., 3:])
    by_isnet = picture.mask is MaskSource.NONE and isnet_weights is not None
    finding.mask.append(f"{share:.1%} by {'IS-Net' if by_isnet else picture.mask}")
    finding.errors.extend(mask_errors(picture.rgbm))
    finding.remarks.extend([*frame.notes, *picture.notes, *seen, *remarks(frame, picture.rgbm)])
    return None if finding.errors else (frame, picture.rgbm)


def lens_errors(frame: Frame) -> list[str]:
    """Errors of intrinsics that no lens has, or that belong to another image."""
    (fx, _, cx), (_, fy, cy) = frame.intrinsics_px[:2]
    errors = []
    if not (0 <= cx <= frame.width and 0 <= cy <= frame.height):
        errors.append(
            f"its centre ({cx:g}, {cy:g}) px is outside of its {frame.width}x{frame.height} px image"
        )
    fov_deg = np.degrees(2 * np.arctan(0.5 * frame.height / fy))
    if not NARROWEST_DEG <= fov_deg <= WIDEST_DEG:
        errors.append(f"fl_y {fy:g} px is a vertical field of view of {fov_deg:.3g} degrees")
    return errors


def mask_errors(picture: Float[np.ndarray, "H W 4"]) -> list[str]:
    """Errors of the mask, the picture's last channel: nothing is in it, or nothing is outside of it."""
    problem = masks.problem(picture[..., 3:])
    if problem == masks.Problem.FULL:
        return [f"its mask {problem}{_ADVICE}"]
    return [f"its mask {problem}"] if problem == masks.Problem.EMPTY else []


def remarks(frame: Frame, picture: Float[np.ndarray, "H W 4"]) -> list[str]:
    """Remarks on what may be right: an object that is cut off, pixels that are not square."""
    found = []
    if masks.problem(picture[..., 3:]) == masks.Problem.CUT_OFF:
        found.append(f"its mask {masks.Problem.CUT_OFF}")
    ratio = frame.intrinsics_px[0, 0] / frame.intrinsics_px[1, 1]
    if not 1 / MOST_STRETCHED <= ratio <= MOST_STRETCHED:
        found.append(f"fl_x is {ratio:.3g} times fl_y")
    return found


def pose_errors(frames: dict[int, Frame]) -> list[PoseError]:
    """What is wrong with cameras beside the others. Raises UserError if all of them look the same way.

    frames: by their index.
    """
    cameras = _cameras(list(frames.values()))
    axes, positions = cameras.w2c[:, 2, :3], cameras.positions
    to_focus = world.focus(cameras) - positions
    distances = np.linalg.norm(to_focus, axis=-1)
    errors = []
    for k, (index, frame) in enumerate(frames.items()):
        near = np.linalg.norm(positions[:k] - positions[k], axis=-1) < SAME_PLACE * np.median(distances)
        twins = np.flatnonzero(near & (axes[:k] @ axes[k] > SAME_WAY))
        if len(twins):
            errors.append(PoseError(index, f"its camera is that of frame {list(frames)[twins[0]]}"))
        share = distances[k] / np.median(distances)
        if not NEAREST <= share <= FARTHEST:
            text = f"it is {share:.2g} times as far from the cameras' focus as the median"
            errors.append(PoseError(index, text))
        angle_deg = np.degrees(np.arccos(np.clip(axes[k] @ to_focus[k] / distances[k], -1, 1)))
        half_diagonal = (
            np.hypot(frame.width / frame.intrinsics_px[0, 0], frame.height / frame.intrinsics_px[1, 1]) / 2
        )
        if angle_deg > np.degrees(np.arctan(half_diagonal)):
            text = f"it looks {angle_deg:.0f} degrees away from the cameras' focus"
            errors.append(PoseError(index, text, looks_away=True))
    return errors


def silhouette_shares(views: dict[int, tuple[Frame, np.ndarray]]) -> dict[int, float]:
    """The share of each frame's mask that lies where the other masks allow the object, by the frame's index.

    views: frames whose cameras have a focus, and pictures, whose last channel is the mask, by their index.
    """
    unit = world.of_cameras(_cameras([frame for frame, _ in views.values()]))
    points = hull.grid(world.SEARCHED_HALF_WIDTH, world.SEARCHED_CELLS)
    seen = []
    for frame, picture in views.values():
        camera = unit.cameras(_cameras([frame])).resized(picture.shape[1], picture.shape[0])
        seen.append((camera, picture[None, ..., 3:]))
    found = np.concatenate([hull.verdicts(points, *view, world.REACH) for view in seen])
    # One bad view among many must not speak against the others.
    allowed = points[hull.hull(found, max_objections=-(-len(found) // hull.OBJECTIONS_ONE_IN))]
    return {
        index: _explained(allowed, camera, mask[0, ..., 0])
        for index, (camera, mask) in zip(views, seen, strict=True)
    }


def _picture(
    folder: Path, frame: Frame, isnet_weights: str | os.PathLike | None
) -> tuple[Picture, list[str]]:
    """The image of a frame over white and its mask, small, and what is to be said of how it looks.

    The mask is NaN where it cannot be told.
    """
    picture = read_frame(folder, frame, frame.width, frame.height)
    found = defects.remarks(picture.rgbm)
    height = min(frame.height, CHECKED_PX)
    small = resize(picture.rgbm, max(1, round(frame.width * height / frame.height)), height)
    if picture.mask is MaskSource.NONE:
        rgb = small[None, ..., :3]
        segmented = masks.by_isnet(rgb, isnet_weights) if isnet_weights else masks.by_backdrop(rgb)
        small = np.concatenate([segmented.images[0], segmented.masks[0]], -1)
        found += [f"the object {doubt}" for doubt in segmented.doubts[0]]
    return picture._replace(rgbm=small), found


def _compare(frames: dict[int, tuple[Frame, np.ndarray]], findings: list[Finding], general: Finding) -> None:
    """Adds what is wrong between frames to their findings, and what concerns all of them to `general`."""
    if len(frames) < world.FEWEST_VIEWS:
        general.remarks.append(f"{len(frames)} usable frames are few; give at least {world.FEWEST_VIEWS}")
    try:
        poses = pose_errors({index: frame for index, (frame, _) in frames.items()}) if len(frames) > 1 else []
        faulty = {pose.frame for pose in poses}
        good = {index: view for index, view in frames.items() if index not in faulty}
        shares = silhouette_shares(good) if len(good) > 1 else {}
        if len(good) >= world.FEWEST_VIEWS:
            general.remarks.extend(world.sparseness(_cameras([frame for frame, _ in good.values()])))
    except UserError as error:
        general.errors.append(str(error))
        return
    for pose in poses:
        findings[pose.frame].errors.append(pose.text)
    for index, share in shares.items():
        if share < EXPLAINED:
            told = findings[index].errors if share < CONTRADICTED else findings[index].remarks
            told.append(f"only {share:.0%} of its mask is where the other masks allow the object")
    away = sum(pose.looks_away for pose in poses)
    if away > len(frames) / 2:
        general.errors.append(
            f"{away} cameras look away from where their axes meet; "
            "transform_matrix is camera-to-world with y up and z backward (OpenGL)"
        )


def _explained(points: Float[np.ndarray, "N 3"], camera: Cameras, mask: Float[np.ndarray, "H W"]) -> float:
    """The share of the mask that lies near the projection of a point."""
    foreground = mask > hull.FOREGROUND
    near = hull.reached(points, camera, world.REACH)
    return float((near & foreground).sum() / max(foreground.sum(), 1))


def _cameras(frames: list[Frame]) -> Cameras:
    """The cameras of all frames, with intrinsics for the image size of the first one."""
    width, height = frames[0].width, frames[0].height
    intrinsics_px = np.stack([frame.intrinsics_at(width, height) for frame in frames])
    return Cameras(np.stack([frame.w2c for frame in frames]), intrinsics_px, width, height)
