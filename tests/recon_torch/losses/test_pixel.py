"""Losses on pixels and masks against closed forms."""

import numpy as np
import torch

from recon_torch.losses.pixel import l1_loss, mask_loss, rgb_loss


def test_squared_errors():
    a, b = torch.full((2, 4, 4, 3), 0.75), torch.full((2, 4, 4, 3), 0.25)
    assert mask_loss(a[..., :1], b[..., :1]).tolist() == [0.25, 0.25]
    b[0] = 0.75
    assert rgb_loss(a, b).tolist() == [0, 0.25]


def test_l1_compares_what_lies_before_the_background():
    generator = torch.Generator().manual_seed(0)
    colors, alphas = (
        torch.rand(2, 2, 5, 4, 3, generator=generator),
        torch.rand(2, 2, 5, 4, 1, generator=generator),
    )
    layers = torch.cat([colors * alphas, alphas], -1).numpy()
    expected = np.abs(layers[0] - layers[1]).mean((1, 2, 3))
    for grey in (0.0, 0.3, 1.0):
        (rgb, target), (alpha, mask) = colors * alphas + grey * (1 - alphas), alphas
        np.testing.assert_allclose(l1_loss(rgb, alpha, target, mask, grey), expected, rtol=1e-5)
        seen = np.abs(rgb.numpy() - target.numpy()).mean((1, 2, 3))
        np.testing.assert_allclose(l1_loss(rgb, alpha, target, None, grey), seen, rtol=1e-5)
