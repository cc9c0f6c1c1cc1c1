"""Cameras on an orbit, and their file form: nerfstudio's transforms.json (Sec. 3.1: K views, 2 pi / K apart).

World: right-handed, +Z up. A camera in memory is an OpenCV world-to-camera matrix (x right, y down, z
forward), with pixel intrinsics, pixel centres at +0.5; in files an OpenGL camera-to-world matrix (x right,
y up, z backward). NumPy only, so that both the JAX and the PyTorch half can use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


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
        if self.width < 1 or self.height < 1:
            raise ValueError(f"the image size must be positive, got {self.width} x {self.height}")

    def __len__(self) -> int:
        return len(self.w2c)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Cameras:
        """The chosen cameras, always as `Cameras` (an int gives one camera, K = 1)."""
        chosen = np.arange(len(self))[index]
        chosen = np.atleast_1d(chosen)
        return Cameras(self.w2c[chosen], self.intrinsics_px[chosen], self.width, self.height)

    @property
    def positions(self) -> Float[np.ndarray, "K 3"]:
        """Camera centres in the world, float64."""
        # Not by the transpose: rotations in files have six digits, which is too few far from the origin.
        return np.linalg.inv(self.w2c.astype(np.float64))[:, :3, 3]

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
