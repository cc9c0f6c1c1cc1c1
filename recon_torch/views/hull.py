"""The visual hull of an object (Laurentini 1994): the points that no foreground mask rules out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int8
from scipy import ndimage

from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras

FOREGROUND = 0.5  # coverage from which a pixel belongs to the object
OBJECTIONS_ONE_IN = 8  # one view in so many may be wrong about a point that is nearly inside


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
    """What each view says of each point: 1 if there is foreground within `reach` of it, -1 if there is none.

    A point outside of the image gets -1 too, or 0 where the mask touches the border, because the object may
    go on there. Parts of the object that are thinner than a cell stay if the reach is half a cell's diagonal.

    Args:
        masks: coverage in [0, 1].
        reach: a distance in world units.
    """
    return np.stack([_verdicts(points, cameras[k], masks[k, ..., 0], reach) for k in range(len(cameras))])


def hull(verdicts: Int8[np.ndarray, "K N"], max_objections: int = 0) -> Bool[np.ndarray, " N"]:
    """The points that at least half of the views support and at most `max_objections` views rule out."""
    objections, supporters = (verdicts < 0).sum(0), (verdicts > 0).sum(0)
    return (objections <= max_objections) & (supporters >= len(verdicts) / 2)


def nearly_inside(
    points: Float[np.ndarray, "N 3"], cameras: Cameras, masks: Float[np.ndarray, "K H W 1"], reach: float
) -> Bool[np.ndarray, " N"]:
    """The points within `reach` of the hull of all views but a few, as generated views disagree at edges.

    reach: a distance in world units.
    """
    found = verdicts(points, cameras, masks, reach)
    return hull(found, max_objections=len(cameras) // OBJECTIONS_ONE_IN)


def reached(points: Float[np.ndarray, "N 3"], camera: Cameras, reach: float) -> Bool[np.ndarray, "H W"]:
    """The pixels of one camera within `reach`, a distance in world units, of the projection of a point."""
    (pixels,), (depths,), _ = camera.project(points)
    # A point less than a pixel outside of the image explains the pixel at its border.
    inside = (depths > 0) & ((pixels > -1) & (pixels < [camera.width, camera.height])).all(-1)
    empty = np.ones((camera.height, camera.width), bool)
    if not inside.any():
        return ~empty
    columns, rows = pixels[inside].astype(np.int64).T
    empty[rows, columns] = False
    reach_px = reach * camera.intrinsics_px[0, 0, 0] / np.median(depths[depths > 0])
    return ndimage.distance_transform_edt(empty) <= reach_px + 1


def _verdicts(
    points: Float[np.ndarray, "N 3"], camera: Cameras, mask: Float[np.ndarray, "H W"], reach: float
) -> Int8[np.ndarray, " N"]:
    (pixels,), (depths,), (seen,) = camera.project(points)
    foreground = mask > FOREGROUND
    to_foreground_px = ndimage.distance_transform_edt(~foreground) if foreground.any() else mask + np.inf
    columns, rows = pixels[seen].astype(np.int64).T
    reach_px = reach * camera.intrinsics_px[0, 0, 0] / depths[seen]
    found = np.full(len(points), -1 if masks_.problem(mask[..., None]) is None else 0, np.int8)
    found[seen] = np.where(to_foreground_px[rows, columns] <= reach_px + 0.5, 1, -1)
    return found
