"""Lenses that are no pinholes: how they distort pictures, and pinhole pictures made of distorted ones.

The formulas are those of OpenCV, whose coefficients COLMAP, nerfstudio and instant-ngp use: radial and
tangential distortion (Brown 1966), with a denominator in FULL_OPENCV, and the fisheye lens of Kannala and
Brandt (2006). A direction is given by the (x, y) where it meets the plane z = 1 of the camera.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from recon_torch.errors import UserError

WIDEST = math.tan(math.radians(60))  # how far off the axis an undistorted view reaches
MOST_ENLARGED = 8.0
BORDER_POINTS, RAY_POINTS = 33, 16  # where a view is tried: on each side, and from the axis to the border
BISECTIONS = 24


class Lens(NamedTuple):
    """A lens with distortion.

    Attributes:
        fisheye: whether a direction's distance to the axis grows with its angle, not with its tangent.
        radial: k1 ... k6; a fisheye has four.
        tangential: p1 and p2; none of a fisheye.
    """

    fisheye: bool
    radial: tuple[float, ...]
    tangential: tuple[float, float] = (0.0, 0.0)

    def distort(self, points: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        """Where the lens shows the directions that a pinhole shows at these points, in float64."""
        points = np.asarray(points, np.float64)
        x, y = points[..., 0], points[..., 1]
        squared = x * x + y * y
        if self.fisheye:
            radius = np.sqrt(squared)
            angle = np.arctan(radius)
            seen = angle * (1 + sum(k * angle ** (2 * n) for n, k in enumerate(self.radial, 1)))
            return points * np.where(radius > 1e-9, seen / np.maximum(radius, 1e-9), 1)[..., None]
        k1, k2, k3, k4, k5, k6 = self.radial
        p1, p2 = self.tangential
        factor = 1 + squared * (k1 + squared * (k2 + squared * k3))
        factor = factor / (1 + squared * (k4 + squared * (k5 + squared * k6)))
        return np.stack(
            [
                x * factor + 2 * p1 * x * y + p2 * (squared + 2 * x * x),
                y * factor + p1 * (squared + 2 * y * y) + 2 * p2 * x * y,
            ],
            -1,
        )


class Undistortion(NamedTuple):
    """What makes pinhole pictures of a lens's pictures.

    They have the size and the centre of those, and focal lengths that are `factor` times as long.
    """

    lens: Lens
    intrinsics: tuple[float, float, float, float]  # fx, fy, cx and cy of the distorted pictures
    factor: float

    def __call__(self, picture: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W C"]:
        """The picture as the pinhole shows it, bilinear."""
        rows_and_columns = _sources(*self, *picture.shape[:2])
        channels = [
            ndimage.map_coordinates(picture[..., channel], rows_and_columns, order=1, mode="nearest")
            for channel in range(picture.shape[-1])
        ]
        return np.stack(channels, -1)


@functools.lru_cache(maxsize=64)
def undo(lens: Lens, intrinsics: tuple[float, float, float, float], width: int, height: int) -> Undistortion:
    """The undistortion whose pictures show as much as they can, and nothing that the distorted ones do not.

    They reach at most 60 degrees off the axis, or the middle of a fisheye's pictures would be tiny.

    Args:
        intrinsics: fx, fy, cx and cy of the distorted pictures.
        width, height: their size in pixels.

    Raises:
        UserError: there is none, as where a lens shows most directions twice.
    """
    fx, fy, cx, cy = intrinsics
    ticks = np.linspace(0, 1, BORDER_POINTS)
    sides = [(ticks, 0 * ticks), (ticks, 0 * ticks + 1), (0 * ticks, ticks), (0 * ticks + 1, ticks)]
    border = np.concatenate([np.stack([x * width - cx, y * height - cy], -1) for x, y in sides]) / [fx, fy]
    steps = np.append(np.linspace(0, 1, RAY_POINTS + 1), 1.001)  # the last tells where rays turn back
    rays = steps[:, None, None] * border

    def fits(factor: float) -> bool:
        with np.errstate(all="ignore"):  # coefficients may be anything; NaN does not fit
            distorted = lens.distort(rays / factor)
            outwards = np.diff(np.linalg.norm(distorted, axis=-1), axis=0) > -1e-12
            pixels = distorted[:-1] * [fx, fy] + [cx, cy]
            inside = (pixels >= -1e-6) & (pixels <= [width + 1e-6, height + 1e-6])
        return bool(outwards.all() and inside.all())

    low = float(np.linalg.norm(border, axis=-1).max()) / WIDEST
    high = max(1.0, low)
    while not fits(high):
        low, high = high, 1.25 * high
        if high > MOST_ENLARGED:
            raise UserError("lens distortion this strong cannot be undone; undistort the images")
    if fits(low):
        return Undistortion(lens, intrinsics, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return Undistortion(lens, intrinsics, high)


@functools.lru_cache(maxsize=1)  # many pictures have one lens, and this takes longer than the rest
def _sources(
    lens: Lens, intrinsics: tuple[float, float, float, float], factor: float, height: int, width: int
) -> Float[np.ndarray, "2 H W"]:
    """The row and the column of the distorted picture that each pixel shows."""
    fx, fy, cx, cy = intrinsics
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    points = np.stack([(columns - cx) / (factor * fx), (rows - cy) / (factor * fy)], -1)
    distorted = lens.distort(points)
    return np.stack([distorted[..., 1] * fy + cy, distorted[..., 0] * fx + cx]) - 0.5
