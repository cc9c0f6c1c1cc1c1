"""What the parameters of Gaussians stand for."""

import numpy as np
import torch

from recon_torch.raster.gaussians import Gaussians


def test_colour_is_the_constant_harmonic():
    sh0 = torch.tensor([[0.0, 1.0, -3.0]])
    gaussians = Gaussians(torch.zeros(1, 3), torch.ones(1, 4), torch.zeros(1, 3), torch.zeros(1), sh0)
    np.testing.assert_allclose(gaussians.colors[0], [0.5, 0.5 + 0.28209479, 0.0], rtol=1e-6)


def test_activated_gaussians_hold_the_properties():
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 3), (7, 4), (7, 3), (7,), (7, 3)]
    gaussians = Gaussians(*(torch.randn(shape, generator=generator) for shape in shapes))
    activated = gaussians.activated()
    for name in activated._fields:
        assert torch.equal(getattr(activated, name), getattr(gaussians, name)), name
    torch.testing.assert_close(activated.scales.log(), gaussians.log_scales)
    torch.testing.assert_close(torch.logit(activated.opacities), gaussians.opacity_logits)
