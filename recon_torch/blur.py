"""Gaussian blurs of images, as two passes of one window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gaussian_window(
    size: int, sigma_px: float, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Float[Tensor, " {size}"]:
    """`size` weights of a Gaussian around the middle one, which sum to 1."""
    offsets = torch.arange(size, dtype=dtype, device=device) - size // 2
    window = torch.exp(-(offsets**2) / (2 * sigma_px**2))
    return window / window.sum()


def convolve(images: Float[Tensor, "B C H W"], window: Float[Tensor, " k"], axis: int) -> Tensor:
    """Slides a window along axis 2 or 3 of each channel, staying inside: that axis loses k - 1 pixels."""
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    kernel = window.view(shape).expand(images.shape[1], -1, -1, -1)
    return F.conv2d(images, kernel, groups=images.shape[1])
