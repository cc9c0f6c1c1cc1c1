"""The one-pass stage of LPIPS against the same formula in float64 torch, forward and backward."""

import pytest
import torch

from recon_torch.losses.lpips_cpu import stage_distance


def stage(views=3, channels=24, height=9, width=7):
    """A ReLU output with some pixels that are 0 throughout; targets; roots of a head; a gradient."""
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(views, channels, height, width, generator=generator).relu()
    activation[:, :, 2, 3:5] = 0
    target = torch.nn.functional.normalize(torch.rand(activation.shape, generator=generator))
    root_weight, upstream = torch.rand(channels, generator=generator), torch.randn(views, generator=generator)
    return activation, target * root_weight.view(-1, 1, 1), root_weight, upstream


def differentiate(function, activation, target, root_weight, upstream):
    activation = activation.detach().requires_grad_()
    distance = function(activation, target, root_weight)
    return distance, torch.autograd.grad(distance, activation, upstream)[0]


def textbook(activation, target, root_weight):
    unit = activation / activation.square().sum(1, keepdim=True).clamp_min(1e-30).sqrt()
    return (unit * root_weight.view(-1, 1, 1) - target).square().sum(1).mean((1, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_distance_and_gradient_equal_the_textbook_formula(memory_format):
    inputs = stage()
    expected, expected_gradient = differentiate(textbook, *(tensor.double() for tensor in inputs))
    expected_gradient[:, :, 2, 3:5] = 0  # where there is no direction to turn
    activation, *others = inputs
    distance, gradient = differentiate(
        stage_distance, activation.contiguous(memory_format=memory_format), *others
    )
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert not gradient[:, :, 2, 3:5].any()


def test_same_bytes_with_any_number_of_threads():
    inputs, before, results = stage(height=40, width=50), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(differentiate(stage_distance, *inputs))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
