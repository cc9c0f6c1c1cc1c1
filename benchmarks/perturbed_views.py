"""Views changed one by one as a video model's are: no two of them show quite the same object.

Each view is warped smoothly, tinted and blurred by amounts of its own; every third loses what is thin.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from recon_torch.views.directory import Views

WARP_SHARE, WARP_CELLS = 0.012, 4  # standard deviation by the side; knots of the smooth field per side
GAIN, TINT = 0.08, 0.04  # standard deviations, of brightness and of each channel
LARGEST_BLUR_SHARE = 0.008  # standard deviation by the side
THIN_SHARE = 0.06  # parts that an opening of this share of the side removes are thin
LOSES_THIN_PARTS_EVERY = 3


def perturb(views: Views, seed: int = 0) -> Views:
    """The same cameras with pictures and masks that disagree."""
    pictures = np.concatenate([views.images, views.masks], -1)
    changed = [_perturb(picture, index, seed) for index, picture in enumerate(pictures)]
    images, masks = np.split(np.stack(changed).astype(np.float32), [3], -1)
    return dataclasses.replace(views, images=images, masks=masks)


def _perturb(picture: Float[np.ndarray, "H W 4"], index: int, seed: int) -> Float[np.ndarray, "H W 4"]:
    generator, side = np.random.default_rng([seed, index]), len(picture)
    if index % LOSES_THIN_PARTS_EVERY == 0:
        picture = _without_thin_parts(picture, THIN_SHARE * side)
    picture = _warped(picture, generator, WARP_SHARE * side)
    sigma = generator.uniform(0, LARGEST_BLUR_SHARE * side)
    picture = ndimage.gaussian_filter(picture, (sigma, sigma, 0))
    rgb, mask = picture[..., :3], picture[..., 3:]
    tint = (1 + generator.normal(0, GAIN)) * (1 + generator.normal(0, TINT, 3))
    rgb = np.clip((rgb - (1 - mask)) * tint, 0, mask) + 1 - mask  # tints the object, not the white behind it
    return np.concatenate([rgb, mask], -1)


def _without_thin_parts(picture: Float[np.ndarray, "H W 4"], width_px: float) -> Float[np.ndarray, "H W 4"]:
    rows, columns = np.mgrid[: len(picture), : len(picture)] - len(picture) // 2
    radius = width_px / 2
    disk = (rows**2 + columns**2 <= radius**2)[abs(rows[:, 0]) <= radius][:, abs(columns[0]) <= radius]
    core = ndimage.binary_opening(picture[..., 3] > 0.5, disk)
    # Edges keep their soft pixels: thin is what lies further from the core than those.
    kept = ndimage.binary_dilation(core, iterations=2)[..., None]
    return np.where(kept, picture, np.array([1.0, 1.0, 1.0, 0.0]))


def _warped(
    picture: Float[np.ndarray, "H W 4"], generator: np.random.Generator, strength_px: float
) -> Float[np.ndarray, "H W 4"]:
    """Moved by a smooth random field with that standard deviation."""
    height, width = picture.shape[:2]
    knots = generator.normal(0, strength_px, (2, WARP_CELLS, WARP_CELLS))
    zoom = (1, height / WARP_CELLS, width / WARP_CELLS)
    places = np.mgrid[:height, :width] + ndimage.zoom(knots, zoom, order=3, mode="nearest")
    channels = [ndimage.map_coordinates(picture[..., i], places, order=1, mode="nearest") for i in range(4)]
    return np.stack(channels, -1)
