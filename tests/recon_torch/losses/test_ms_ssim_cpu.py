"""The MS-SSIM kernel against the same formula as torch operations in float64, forward and backward."""

import pytest
import torch

from recon_torch.losses.ssim import ms_ssim


def image_pair(shape):
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(shape, generator=generator)
    return targets + 0.2 * torch.randn(shape, generator=generator), targets


def differentiate(images, targets):
    images = images.detach().requires_grad_()
    values = ms_ssim(images, targets)
    upstream = torch.linspace(-1, 2, len(images), dtype=images.dtype)
    return values, torch.autograd.grad(values, images, upstream)[0]


@pytest.mark.parametrize("shape", [(1, 9, 12, 3), (2, 23, 50, 3), (3, 67, 91, 3), (1, 180, 177, 3)])
def test_value_and_gradient_equal_those_of_torch_in_float64(shape):
    images, targets = image_pair(shape)
    values, gradient = differentiate(images, targets)
    expected, expected_gradient = differentiate(images.double(), targets.double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 2e-4 * expected_gradient.norm()


def test_a_scale_with_opposed_images_has_no_gradient():
    images, targets = image_pair((1, 24, 24, 3))
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(12, 12)[None, ..., None]  # gone when halved
    images, targets = images * 0.1 + 0.4 * checks, targets * 0.1 - 0.4 * checks
    values, gradient = differentiate(images, targets)
    expected, expected_gradient = differentiate(images.double(), targets.double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm() > 0


def test_same_bytes_with_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(differentiate(*image_pair((3, 64, 64, 3))))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
