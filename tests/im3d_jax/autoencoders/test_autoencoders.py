"""Frames <-> latents."""

import jax
import numpy as np
import pytest

from im3d_jax import autoencoders
from im3d_jax.autoencoders import patches
from recon_torch.errors import UserError


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.random((2, 3, 16, 8, 3), np.float32), rng.random((2, 3, 16, 8, 1), np.float32)


def test_round_trip_is_exact(images):
    codec = patches.Patches(4)
    latents = codec.encode(*images)
    assert latents.shape == (2, 3, 4, 2, 64)
    assert latents.min() >= -1 and latents.max() <= 1
    for decoded, image in zip(codec.decode(latents), images, strict=True):
        np.testing.assert_allclose(decoded, image, atol=1e-6)


def test_a_pixel_is_where_it_belongs(images):
    """Pixel (4 i + y, 4 j + x) is in place (i, j), channels 16 y + 4 x on: red, green, blue, alpha."""
    latents = np.asarray(patches.Patches(4).encode(*images))
    rgb, alpha = images
    assert latents[1, 2, 3, 1, 16 * 2 + 4 * 1 + 1] == pytest.approx(2 * rgb[1, 2, 14, 5, 1] - 1, abs=1e-6)
    assert latents[0, 1, 0, 0, 16 * 3 + 4 * 3 + 3] == pytest.approx(2 * alpha[0, 1, 3, 3, 0] - 1, abs=1e-6)


def test_images_without_a_view_axis(images):
    codec = patches.Patches(4)
    single = codec.encode(*(image[:, 0] for image in images))
    assert np.array_equal(single, codec.encode(*images)[:, 0])


def test_clip_keeps_images_and_bounds_the_rest(images):
    codec = patches.Patches(4)
    latents = codec.encode(*images)
    assert np.array_equal(codec.clip(latents), latents)
    assert np.array_equal(codec.clip(3 * latents), np.clip(3 * latents, -1, 1))
    rgb, alpha = codec.decode(3 * latents)
    assert min(rgb.min(), alpha.min()) == 0 and max(rgb.max(), alpha.max()) == 1


def test_gradient_of_decoding_is_a_half():
    codec = patches.Patches(2)
    gradient = jax.grad(lambda z: sum(part.sum() for part in codec.decode(z)))(
        np.zeros((1, 1, 2, 2, 16), np.float32)
    )
    np.testing.assert_allclose(gradient, 0.5)


def test_build_checks_the_sizes():
    assert autoencoders.build("patches", {"patch": 4}, 64, [16, 16, 64]) == patches.Patches(4)
    with pytest.raises(UserError, match=r"no 'vae'; there is patches"):
        autoencoders.build("vae", {}, 64, (16, 16, 64))
    with pytest.raises(UserError, match=r"config.size 128 makes latents \(32, 32, 64\)"):
        autoencoders.build("patches", {"patch": 4}, 128, (16, 16, 64))


USERS = """
    import jax.numpy as jnp

    class Autoencoder:
        def __init__(self, scale):
            self.scale = scale

        def latent_shape(self, size):
            return size, size, 3

        def encode(self, rgb, alpha):
            return self.scale * rgb

        def decode(self, latents):
            return latents / self.scale, None

        def clip(self, latents):
            return jnp.clip(latents, 0, self.scale)
"""


def test_a_users_autoencoder_is_built_by_the_name_of_its_module(user_module, images):
    codec = autoencoders.build(user_module(USERS), {"scale": 2.0}, 16, (16, 16, 3))
    assert isinstance(codec, autoencoders.Autoencoder)
    np.testing.assert_allclose(codec.decode(codec.encode(*images))[0], images[0])


def test_what_a_users_autoencoder_lacks_or_does_not_take_is_named(user_module):
    without = user_module(USERS.replace("def clip", "def cut"))
    with pytest.raises(UserError, match=r"user_pkg.part lacks clip of the Autoencoder contract"):
        autoencoders.build(without, {"scale": 2.0}, 16, (16, 16, 3))
    whole = user_module(USERS)
    with pytest.raises(UserError, match="user_pkg.part takes no argument size; remove it"):
        autoencoders.build(whole, {"scale": 2.0, "size": 3}, 16, (16, 16, 3))
    with pytest.raises(UserError, match="user_pkg.part needs the argument scale; add it"):
        autoencoders.build(whole, {}, 16, (16, 16, 3))
    with pytest.raises(UserError, match="user_pkg.part has no Other, which its contract asks for"):
        autoencoders.build(f"{whole}:Other", {}, 16, (16, 16, 3))
