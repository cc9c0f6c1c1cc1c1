"""Losses on pixels and foreground masks (Sec. 3.3, Table 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def mask_loss(alpha: Float[Tensor, "K H W 1"], mask: Float[Tensor, "K H W 1"]) -> Float[Tensor, " K"]:
    """Mean squared difference between the rendered opacity and the foreground mask, of each view.

    mask: NaN where nobody knows it; any opacity is right there.
    """
    return (alpha - _told(mask, alpha)).square().mean((1, 2, 3))


def rgb_loss(rgb: Float[Tensor, "K H W 3"], target: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Mean squared difference of the pixels of each view, which Table 2 tries in place of LPIPS."""
    return (rgb - target).square().mean((1, 2, 3))


def l1_loss(
    rgb: Float[Tensor, "K H W 3"],
    alpha: Float[Tensor, "K H W 1"],
    target: Float[Tensor, "K H W 3"],
    mask: Float[Tensor, "K H W 1"] | None,
    background: float,
) -> Float[Tensor, " K"]:
    """Mean absolute difference of premultiplied colours and of opacity, of each view.

    The colours are compared without the background, because over it a haze of the background's own colour
    around the object could not be seen.

    Args:
        mask: None or NaN where nobody knows it; the colours are there compared over the background, and they
            alone.
        background: grey level behind the views.
    """
    if mask is None:
        return (rgb - target).abs().mean((1, 2, 3))
    mask = _told(mask, alpha)
    premultiplied = (rgb - target) + background * (alpha - mask)
    return torch.cat([premultiplied, alpha - mask], -1).abs().mean((1, 2, 3))


def _told(mask: Float[Tensor, "K H W 1"], alpha: Float[Tensor, "K H W 1"]) -> Float[Tensor, "K H W 1"]:
    """The mask, and where it is NaN the rendered opacity, whatever that is."""
    return torch.where(mask.isnan(), alpha, mask)
