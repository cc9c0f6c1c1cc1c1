"""SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch.blur import convolve, gaussian_window

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]
MS_SSIM_WEIGHTS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # by scale, finest first (Wang et al. 2003)
# The least similarity of a scale: a power below 1 has an infinite slope at 0 and no value below it.
LOWEST_SIMILARITY = 1e-4


def ssim(images: Float[Tensor, "K H W 3"], targets: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Structural similarity of each view; 1 for equal images. Windows stay inside the image."""
    x, y = images.permute(0, 3, 1, 2), targets.permute(0, 3, 1, 2)
    return _similarity(x, y, with_luminance=True).mean((1, 2, 3))


def ms_ssim(images: Float[Tensor, "K H W 3"], targets: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Multi-scale structural similarity of each view; 1 for equal images; differentiable by `images`.

    Wang et al. 2003: five scales, a factor of two apart. Here: those into which the window of 11 px fits
    (three at 64 px, four at 128 px, five from 176 px), with weights that still sum to 1.
    """
    side = min(images.shape[1:3])
    num_scales = max(1, sum(side >> scale >= SSIM_WINDOW for scale in range(len(MS_SSIM_WEIGHTS))))
    weights = [weight / sum(MS_SSIM_WEIGHTS[:num_scales]) for weight in MS_SSIM_WEIGHTS[:num_scales]]
    if images.device.type == "cpu" and images.dtype == torch.float32:
        from recon_torch.losses import ms_ssim_cpu  # numba takes a second to import

        constants = torch.tensor([SSIM_C1, SSIM_C2, LOWEST_SIMILARITY])
        window = _window(side, images.dtype, images.device)
        return ms_ssim_cpu.ms_ssim(images, targets.detach(), window, torch.tensor(weights), constants)
    return _ms_ssim_in_torch(images.permute(0, 3, 1, 2), targets.permute(0, 3, 1, 2).detach(), weights)


def _ms_ssim_in_torch(
    x: Float[Tensor, "K C H W"], y: Float[Tensor, "K C H W"], weights: list[float]
) -> Float[Tensor, " K"]:
    result = x.new_ones(x.shape[:2])
    for scale, weight in enumerate(weights):
        coarsest = scale == len(weights) - 1
        similarity = _similarity(x, y, with_luminance=coarsest).mean((2, 3))
        result = result * similarity.clamp_min(LOWEST_SIMILARITY) ** weight
        if not coarsest:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.mean(1)


def _similarity(
    x: Float[Tensor, "K C H W"], y: Float[Tensor, "K C H W"], with_luminance: bool
) -> Float[Tensor, "K C h w"]:
    """SSIM, or its contrast-structure part alone, in each window."""
    mean_x, mean_xx, mean_xy = _blur(torch.cat([x, x * x, x * y], 1)).chunk(3, 1)
    mean_y, mean_yy = _blur(torch.cat([y, y * y], 1)).chunk(2, 1)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    contrast = (2 * (mean_xy - product) + SSIM_C2) / (mean_xx + mean_yy - squares + SSIM_C2)
    return contrast * (2 * product + SSIM_C1) / (squares + SSIM_C1) if with_luminance else contrast


def _blur(images: Float[Tensor, "K C H W"]) -> Float[Tensor, "K C h w"]:
    """Weighted means in each window that lies inside the image."""
    window = _window(min(images.shape[2:]), images.dtype, images.device)
    return convolve(convolve(images, window, 2), window, 3)


@functools.lru_cache(maxsize=64)
def _window(side: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " w"]:
    """The weights of a window that fits into an image whose shorter side this is."""
    return gaussian_window(min(SSIM_WINDOW, side - 1 + side % 2), SSIM_SIGMA, dtype, device)
