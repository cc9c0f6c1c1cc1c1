"""A user's picture as view 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.views import masks
from recon_torch.views.images import read_image

PLAIN_BORDER = 0.5  # share of the border that has one colour where the background is plain


def load_image(
    path: str | Path, size: int, fill: float, background_tolerance: float, mask_weights: str = ""
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size 1"]]:
    """A user's picture as view 0, see `place`. Raises UserError also if the file cannot be read."""
    return place(read_image(path), str(path), size, fill, background_tolerance, mask_weights)


def place(
    picture: Float[np.ndarray, "H W C"],
    name: str,
    size: int,
    fill: float,
    background_tolerance: float,
    mask_weights: str = "",
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size 1"]]:
    """A picture as view 0: its object over white, centred, as large as those of the training views.

    The object is where alpha says; without alpha, where colours differ from the plain background; without
    a plain background, where IS-Net says.

    Args:
        picture: RGB or RGBA in [0, 1]. name: what errors call it.
        size: side of the square result in pixels.
        fill: share of the picture's side that the object's longer side gets.
        background_tolerance: difference from the background in [0, 1] that makes a pixel foreground.
        mask_weights: IS-Net's .onnx file, see `masks.isnet_masks`; "" for none.

    Returns (rgb, alpha), float32 in [0, 1]. Raises UserError if the picture holds no foreground, or has
    neither alpha nor a plain background and there are no mask weights.
    """
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


def _foreground(rgb: np.ndarray, name: str, tolerance: float, mask_weights: str) -> np.ndarray:
    """Foreground [H, W, 1] of a picture without alpha, which may touch much of the border."""
    background = masks.plain_background(rgb, tolerance, PLAIN_BORDER)
    if background is not None:
        return masks.threshold_masks(rgb[None], background, tolerance)[0]
    if not mask_weights:
        raise UserError(f"{name} has neither a plain background nor alpha; cut the object out as RGBA")
    return masks.isnet_masks(rgb[None], mask_weights)[0]


def _cut_square(picture: np.ndarray, middle: np.ndarray, side: float, size: int) -> np.ndarray:
    """The square [size, size, C] of `side` pixels around `middle` (row, column), empty beyond the picture."""
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
