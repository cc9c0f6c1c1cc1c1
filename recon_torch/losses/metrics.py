"""How well renders agree with views: PSNR of the whole image and of the foreground, SSIM, silhouette IoU.

`standing_out` names views that agree far worse than the others.

LPIPS is `losses.lpips.PerceptualDistance`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from recon_torch.losses.ssim import ssim

__all__ = ["psnr", "silhouette_iou", "ssim", "standing_out"]

SIGMA_OF_MAD = 1.4826  # the standard deviation of a normal distribution by its median absolute deviation
OUT_BY_SIGMAS = 2.0


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


def standing_out(psnr_db: Float[Tensor, " K"], least_db: float) -> list[int]:
    """The views whose PSNR is below the median by more than `least_db`, and by two robust deviations.

    Views without a PSNR (NaN), or with an infinite one, do not stand out.
    """
    known_db = psnr_db.cpu().double().nan_to_num(float("inf"))
    below_db = known_db.median() - known_db
    spread_db = SIGMA_OF_MAD * below_db.abs().nan_to_num(0.0).median()
    bound_db = max(least_db, OUT_BY_SIGMAS * float(spread_db))
    return [view for view, below in enumerate(below_db.tolist()) if below > bound_db]
