"""Where a fit's Gaussians start."""

import math

import torch

from recon_torch.scene.start import init_ball


def test_ball_is_filled_evenly_and_seeded():
    gaussians = init_ball(20000, 0.5, torch.Generator().manual_seed(0))
    distance = gaussians.means.norm(dim=-1)
    assert distance.max() <= 0.5
    inside_half = (distance < 0.25).float().mean().item()
    assert abs(inside_half - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 20000)  # volume grows as r^3; four sigma
    assert gaussians.means.mean(0).abs().max() < 0.01
    again = init_ball(20000, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(gaussians.means, again.means)
    torch.testing.assert_close(gaussians.opacities, torch.full((20000,), 0.1))
    torch.testing.assert_close(gaussians.colors, torch.full((20000, 3), 0.5))
