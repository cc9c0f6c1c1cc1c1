"""How well renders agree with views: PSNR of the whole image and of the foreground, SSIM, silhouette IoU.

LPIPS is `losses.lpips.PerceptualDistance`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from recon_torch.losses.ssim import ssim

__all__ = ["psnr", "silhouette_iou", "ssim"]


def psnr(
    images: Float[Tensor, "K H W 3"],
    targets: Float[Tensor, "K H W 3"],
    masks: Float[Tensor, "K H W 1"] | None = None,
) -> Float[Tensor, " K"]:
    """Peak signal-to-noise ratio of each view in dB, for pixels in [0, 1]; infinite for equal images.

    masks: weights of the pixels, so that an empty background cannot hide errors of a small object. The ratio
    is NaN where a mask is empty. By default all pixels count alike.
    """
    squared = (images - targets).square().mean(-1, keepdim=True)
    weights = squared.new_ones(squared.shape) if masks is None else masks
    error = (squared * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    return -10 * error.log10()


def silhouette_iou(alphas: Float[Tensor, "K H W 1"], masks: Float[Tensor, "K H W 1"]) -> Float[Tensor, " K"]:
    """Intersection over union of the pixels that are at least half covered; 1 if there are none in either."""
    inside, expected = alphas >= 0.5, masks >= 0.5
    intersection = (inside & expected).sum((1, 2, 3))
    union = (inside | expected).sum((1, 2, 3))
    return (intersection / union.clamp_min(1)).where(union > 0, intersection.new_ones(()).float())
