"""Noise, blur and darkness of pictures, as far as they can be told from these."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from recon_torch.views.foreground.backdrop import LAPLACIAN

BLOCK_PX = 8  # side of the blocks in which noise is measured
QUIET = 0.25  # share of the blocks that are taken to have little but noise
FEWEST_BLOCKS = 8  # from which noise is told
SATURATED = 0.5 / 255  # a value so near to black or white may have been beyond it
CLIPPED = 0.2  # share of a block's values that are saturated, if the noise is cut off by that
MOST_HIDDEN = 3.0  # times the noise that is left is what can have been cut off
DEVIATION = 1.4826  # the standard deviation of a Gaussian by its median distance to the mean
EDGES = 0.98  # quantile of the gradient from which on a pixel is an edge
LEAST_EDGE = 0.02  # of the gradient, in [0, 1] per pixel
INSIDE = 0.99  # coverage of a pixel that shows nothing but the object
NOISY = 3.5 / 255  # noise of which something is said; good cameras and JPEG have less
BLURRED = 0.015  # blur by the height of which something is said
LEAST_BLUR_PX = 2.5  # with less, nothing is
DARK = 20 / 255  # of which hardly anything in a picture is brighter, if something is said
BRIGHTEST = 0.99  # quantile that stands for the brightest pixels
BEGINNING = "the views "  # of notes
MOST_MEASURED = 8  # views of a set that are measured


def remarks(picture: Float[np.ndarray, "H W 4"]) -> list[str]:
    """What is to be said of a picture, whose last channel is its mask, or NaN where it has none."""
    found = []
    sigma, blur = _measure(picture)
    if sigma > NOISY:
        found.append(f"it has noise of about {255 * sigma:.0f}/255")
    if _is_blurred(blur, len(picture)):
        found.append(f"it is blurred by about {blur:.0f} px")
    if (level := brightness(picture)) < DARK:
        found.append(f"hardly anything in it is brighter than {_of_white(level)}")
    return found


def notes(pictures: Float[np.ndarray, "K H W 4"]) -> list[str]:
    """What is to be said of views, by a few of them, before they are fitted: what no fit can make good.

    pictures: with masks as the last channel, or NaN.
    """
    chosen = np.unique(np.linspace(0, len(pictures) - 1, MOST_MEASURED).round().astype(int))
    sigma, blur = np.median([_measure(pictures[k]) for k in chosen], 0)
    found = []
    if sigma > NOISY:
        best_db = -20 * np.log10(sigma)
        found.append(
            f"{BEGINNING}have noise of about {255 * sigma:.0f}/255, from which even a perfect fit is"
            f" {best_db:.0f} dB away"
        )
    if _is_blurred(blur, pictures.shape[1]):
        found.append(f"{BEGINNING}are blurred by about {blur:.0f} px, and so will the fit be")
    if (level := max(brightness(pictures[k]) for k in chosen)) < DARK:
        found.append(f"{BEGINNING}have hardly anything brighter than {_of_white(level)}")
    return found


def brightness(picture: Float[np.ndarray, "H W 4"]) -> float:
    """The level of the brightest pixels in [0, 1], within the mask if there is one; 1 where that is empty."""
    rgb, mask = picture[..., :3], picture[..., 3]
    within = rgb if np.isnan(mask[0, 0]) else rgb[mask > INSIDE]
    return float(np.quantile(within.max(-1), BRIGHTEST)) if within.size else 1.0


def _of_white(level: float) -> str:
    """Pictures of 10 or 12 bits, in a file of 16, are the usual reason."""
    return f"{level:.1%} of white; are the values of the file too small for its 16 bits?"


def _is_blurred(blur_px: float, height_px: int) -> bool:
    return bool(blur_px > max(BLURRED * height_px, LEAST_BLUR_PX))


def _measure(picture: Float[np.ndarray, "H W 4"]) -> tuple[float, float]:
    """Noise, within the mask if there is one, and blur."""
    mask = picture[..., 3]
    within = None if np.isnan(mask[0, 0]) else ndimage.binary_erosion(mask > INSIDE, iterations=2)
    return noise(picture[..., :3], within), blur_px(picture[..., :3])


def noise(rgb: Float[np.ndarray, "H W 3"], within: Bool[np.ndarray, "H W"] | None = None) -> float:
    """The standard deviation of a pixel's noise, in [0, 1], by the quietest blocks; 0 if there are few.

    Where noise is cut off at white or black, its visible half tells it.

    within: the pixels that are looked at; default: all.
    """
    inside = np.ones(rgb.shape[:2], bool) if within is None else within
    bent = np.stack([ndimage.convolve(channel, LAPLACIAN) for channel in np.moveaxis(rgb, -1, 0)], -1)
    whole = _blocks(inside[..., None]).all(-1)
    if whole.sum() < FEWEST_BLOCKS:
        return 0.0
    measured = [_spread(*map(_blocks, each)) for each in zip(*map(_channels, (rgb, bent)), strict=True)]
    spread = np.stack([each[whole] for each in measured])
    # A channel that is black or white throughout, as the blue of what is yellow, tells of no noise.
    told = np.isfinite(spread)
    by_block = np.where(told, spread, 0).sum(0) / told.sum(0).clip(1)
    return float(np.quantile(by_block, QUIET))


def _spread(values: Float[np.ndarray, "N B"], bent: Float[np.ndarray, "N B"]) -> Float[np.ndarray, " N"]:
    """The noise in each block of one channel; NaN where all of it is black or white.

    bent: the values after a convolution with the Laplacian.
    """
    to_end = np.minimum(values, 1 - values)
    clipped = to_end <= SATURATED
    share = clipped.mean(-1)
    spread = DEVIATION * np.median(np.abs(bent), -1)
    cut = (share > CLIPPED) & (share < 1)
    visible = (
        DEVIATION * np.nanmedian(np.where(clipped, np.nan, to_end)[cut], -1) * (share[cut] < 1 - CLIPPED)
    )
    # Shading that ends in black is far from it on one side, but it is smooth.
    spread[cut] = np.minimum(visible, MOST_HIDDEN * spread[cut])
    spread[share == 1] = np.nan
    return spread


def _channels(rgb: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "3 H W"]:
    return np.moveaxis(rgb, -1, 0)


def blur_px(rgb: Float[np.ndarray, "H W 3"]) -> float:
    """The standard deviation of the Gaussian that its sharpest edges were blurred by; 0 without an edge.

    A step that was blurred by s has a gradient of 1 / sqrt(s^2 + t^2) after a further blur by t, so two of
    these tell s (Zhuo and Sim, Defocus map estimation from a single image, 2011).
    """
    grey = rgb.mean(-1)
    little, more = (ndimage.gaussian_gradient_magnitude(grey, t) for t in (1.0, 2.0))
    edge = little >= max(np.quantile(little, EDGES), LEAST_EDGE)
    if not edge.any():
        return 0.0
    squared = float(np.median(little[edge] / np.maximum(more[edge], 1e-6))) ** 2
    if squared <= 1:
        return float("inf")
    return float(np.sqrt(max((4 - squared) / (squared - 1), 0)))


def _blocks(values: np.ndarray) -> np.ndarray:
    """The values [N, B] of each of N blocks; what is left over at the ends is left out."""
    rows, columns = (side // BLOCK_PX for side in values.shape[:2])
    cut = values[: rows * BLOCK_PX, : columns * BLOCK_PX]
    cut = cut.reshape(rows, BLOCK_PX, columns, BLOCK_PX, -1).swapaxes(1, 2)
    return cut.reshape(rows * columns, -1)
