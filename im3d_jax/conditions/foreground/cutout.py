"""The object of a picture with an alpha channel, if that separates an object from anything."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from recon_torch.views.foreground import shadows, silhouette
from recon_torch.views.foreground.backdrop import border
from recon_torch.views.foreground.found import Found

LEAST_SPAN = 0.1  # of alpha; channels of one value, or of 250 to 255, separate nothing
LEAST_CLEAR = 0.08  # share of the picture that is transparent around an object; rounded corners take less
OPEN_BORDER = 0.05  # share of the border that is transparent, unless alpha is inverted or shows a frame
OPAQUE = 0.95
LEAST_ALPHA = 0.04  # what is below is invisible, or the haze of a matting network
LEAST_BODY = 0.3  # share of an object that is opaque, if dark and transparent parts beside it are its shadow
GLASSY = 0.6  # an object is half transparent if most of it has less alpha
FEWEST_EDGES = 20  # pixels at edges from which premultiplied colours are told
NEAR_PX = 6  # how far such a pixel is at most from an opaque one, whose colour it should have


def find(rgb: Float[np.ndarray, "H W 3"], alpha: Float[np.ndarray, "H W 1"]) -> Found | None:
    """The object that alpha shows; None if alpha separates nothing."""
    alpha = alpha[..., 0]
    if np.ptp(alpha) < LEAST_SPAN:
        return None
    alpha, faint = _without_haze(alpha)
    present = ndimage.binary_propagation(alpha > np.quantile(alpha, 0.995) / 2, mask=alpha > faint)
    if 1 - present.mean() < LEAST_CLEAR:
        return None
    doubts, hints = [], []
    if (~present)[border(np.ones_like(present), 1)].mean() < OPEN_BORDER:
        doubts.append("is opaque all along the border of the picture; is its alpha inverted?")
    if is_premultiplied(rgb, alpha):
        hints.append("had colours that were multiplied by its alpha")
        rgb = np.clip(rgb / np.maximum(alpha, 1 / 255)[..., None], 0, 1)
    shadow = _shadow(rgb, alpha, present)
    parts = silhouette.parts(present & ~shadow)
    if np.median(alpha[parts.mask]) < GLASSY:
        doubts.append("is half transparent, and is made as what is seen of it before white")
    with_edges = ndimage.binary_dilation(parts.mask, iterations=silhouette.EDGE_PX) & ~shadow
    coverage = (alpha * with_edges).astype(np.float32)[..., None]
    return Found(rgb, coverage, parts.mask, (*doubts, *parts.doubts), tuple(hints))


def is_premultiplied(rgb: Float[np.ndarray, "H W 3"], alpha: Float[np.ndarray, "H W"]) -> bool:
    """Whether colours at the edges are those of the opaque pixels beside them, times alpha."""
    edge = (alpha > 0.05) & (alpha < OPAQUE) & (rgb.max(-1) > 0.02)
    distance, (row, column) = ndimage.distance_transform_edt(alpha < OPAQUE, return_indices=True)
    edge &= distance < NEAR_PX
    if edge.sum() < FEWEST_EDGES or (rgb.max(-1) > alpha + 0.02)[edge].mean() > 0.02:
        return False
    beside = rgb[row[edge], column[edge]]
    as_straight = np.median(np.abs(rgb[edge] - beside).max(-1))
    as_premultiplied = np.median(np.abs(rgb[edge] - alpha[edge][:, None] * beside).max(-1))
    return bool(as_straight > 0.05 and as_premultiplied < as_straight / 2)


def _without_haze(alpha: Float[np.ndarray, "H W"]) -> tuple[Float[np.ndarray, "H W"], float]:
    """Alpha less what the transparent border has of it, and the value below which it says nothing."""
    around = alpha[border(np.ones(alpha.shape, bool), 1)]
    around = around[around < np.quantile(alpha, 0.995) / 2]
    if not around.size:
        return alpha, LEAST_ALPHA
    haze = np.median(around)
    spread = np.median(np.abs(around - haze)) / max(1 - haze, 1e-3)
    return np.clip((alpha - haze) / (1 - haze), 0, 1), float(max(LEAST_ALPHA, 6 * spread))


def _shadow(
    rgb: Float[np.ndarray, "H W 3"], alpha: Float[np.ndarray, "H W"], present: Bool[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"]:
    """A shadow that was cut out with an object which is opaque itself: dark, transparent, and fading."""
    opaque = alpha > OPAQUE
    if (opaque & present).sum() < LEAST_BODY * present.sum():
        return np.zeros_like(present)
    white = np.ones_like(rgb)
    noise = np.full(alpha.shape, 2 / 255, np.float32)
    seen = shadows.look(rgb * alpha[..., None] + 1 - alpha[..., None], white, (noise, noise), 0.0)
    seen = seen._replace(like_shadow=seen.like_shadow & ~opaque)
    return shadows.find(present, seen) & ~ndimage.binary_dilation(opaque)
