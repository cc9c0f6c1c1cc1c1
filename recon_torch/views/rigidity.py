"""How far the masks of views are from those of one rigid object, as a generator may let an object move.

Every pixel of a mask needs a place along its ray that the masks of the other views allow, too (Laurentini's
visual hull, 1994). Where an object moves during the orbit, its parts stick out of that hull. Unspecified in
the paper, which names the failure (A.4).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int64
from scipy import ndimage

from recon_torch.views import hull, world
from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras
from recon_torch.views.resizing import resize

COMPARED_PX = 64  # height of the masks that are compared, which bounds the time
CELLS = 44  # along the diameter of the searched ball, so that a cell is about a pixel of these masks
MARGIN = 1.1  # of that ball around what the masks show
FEWEST_VIEWS = 4  # of fewer views, the hull is too wide to contradict anything
FARTHEST = 0.99  # share of a mask's pixels that are nearer to the object than what is said of the mask


def excursions(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> Float32[np.ndarray, " K"]:
    """By how much the mask of each view sticks out of the object that the other masks allow.

    It is the distance of the farthest pixels but 1% of the mask, as a share of the object's diameter; 0 for
    views without foreground, and for fewer than `FEWEST_VIEWS` views. One view in `hull.OBJECTIONS_ONE_IN`,
    and at least one, may be wrong about a place without a word from the others.

    Args:
        masks: coverage in [0, 1].

    Raises:
        UserError: the cameras have no focus.
    """
    found = np.zeros(len(cameras), np.float32)
    if len(cameras) < FEWEST_VIEWS:
        return found
    stretched = np.median(cameras.intrinsics_px[:, 1, 1] / cameras.intrinsics_px[:, 0, 0])
    width = max(1, round(cameras.width * COMPARED_PX / cameras.height * stretched))  # pixels are square then
    small = np.stack([resize(mask.astype(np.float32), width, COMPARED_PX) for mask in masks])
    cameras = world.of_cameras(cameras).cameras(cameras).resized(width, COMPARED_PX)
    radius = _radius(cameras, small)
    if radius == 0:
        return found
    ball = hull.grid(radius, CELLS)
    ball = ball[np.linalg.norm(ball, axis=-1) <= radius]
    pixels, outside = _outside(ball, cameras, small)
    others = _objections_of_others(outside, max(1, len(cameras) // hull.OBJECTIONS_ONE_IN))
    for view, objection in enumerate(others):
        nearest = np.full(small[view].size, np.inf, np.float32)
        np.minimum.at(nearest, pixels[view], objection)
        # A pixel's own ray may pass between the centres of cells.
        nearest = ndimage.minimum_filter(nearest.reshape(small[view].shape[:2]), 3)
        inside = nearest[(small[view, ..., 0] > hull.FOREGROUND) & np.isfinite(nearest)]
        if len(inside):
            found[view] = np.quantile(inside, FARTHEST) * MARGIN / (2 * radius)
    return found


def _radius(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> float:
    """Of a ball around the origin that nothing the masks show reaches out of; 0 if they show nothing."""
    rows, columns = np.mgrid[: cameras.height, : cameras.width] + 0.5
    largest = 0.0
    for mask, intrinsics, position in zip(masks, cameras.intrinsics_px, cameras.positions, strict=True):
        foreground = mask[..., 0] > hull.FOREGROUND
        x = (columns[foreground] - intrinsics[0, 2]) / intrinsics[0, 0]
        y = (rows[foreground] - intrinsics[1, 2]) / intrinsics[1, 1]
        widest = np.hypot(x, y).max(initial=0.0)
        largest = max(largest, np.linalg.norm(position) * widest)
    return MARGIN * largest


def _outside(
    points: Float[np.ndarray, "N 3"], cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]
) -> tuple[Int64[np.ndarray, "K N"], Float32[np.ndarray, "K N"]]:
    """The pixel that each view sees each point in, and how far outside of its mask the point is.

    A pixel is a number in its image; the distance is one in the world, at the origin's depth. A view says
    nothing of points behind it, or beside its image where its mask touches the border.
    """
    pixels, outside = [], []
    projected = cameras.project(points)
    for mask, places, seen, intrinsics, position in zip(
        masks, projected.pixels, projected.seen, cameras.intrinsics_px, cameras.positions, strict=True
    ):
        foreground = mask[..., 0] > hull.FOREGROUND
        height, width = foreground.shape
        columns, rows = places.astype(np.int64).clip(0, [width - 1, height - 1]).T
        distance_px = ndimage.distance_transform_edt(~foreground) if foreground.any() else 0 * mask[..., 0]
        distance = distance_px[rows, columns] * np.linalg.norm(position) / intrinsics[0, 0]
        if masks_.problem(mask) is not None:
            distance[~seen] = 0
        pixels.append(rows * width + columns)
        outside.append(distance.astype(np.float32))
    return np.stack(pixels), np.stack(outside)


def _objections_of_others(outside: Float32[np.ndarray, "K N"], ignored: int) -> Float32[np.ndarray, "K N"]:
    """The largest distance of each point to the masks of all other views, without the `ignored` largest."""
    largest = -np.sort(-outside, axis=0)[: ignored + 2]
    return np.where(outside >= largest[ignored], largest[ignored + 1], largest[ignored])
