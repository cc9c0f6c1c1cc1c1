"""Pinhole cameras, and orbits of them (Sec. 3.1: K views, 2 pi / K apart).

The world is right-handed with +Z up. A camera is an OpenCV world-to-camera matrix (x right, y down, z
forward) with pixel intrinsics, where pixel centres lie at +0.5. `transforms` reads and writes cameras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Projected(NamedTuple):
    """N points as K cameras see them."""

    pixels: Float[np.ndarray, "K N 2"]  # column and row; without meaning where the depth is not positive
    depths: Float[np.ndarray, "K N"]  # along each camera's z
    seen: Bool[np.ndarray, "K N"]  # in front of the camera and inside its image


@dataclass(frozen=True)
class Cameras:
    """K pinhole cameras that share an image size.

    Attributes:
        w2c: OpenCV world-to-camera matrices, float32, or float64 in worlds that are large.
        intrinsics_px: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels.
        width, height: size of the images in pixels.

    Raises:
        ValueError: arrays of other shapes, or a size that is not positive.
    """

    w2c: Float[np.ndarray, "K 4 4"]
    intrinsics_px: Float[np.ndarray, "K 3 3"]
    width: int
    height: int

    def __post_init__(self) -> None:
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
        """The chosen cameras. One index gives `Cameras` too, with K = 1."""
        chosen = np.arange(len(self))[index]
        chosen = np.atleast_1d(chosen)
        return Cameras(self.w2c[chosen], self.intrinsics_px[chosen], self.width, self.height)

    @property
    def positions(self) -> Float[np.ndarray, "K 3"]:
        """Camera centres in the world, float64."""
        # Rotations in files may have six digits: their transpose is not a good enough inverse of them.
        return np.linalg.inv(self.w2c.astype(np.float64))[:, :3, 3]

    def project(self, points: Float[np.ndarray, "N 3"]) -> Projected:
        """Where points of the world fall into each image, computed in float64."""
        pixels, depths = [], []
        for w2c, intrinsics in zip(self.w2c.astype(np.float64), self.intrinsics_px, strict=True):
            local = points @ w2c[:3, :3].T + w2c[:3, 3]
            depth = local[:, 2:]
            pixels.append((local @ intrinsics.astype(np.float64).T)[:, :2] / np.where(depth > 0, depth, 1.0))
            depths.append(depth[:, 0])
        columns_and_rows, along_z = np.stack(pixels), np.stack(depths)
        inside = (columns_and_rows >= 0) & (columns_and_rows < [self.width, self.height])
        return Projected(columns_and_rows, along_z, (along_z > 0) & inside.all(-1))

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
        num_views: K; ignored where `azimuths_rad` is given.
        elevation_rad: e, one for all views or one for each.
        size: side of the square images in pixels.
        radius: r, the distance to the origin.
        fov_deg: vertical and horizontal field of view.
        azimuths_rad: a; by default 2 pi k / K, counter-clockwise seen from above, with view 0 at azimuth 0.
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
