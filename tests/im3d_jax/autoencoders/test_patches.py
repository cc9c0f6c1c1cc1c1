"""Patches of several pictures in a frame of latents, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import autoencoders
from im3d_jax.autoencoders.patches import Patches
from recon_torch.errors import UserError


def test_a_frame_holds_the_patches_of_its_pictures():
    rng = np.random.default_rng(0)
    rgb, alpha = (
        rng.random((2, 9, 4, 6, 3)).astype(np.float32),
        rng.random((2, 9, 4, 6, 1)).astype(np.float32),
    )
    codec, alone = Patches(patch=2, frames=4), Patches(patch=2)
    latents = codec.encode(rgb, alpha)
    assert latents.shape == (2, 3, 2, 3, 64) and codec.latent_shape(4) == (2, 2, 64)
    of_pictures = np.asarray(alone.encode(rgb, alpha))
    for frame, pictures in enumerate(([0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8])):
        expected = np.concatenate([of_pictures[:, each] for each in pictures], -1)
        np.testing.assert_array_equal(latents[:, frame], expected)
    np.testing.assert_allclose(latents[:, :1], codec.encode(rgb[:, :1], alpha[:, :1]))
    for found, given in zip(codec.decode(latents), (rgb, alpha), strict=True):
        np.testing.assert_allclose(found, given, atol=1e-6)


def test_copies_of_the_first_picture_are_averaged():
    codec = Patches(patch=1, frames=2)
    latents = jnp.asarray([[[[0.0] * 4 + [1.0] * 4]]])  # one frame of one pixel: two copies, grey and white
    rgb, alpha = codec.decode(latents)
    assert rgb.shape == (1, 1, 1, 3)
    np.testing.assert_allclose(rgb, 0.75)
    np.testing.assert_allclose(alpha, 0.75)


def test_other_numbers_of_pictures_are_refused():
    for count, frames in ((1, 1), (5, 2), (17, 5)):
        assert Patches(frames=4).num_latents(count) == frames
        assert autoencoders.num_latents("patches", dict(patch=4, frames=4), count) == frames
    assert autoencoders.num_latents("patches", dict(patch=4), 16) == 16
    with pytest.raises(UserError, match=r"patches of 4 frames take 4n \+ 1 pictures, not 16"):
        Patches(frames=4).num_latents(16)
