"""Cameras on an orbit, and their file form: nerfstudio's transforms.json (Sec. 3.1: K views, 2 pi / K apart).

World: right-handed, +Z up. A camera in memory is an OpenCV world-to-camera matrix (x right, y down, z
forward), with pixel intrinsics, pixel centres at +0.5; in files an OpenGL camera-to-world matrix (x right,
y up, z backward). NumPy only, so that both the JAX and the PyTorch half can use it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.export import write_json

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LENS_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclass(frozen=True)
class Cameras:
    """K pinhole cameras that share an image size.

    Attributes:
        w2c: OpenCV world-to-camera matrices.
        intrinsics_px: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels.
        width, height: image size in pixels.
    """

    w2c: Float[np.ndarray, "K 4 4"]
    intrinsics_px: Float[np.ndarray, "K 3 3"]
    width: int
    height: int

    def __post_init__(self):
        num_views = len(self.w2c)
        if self.w2c.shape != (num_views, 4, 4) or self.intrinsics_px.shape != (num_views, 3, 3):
            raise ValueError(
                f"w2c {self.w2c.shape} and intrinsics_px {self.intrinsics_px.shape} must be [K,4,4], [K,3,3]"
            )

    def __len__(self) -> int:
        return len(self.w2c)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Cameras:
        """The chosen cameras, always as `Cameras` (an int gives one camera, K = 1)."""
        chosen = np.arange(len(self))[index]
        chosen = np.atleast_1d(chosen)
        return Cameras(self.w2c[chosen], self.intrinsics_px[chosen], self.width, self.height)

    @property
    def positions(self) -> Float[np.ndarray, "K 3"]:
        """Camera centres in the world."""
        rotation, translation = self.w2c[:, :3, :3], self.w2c[:, :3, 3]
        return -np.einsum("kji,kj->ki", rotation, translation)

    def resized(self, width: int, height: int) -> Cameras:
        """The same cameras on another pixel grid."""
        scale = np.array([[width / self.width], [height / self.height], [1.0]], np.float32)
        return Cameras(self.w2c, self.intrinsics_px * scale, width, height)


def orbit(
    num_views: int = 16,
    elevation_rad: float | Float[np.ndarray, " K"] = 0.0,
    size: int = 64,
    *,
    radius: float = 2.0,
    fov_deg: float = 33.8,
    azimuths_rad: Float[np.ndarray, " K"] | None = None,
) -> Cameras:
    """Cameras that look at the origin from r (cos e cos a, cos e sin a, sin e).

    Args:
        num_views: K; ignored where azimuths_rad is given.
        elevation_rad: one for all views, or one for each.
        size: side of the square image in pixels.
        radius: distance to the origin.
        fov_deg: vertical (and horizontal) field of view.
        azimuths_rad: default 2 pi k / K, counter-clockwise seen from above; view 0 at azimuth 0.
    """
    if azimuths_rad is None:
        azimuths_rad = 2 * np.pi * np.arange(num_views) / num_views
    azimuth, elevation = np.broadcast_arrays(np.asarray(azimuths_rad, np.float64), np.float64(elevation_rad))
    cos_a, sin_a, cos_e, sin_e = np.cos(azimuth), np.sin(azimuth), np.cos(elevation), np.sin(elevation)

    right = np.stack([-sin_a, cos_a, np.zeros_like(azimuth)], -1)
    down = np.stack([sin_e * cos_a, sin_e * sin_a, -cos_e], -1)
    forward = np.stack([-cos_e * cos_a, -cos_e * sin_a, -sin_e], -1)
    w2c = np.tile(np.eye(4), (len(azimuth), 1, 1))
    w2c[:, :3, :3] = np.stack([right, down, forward], 1)
    w2c[:, 2, 3] = radius  # the origin lies straight ahead of every camera

    focal_px = 0.5 * size / math.tan(math.radians(fov_deg) / 2)
    intrinsics_px = np.array([[focal_px, 0, size / 2], [0, focal_px, size / 2], [0, 0, 1]])
    intrinsics_px = np.tile(intrinsics_px, (len(azimuth), 1, 1))
    return Cameras(w2c.astype(np.float32), intrinsics_px.astype(np.float32), size, size)


def write_transforms(path: str | os.PathLike, cameras: Cameras, image_names: Sequence[str], **extra) -> None:
    """Writes nerfstudio's transforms.json.

    Args:
        path: the json file.
        cameras: K cameras. Intrinsics that all share are written once, others on each frame.
        image_names: K image paths relative to the json's folder.
        extra: further top-level entries (JSON values).
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


def read_transforms(path: str | os.PathLike) -> tuple[Cameras, list[Path]]:
    """Reads nerfstudio's transforms.json, or the original NeRF's (camera_angle_x, names without a suffix).

    Returns:
        The cameras, and each frame's image path relative to the json's folder.

    Raises:
        UserError: the file is missing, is not JSON, has no frames, lacks an image, or has unusable cameras.
    """
    path = Path(path)
    content = load_transforms_json(path)
    frames = content["frames"]
    image_paths = [_image_path(path, frame, index) for index, frame in enumerate(frames)]
    sizes = {_size_px(path, content, frame, image) for frame, image in zip(frames, image_paths, strict=True)}
    if len(sizes) > 1:
        raise UserError(f"{path}: frames have different sizes {sorted(sizes)}; resize the images to one size")
    width, height = sizes.pop()
    w2c = np.stack([_w2c(path, frame, index) for index, frame in enumerate(frames)])
    intrinsics_px = np.stack([_intrinsics(path, content | frame, width, height) for frame in frames])
    return Cameras(w2c, intrinsics_px, width, height), image_paths


def load_transforms_json(path: Path) -> dict:
    """The parsed file, with "frames" known to be a list of objects that is not empty."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a directory of views needs a transforms.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise UserError(f"{path} has no frames; it needs a list of file_path and transform_matrix")
    return content


def _intrinsics_entry(matrix: np.ndarray) -> dict[str, float]:
    return {
        "fl_x": float(matrix[0, 0]),
        "fl_y": float(matrix[1, 1]),
        "cx": float(matrix[0, 2]),
        "cy": float(matrix[1, 2]),
    }


def _image_path(path: Path, frame: dict, index: int) -> Path:
    name = frame.get("file_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: frame {index} has no file_path")
    for candidate in (name, *(name + suffix for suffix in IMAGE_SUFFIXES)):
        if (path.parent / candidate).is_file():
            return Path(candidate)
    raise UserError(f"{path}: frame {index}: image {name} does not exist")


def _size_px(path: Path, content: dict, frame: dict, image: Path) -> tuple[int, int]:
    sizes = content | frame
    if "w" not in sizes or "h" not in sizes:
        from PIL import Image  # only the original NeRF's files need it: they do not say the size

        try:
            with Image.open(path.parent / image) as opened:
                return opened.size
        except OSError:
            raise UserError(f"{path.parent / image} cannot be read as an image") from None
    width, height = _number(path, sizes, "w"), _number(path, sizes, "h")
    if not (width >= 1 and height >= 1 and width.is_integer() and height.is_integer()):
        raise UserError(f"{path}: the image size w={width:g}, h={height:g} is not a positive whole number")
    return int(width), int(height)


def _number(path: Path, entries: dict, key: str) -> float:
    value = entries.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {key} is {value!r}, not a finite number")
    return float(value)


def _intrinsics(path: Path, entries: dict, width: int, height: int) -> np.ndarray:
    bent = [key for key in LENS_DISTORTION if entries.get(key)]
    if bent:
        raise UserError(f"{path}: lens distortion ({', '.join(bent)}) is not supported; undistort the images")
    if "fl_x" in entries:
        fx = _number(path, entries, "fl_x")
    elif "camera_angle_x" in entries:
        fx = 0.5 * width / math.tan(_number(path, entries, "camera_angle_x") / 2)
    else:
        raise UserError(f"{path} has neither fl_x (pixels) nor camera_angle_x (radians)")
    fy = _number(path, entries, "fl_y") if "fl_y" in entries else fx
    if fx <= 0 or fy <= 0:
        raise UserError(f"{path}: the focal length ({fx:g}, {fy:g}) px must be positive")
    cx = _number(path, entries, "cx") if "cx" in entries else width / 2
    cy = _number(path, entries, "cy") if "cy" in entries else height / 2
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32)


def _w2c(path: Path, frame: dict, index: int) -> np.ndarray:
    try:
        c2w = np.asarray(frame.get("transform_matrix"), np.float64)
    except (TypeError, ValueError):
        c2w = np.zeros(0)
    where = f"{path}: frame {index}: transform_matrix"
    if c2w.shape != (4, 4):
        raise UserError(f"{where} is missing or is not 4x4")
    if not np.isfinite(c2w).all():
        raise UserError(f"{where} has values that are not finite")
    rotation = c2w[:3, :3]
    if abs(np.linalg.det(rotation)) < 1e-6:
        raise UserError(f"{where} is singular")
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise UserError(f"{where} is not a rotation and a translation; remove its scale or mirroring")
    return np.linalg.inv(c2w @ OPENGL_FROM_OPENCV).astype(np.float32)
