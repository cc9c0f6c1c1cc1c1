"""Blurs against SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from recon_torch.blur import convolve, gaussian_window


@pytest.mark.parametrize("size, sigma_px", [(11, 1.5), (5, 0.4), (3, 0.001)])
def test_the_window_is_scipys(size, sigma_px):
    impulse = np.zeros(size)
    impulse[size // 2] = 1
    expected = ndimage.gaussian_filter1d(impulse, sigma_px, radius=size // 2)
    np.testing.assert_allclose(gaussian_window(size, sigma_px, torch.float64), expected, atol=1e-12)


@pytest.mark.parametrize("axis", [2, 3])
def test_a_pass_stays_inside_and_keeps_channels_apart(axis):
    images = np.random.default_rng(0).random((2, 3, 9, 12))
    window = np.array([0.2, 0.5, 0.3])
    whole = ndimage.correlate1d(images, window, axis=axis)
    inside = [slice(None)] * 4
    inside[axis] = slice(1, -1)
    found = convolve(torch.from_numpy(images), torch.from_numpy(window), axis)
    np.testing.assert_allclose(found, whole[tuple(inside)], atol=1e-12)
