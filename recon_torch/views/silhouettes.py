"""Foreground masks of several views, compared by the visual hull that they have in common."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from recon_torch.views import hull, world
from recon_torch.views.cameras import Cameras

STRAY = 0.5  # a piece of a mask is none of the object if the other masks allow less than this share of it
# Shares of a mask that lie where the other masks allow the object. Good views have all of it there; swapped
# views 85 to 98%, less if the sides of the object differ more.
CONTRADICTED, EXPLAINED = 0.93, 0.98
AGREED = 0.8  # least mean share of the masks that the other masks allow, for masks that are right


class Compared(NamedTuple):
    """Masks without the pieces that other views do not allow.

    Attributes:
        masks: without these pieces.
        cleaned: the views that had any.
        shares: of each mask, what lies where the other masks allow the object.
    """

    masks: Float[np.ndarray, "K H W 1"]
    cleaned: list[int]
    shares: Float[np.ndarray, " K"]

    @property
    def agreement(self) -> float:
        return float(self.shares.mean())


def compare(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> Compared:
    """Compares the masks of views, and removes from each the pieces that the other masks do not allow.

    The largest piece of each mask stays: if it is elsewhere, its camera may be what is wrong.

    Raises UserError if the cameras have no focus.
    """
    allowed = allowed_places(cameras, masks)
    cut = [_without_strays(mask, place) for mask, place in zip(masks, allowed, strict=True)]
    cleaned = [index for index, mask in enumerate(masks) if (cut[index] != mask).any()]
    inside = np.stack(cut)[..., 0] > hull.FOREGROUND
    shares = (inside & allowed).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)
    return Compared(np.stack(cut), cleaned, shares)


def allowed_places(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> Bool[np.ndarray, "K H W"]:
    """The pixels of each view where the object may be by all masks but a few, up to half a cell's diagonal.

    Raises UserError if the cameras have no focus.
    """
    unit = world.of_cameras(cameras).cameras(cameras)
    points = hull.grid(world.SEARCHED_HALF_WIDTH, world.SEARCHED_CELLS)
    found = hull.verdicts(points, unit, masks, world.REACH)
    # One bad view among many must not speak against the others.
    points = points[hull.hull(found, max_objections=-(-len(found) // hull.OBJECTIONS_ONE_IN))]
    return np.stack([hull.reached(points, unit[k], world.REACH) for k in range(len(unit))])


def _without_strays(
    mask: Float[np.ndarray, "H W 1"], allowed: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W 1"]:
    pieces, count = ndimage.label(mask[..., 0] > 0, np.ones((3, 3)))
    numbers = np.arange(1, count + 1)
    areas = ndimage.sum_labels(mask[..., 0], pieces, numbers)
    stray = np.array(ndimage.mean(allowed, pieces, numbers)) < STRAY
    if count < 2 or not (stray & (areas < areas.max())).any():
        return mask
    gone = numbers[stray & (areas < areas.max())]
    return np.where(np.isin(pieces, gone)[..., None], 0, mask).astype(np.float32)
