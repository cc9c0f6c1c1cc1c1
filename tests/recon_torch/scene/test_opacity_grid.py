"""The grid of opacities, compared with the moments and the shadows of Gaussians in closed form."""

import math

import pytest
import torch

from recon_torch.raster.gaussians import Gaussians
from recon_torch.scene.opacity_grid import opacity_grid


def copies(means, scales, opacity_logit, quat=(1.0, 0, 0, 0)) -> Gaussians:
    """Grey Gaussians that differ in nothing but their places."""

    def repeat(value):
        return torch.tensor(value).repeat(len(means), 1)

    logits = repeat(opacity_logit)[:, 0]
    return Gaussians(means, repeat(quat), repeat(scales).log(), logits, torch.zeros_like(means))


def test_a_gaussian_on_the_grid_has_its_own_moments_and_shadow():
    """Its long axis is turned from x to y. Its mean shadow is the mean of those along its three axes."""
    num, scales = 100, (0.2, 0.06, 0.03)
    turned = (math.sqrt(0.5), 0, 0, math.sqrt(0.5))
    scene = copies(torch.zeros(num, 3), scales, math.log(0.001), turned)
    grid = opacity_grid(scene, 1.0, 50)
    ticks = (torch.arange(50) + 0.5) * 0.04 - 1
    for axis, expected in enumerate((0.06, 0.2, 0.03)):
        weights = grid.sum([other for other in range(3) if other != axis]) / grid.sum()
        variance = expected**2 + 0.04**2 / 12  # a cell's own
        assert (weights * ticks**2).sum() == pytest.approx(variance, rel=0.15)
    shadow = 2 * math.pi * (0.2 * 0.06 + 0.06 * 0.03 + 0.2 * 0.03) / 3
    assert grid.sum() * 0.04**2 == pytest.approx(num * 0.001 * shadow, rel=0.01)


def test_what_is_outside_of_the_grid_counts_at_its_surface():
    scene = copies(torch.tensor([[5.0, 0.02, 0.02]]), (0.001,) * 3, 4.0)
    grid = opacity_grid(scene, 1.0, 50)
    assert grid[-1, 25, 25] == grid.sum() > 0
