"""The visual hull (Laurentini 1994): what no mask of an object rules out, on a grid of points. NumPy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int8, Int64
from scipy import ndimage

from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras

FOREGROUND = 0.5  # coverage from which a pixel belongs to the object
OBJECTIONS_ONE_IN = 8  # so many of the views may be wrong about a point nearly inside


def grid(half_width: float, num_cells: int) -> Float[np.ndarray, "N 3"]:
    """The centres of num_cells^3 cells of a cube around the origin."""
    ticks = (np.arange(num_cells) + 0.5) / num_cells * 2 * half_width - half_width
    return np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)


def verdicts(
    points: Float[np.ndarray, "N 3"],
    cameras: Cameras,
    masks: Float[np.ndarray, "K H W 1"],
    reach: float,
) -> Int8[np.ndarray, "K N"]:
    """What each view says of each point: 1 for foreground within `reach` (world units) of it, -1 for none.

    Outside of its picture it is -1, too, or 0 if the object may go on there, as the mask touches the border.
    With half a cell's diagonal as reach, parts of the object that are thinner than a cell stay.
    """
    return np.stack([_verdicts(points, cameras[k], masks[k, ..., 0], reach) for k in range(len(cameras))])


def hull(verdicts: Int8[np.ndarray, "K N"], max_objections: int = 0) -> Bool[np.ndarray, " N"]:
    """The points that no view rules out, or so many at most, and at least half of the views see."""
    objections, supporters = (verdicts < 0).sum(0), (verdicts > 0).sum(0)
    return (objections <= max_objections) & (supporters >= len(verdicts) / 2)


def nearly_inside(
    points: Float[np.ndarray, "N 3"], cameras: Cameras, masks: Float[np.ndarray, "K H W 1"], reach: float
) -> Bool[np.ndarray, " N"]:
    """The points within `reach` of the hull, by all but a few views: generated ones never agree on edges."""
    found = verdicts(points, cameras, masks, reach)
    return hull(found, max_objections=len(cameras) // OBJECTIONS_ONE_IN)


def _verdicts(
    points: Float[np.ndarray, "N 3"], camera: Cameras, mask: Float[np.ndarray, "H W"], reach: float
) -> Int8[np.ndarray, " N"]:
    pixels, depths, seen = _project(points, camera)
    foreground = mask > FOREGROUND
    to_foreground_px = ndimage.distance_transform_edt(~foreground) if foreground.any() else mask + np.inf
    columns, rows = pixels[seen].T
    reach_px = reach * camera.intrinsics_px[0, 0, 0] / depths[seen]
    found = np.full(len(points), -1 if masks_.problem(mask[..., None]) is None else 0, np.int8)
    found[seen] = np.where(to_foreground_px[rows, columns] <= reach_px + 0.5, 1, -1)
    return found


def _project(
    points: Float[np.ndarray, "N 3"], camera: Cameras
) -> tuple[Int64[np.ndarray, "N 2"], Float[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Column and row of each point's pixel, its depth along the camera's z, whether it is in the picture."""
    w2c, intrinsics = camera.w2c[0].astype(np.float64), camera.intrinsics_px[0].astype(np.float64)
    local = points @ w2c[:3, :3].T + w2c[:3, 3]
    depths = local[:, 2]
    in_front = depths > 0
    pixels = (local @ intrinsics.T)[:, :2] / np.where(in_front, depths, 1.0)[:, None]
    seen = in_front & (pixels >= 0).all(1) & (pixels < [camera.width, camera.height]).all(1)
    return np.where(seen[:, None], pixels, 0).astype(np.int64), depths, seen
