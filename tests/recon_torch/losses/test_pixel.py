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


def test_where_the_mask_is_nan_any_opacity_is_right():
    """There only the colours over the background count, and only they have gradients."""
    generator = torch.Generator().manual_seed(0)
    rgb, target = torch.rand(2, 1, 5, 4, 3, generator=generator)
    alpha, mask = torch.rand(2, 1, 5, 4, 1, generator=generator)
    alpha.requires_grad_()
    known = (torch.rand(1, 5, 4, 1, generator=generator) > 0.5).numpy()
    loss = l1_loss(rgb, alpha, target, mask.where(torch.from_numpy(known), torch.nan), 0.3)
    seen, missing = (rgb - target).numpy(), (alpha - mask).detach().numpy()
    colors = np.where(known, np.abs(seen + 0.3 * missing), np.abs(seen)).sum()
    total = colors + np.abs(missing)[known].sum()
    np.testing.assert_allclose(loss.item(), total / (5 * 4 * 4), rtol=1e-5)
    squared = mask_loss(alpha, mask.where(torch.from_numpy(known), torch.nan))
    np.testing.assert_allclose(squared.item(), np.square(missing)[known].sum() / 20, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss + squared, alpha)
    np.testing.assert_array_equal(gradient.numpy()[~known], 0)
    assert (gradient.numpy()[known] != 0).all()
