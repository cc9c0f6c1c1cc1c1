"""SSIM against scikit-image; MS-SSIM against pytorch-msssim and a NumPy version in float64."""

import numpy as np
import pytest
import pytorch_msssim
import torch
from skimage.metrics import structural_similarity

from recon_torch.losses.ssim import ms_ssim, ssim


def test_ssim_equals_scikit_image(image_pair):
    images, targets = image_pair(64)
    expected = [
        structural_similarity(
            image, target, data_range=1, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
        )
        for image, target in zip(images.detach().double().numpy(), targets.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(images, targets).detach(), expected, atol=2e-5)


@pytest.mark.parametrize("side", [176, 192])
def test_ms_ssim_equals_pytorch_msssim_where_all_scales_fit(side, image_pair, gradient):
    images, targets = image_pair(side)
    channels_first = [tensor.permute(0, 3, 1, 2) for tensor in (images, targets)]
    theirs = pytorch_msssim.ms_ssim(*channels_first, data_range=1, size_average=False)
    mine = ms_ssim(images, targets)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    theirs = gradient(theirs, images)
    torch.testing.assert_close(gradient(mine, images), theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


def ms_ssim_numpy(x: np.ndarray, y: np.ndarray, scales: int) -> float:
    """Wang et al. 2003 of one channel [H,W] in float64, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    result = 1.0
    for scale, weight in enumerate(weights / weights.sum()):
        a, b = (np.lib.stride_tricks.sliding_window_view(image, (11, 11)) for image in (x, y))
        mean_a, mean_b = ((window * patch).sum((2, 3)) for patch in (a, b))
        da, db = a - mean_a[..., None, None], b - mean_b[..., None, None]
        var_a, var_b, cov = ((window * product).sum((2, 3)) for product in (da * da, db * db, da * db))
        term = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
        if scale == scales - 1:
            term = term * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        result *= term.mean() ** weight
        x, y = (image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3)) for image in (x, y))
    return result


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4)])
def test_ms_ssim_uses_the_scales_that_fit(side, scales, image_pair):
    images, targets = image_pair(side, 1)
    expected = np.mean(
        [
            ms_ssim_numpy(
                images[0, ..., c].detach().double().numpy(), targets[0, ..., c].double().numpy(), scales
            )
            for c in range(3)
        ]
    )
    np.testing.assert_allclose(ms_ssim(images, targets).item(), expected, atol=5e-5)


@pytest.mark.slow
def test_ms_ssim_gradient_against_finite_differences(image_pair):
    images, targets = image_pair(22, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ms_ssim(x, targets), images, atol=1e-6)


def test_ms_ssim_has_a_finite_gradient_for_opposed_images(image_pair, gradient):
    images, targets = image_pair(64)
    opposed = (1 - targets).requires_grad_()
    assert torch.isfinite(gradient(ms_ssim(opposed, targets), opposed)).all()
    torch.testing.assert_close(ms_ssim(targets, targets), torch.ones(2))
