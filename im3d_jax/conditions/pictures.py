"""A user's picture as view 0: its object is found, cut out, centred and scaled (Sec. 3.1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.files import check_regular
from recon_torch.views import masks
from recon_torch.views.images import read_image

SMALLEST_SIDE_PX, MOST_ELONGATED = 8, 100
"""Of a picture: its shorter side, and how many times as long the longer one is at most."""

PLAIN_BORDER = 0.5
"""A background is plain if at least this share of the picture's border has one colour."""


def load_image(
    path: str | Path, size: int, fill: float, background_tolerance: float, mask_weights: str = ""
) -> tuple[Float[np.ndarray, "{size} {size} 3"], Float[np.ndarray, "{size} {size} 1"]]:
    """Reads a picture and makes it view 0, see `place`. Raises UserError also for what cannot be read."""
    check_regular(path)
    return place(read_image(path), str(path), size, fill, background_tolerance, mask_weights)


def place(
    picture: Float[np.ndarray, "H W C"],
    name: str,
    size: int,
    fill: float,
    background_tolerance: float,
    mask_weights: str = "",
) -> tuple[Float[np.ndarray, "{size} {size} 3"], Float[np.ndarray, "{size} {size} 1"]]:
    """Makes a picture view 0: its object over white, centred, as large as the objects of training views.

    The object's mask is the picture's alpha. Without alpha it is what differs from a plain background, and
    without a plain background it is what IS-Net finds.

    Args:
        picture: RGB or RGBA in [0, 1].
        name: what errors call the picture.
        size: side of the square result in pixels.
        fill: share of the result's side that the object's longer side gets.
        background_tolerance: difference from the background, in [0, 1], from which a pixel is foreground.
        mask_weights: IS-Net's .onnx file, see `masks.isnet_masks`; "" for none.

    Returns (rgb, alpha), float32 in [0, 1]. Raises UserError if the picture holds no foreground, or has
    neither alpha nor a plain background and there are no mask weights.
    """
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST_SIDE_PX or max(height, width) > MOST_ELONGATED * min(height, width):
        raise UserError(
            f"{name} has {width} x {height} pixels; give a picture of at least {SMALLEST_SIDE_PX} x"
            f" {SMALLEST_SIDE_PX} that is not more than {MOST_ELONGATED} times as long as wide"
        )
    rgb, alpha = picture[..., :3], picture[..., 3:]
    if not alpha.size or alpha.min() > 0.99:
        alpha = _foreground(rgb, name, background_tolerance, mask_weights)
    rows, columns = (np.flatnonzero(alpha[..., 0].max(axis) > 0.5) for axis in (1, 0))
    if not rows.size:
        raise UserError(f"{name} shows no object; give one with alpha or on a plain background")
    middle = np.array([rows[0] + rows[-1] + 1, columns[0] + columns[-1] + 1]) / 2
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    premultiplied = np.concatenate([rgb * alpha, alpha], -1)
    cut = _cut_square(premultiplied, middle, side / fill, size)
    return cut[..., :3] + 1 - cut[..., 3:], cut[..., 3:]


def _foreground(
    rgb: Float[np.ndarray, "H W 3"], name: str, tolerance: float, mask_weights: str
) -> Float[np.ndarray, "H W 1"]:
    """The foreground mask of a picture without alpha, whose object may touch much of the border."""
    background = masks.plain_background(rgb, tolerance, PLAIN_BORDER)
    if background is not None:
        return masks.threshold_masks(rgb[None], background, tolerance)[0]
    if not mask_weights:
        raise UserError(f"{name} has neither a plain background nor alpha; cut the object out as RGBA")
    return masks.isnet_masks(rgb[None], mask_weights)[0]


def _cut_square(
    picture: Float[np.ndarray, "H W C"], middle: Float[np.ndarray, " 2"], side: float, size: int
) -> Float[np.ndarray, "{size} {size} C"]:
    """Cuts out a square of `side` pixels around `middle` (row, column) and scales it to `size`.

    What lies beyond the picture is empty.
    """
    corner = np.floor(middle - side / 2).astype(int)
    extent = int(np.ceil(side)) + 1
    first, last = np.maximum(corner, 0), np.minimum(corner + extent, picture.shape[:2])
    window = np.zeros((extent, extent, picture.shape[-1]), np.float32)
    inside = tuple(slice(a, b) for a, b in zip(first - corner, last - corner, strict=True))
    window[inside] = picture[first[0] : last[0], first[1] : last[1]]
    top, left = middle - side / 2 - corner
    box = (left, top, left + side, top + side)
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BOX, box=box))
        for channel in np.moveaxis(window, -1, 0)
    ]
    return np.stack(channels, -1).clip(0, 1)
