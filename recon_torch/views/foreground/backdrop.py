"""The backdrop of a picture: a smooth surface that is fitted to what surrounds the object.

Photographs are seldom taken before one even colour: light falls off towards the corners, paper has gradients,
sensors have noise and JPEG has blocks. A polynomial of the position follows all light that changes smoothly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

COARSE_PX = 160  # the longer side of the picture that the fit sees, in which noise is averaged
RING_SHARE = 0.03  # how deep the ring is from which the fit starts, by the shorter side
REACH = 0.06  # a pixel may differ so much from the fit so far to take part in the next one
EIGHT_BITS = 1.5 / 255  # differences below this may be rounding
BORDER_DEGREES = (0, 1, 2)  # a higher degree means nothing inside of the border to which alone it is fitted
FULL_DEGREE = 4  # light falls off towards the corners with cos^4 of the angle
BETTER = 0.05  # a higher degree has to explain so much more of the border
MAX_GROWTHS = 12
LAPLACIAN = np.array([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
"""Blind to planes, and as strong as the noise (Immerkaer, Fast noise variance estimation, 1996)."""


class Backdrop(NamedTuple):
    """What is behind each pixel.

    Attributes:
        color: may lie a little outside of [0, 1].
        share: of the picture's border that looks like it.
        noise: standard deviation of the white noise of a pixel.
    """

    color: Float[np.ndarray, "H W 3"]
    share: float
    noise: float


def fit(rgb: Float[np.ndarray, "H W 3"], valid: Bool[np.ndarray, "H W"]) -> Backdrop:
    """Fits the backdrop to the border of the valid pixels, and from there inwards as far as it reaches."""
    small, known = _coarse(rgb, valid)
    ring = border(known, max(2, round(RING_SHARE * min(known.shape))))
    noise = _noise(rgb, valid)
    level = max(EIGHT_BITS, 3 * noise * len(small) / len(rgb))
    places = _places(known.shape)
    coefficients, degree = _start(small[ring], places[ring], level)
    taken = np.zeros_like(known)
    for _ in range(MAX_GROWTHS):
        differs = _difference(small, places, coefficients, degree)
        before, taken = taken, _joined(known & (differs < REACH), ring)
        if not taken.any():
            break
        if degree and degree < FULL_DEGREE and np.median(differs[taken]) > level / 2:
            degree = FULL_DEGREE
        elif np.array_equal(taken, before):
            break
        coefficients = _robust(_terms(places[taken], degree), small[taken], level)
    share = float((_difference(small, places, coefficients, degree)[ring] < max(REACH, 2 * level)).mean())
    return Backdrop(_evaluate(valid.shape, coefficients, degree), share, noise)


def border(valid: Bool[np.ndarray, "H W"], depth_px: int) -> Bool[np.ndarray, "H W"]:
    """The valid pixels that are not so deep inside."""
    return valid & ~ndimage.binary_erosion(valid, iterations=depth_px)


def shrink(image: Float[np.ndarray, "H W C"], height: int, width: int) -> Float[np.ndarray, "h w C"]:
    """An image at a smaller size, whose pixels are means."""
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BOX))
        for channel in np.moveaxis(np.asarray(image, np.float32), -1, 0)
    ]
    return np.stack(channels, -1)


def _coarse(
    rgb: Float[np.ndarray, "H W 3"], valid: Bool[np.ndarray, "H W"]
) -> tuple[Float[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """The picture at a small size, and which of its pixels are wholly valid."""
    factor = min(1.0, COARSE_PX / max(valid.shape))
    height, width = (max(1, round(side * factor)) for side in valid.shape)
    weighted = shrink(np.concatenate([rgb * valid[..., None], valid[..., None]], -1), height, width)
    return weighted[..., :3] / np.maximum(weighted[..., 3:], 1e-3), weighted[..., 3] > 0.99


def _noise(rgb: Float[np.ndarray, "H W 3"], valid: Bool[np.ndarray, "H W"]) -> float:
    """From the picture's border, by the median, which neither an object there nor its edges move."""
    ring = border(valid, max(2, round(RING_SHARE * min(valid.shape))))
    bent = np.stack([ndimage.convolve(channel, LAPLACIAN) for channel in np.moveaxis(rgb, -1, 0)], -1)
    return float(np.median(np.abs(bent[ring])) * 1.4826) if ring.any() else 0.0


def _start(
    colors: Float[np.ndarray, "N 3"], places: Float[np.ndarray, "N 2"], level: float
) -> tuple[Float[np.ndarray, "T 3"], int]:
    """The fit to the border alone, and its degree: the lowest that does about as well as any."""
    best, explained = None, -1.0
    for degree in BORDER_DEGREES:
        terms = _terms(places, degree)
        coefficients = _robust(terms, colors, level)
        share = (np.abs(colors - terms @ coefficients).max(-1) < 2 * level).mean()
        if share > explained + BETTER:
            best, explained = (coefficients, degree), share
    assert best is not None
    return best


def _robust(
    terms: Float[np.ndarray, "N T"], colors: Float[np.ndarray, "N 3"], level: float
) -> Float[np.ndarray, "T 3"]:
    """A fit that outliers do not move: least absolute differences, then least squares of what is near."""
    off = np.full(len(terms), level)
    for _ in range(15):
        coefficients = _least_squares(terms, colors, 1 / np.maximum(off, level))
        off = np.abs(colors - terms @ coefficients).max(-1)
    for _ in range(5):
        scale = max(1.5 * np.median(off), level)
        coefficients = _least_squares(terms, colors, np.clip(1 - (off / (4 * scale)) ** 2, 0, None) ** 2)
        off = np.abs(colors - terms @ coefficients).max(-1)
    return coefficients


def _least_squares(
    terms: Float[np.ndarray, "N T"], colors: Float[np.ndarray, "N 3"], weights: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "T 3"]:
    weighted = terms * weights[:, None]
    return np.linalg.lstsq(weighted.T @ terms, weighted.T @ colors, rcond=None)[0]


def _places(shape: tuple[int, ...]) -> Float[np.ndarray, "H W 2"]:
    """Row and column of pixel centres, from -1 to 1 along the longer side."""
    axes = [(np.arange(side) + 0.5 - side / 2) / (max(shape) / 2) for side in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def _terms(places: Float[np.ndarray, "*N 2"], degree: int) -> Float[np.ndarray, "*N T"]:
    y, x = places[..., 0], places[..., 1]
    return np.stack([y**i * x**j for i in range(degree + 1) for j in range(degree + 1 - i)], -1)


def _difference(
    colors: Float[np.ndarray, "h w 3"],
    places: Float[np.ndarray, "h w 2"],
    coefficients: Float[np.ndarray, "T 3"],
    degree: int,
) -> Float[np.ndarray, "h w"]:
    return np.abs(colors - _terms(places, degree) @ coefficients).max(-1)


def _evaluate(
    shape: tuple[int, ...], coefficients: Float[np.ndarray, "T 3"], degree: int
) -> Float[np.ndarray, "H W 3"]:
    """The fit at all pixels. One term after another, because all of them would take much memory."""
    y, x = np.moveaxis(_places(shape).astype(np.float32), -1, 0)
    color = np.zeros((*shape, 3), np.float32)
    powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    for (i, j), coefficient in zip(powers, coefficients.astype(np.float32), strict=True):
        color += (y**i * x**j)[..., None] * coefficient
    return color


def _joined(mask: Bool[np.ndarray, "h w"], ring: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The parts of the mask that reach the ring."""
    return ndimage.binary_propagation(ring & mask, mask=mask)
