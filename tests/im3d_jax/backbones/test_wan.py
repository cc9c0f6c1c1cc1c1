"""Wan behind the backbone contract: how it is told the picture, its experts, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import backbones
from im3d_jax.backbones import wan, wan_network, wan_sizes
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError
from recon_torch.settings import plain

pytestmark = pytest.mark.slow

B, F, WORDS = 2, 3, 6
RNG = np.random.default_rng(0)
CHANNELS = dict(latent_shape=(4, 4, 16), num_text_tokens=WORDS, first_frame="channels")


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def moved(params):
    """Parameters of which none is zero or one, so that every layer counts."""
    return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(RNG.standard_normal(x.shape), x.dtype), params)


@pytest.fixture(scope="module")
def clean():
    model = backbones.build("wan", wan.SMALL)
    return model, moved(model.init(jax.random.key(0))), jax.jit(model.apply)


def given_to(model, image_mask, num_frames=F):
    shape = (B, num_frames, *model.latent_shape)
    mask = jnp.ones((B, WORDS)).at[1, 4:].set(0)
    tokens = draw(B, 3, model.image_dim) if model.image_dim else None
    clip = draw(*shape) if model.first_frame == "channels" else None
    image = draw(B, *model.latent_shape)
    text = draw(B, WORDS, model.text_dim)
    return Conditioning(image, jnp.asarray(image_mask), (text,), (mask,), tokens, clip=clip)


def test_a_clean_first_frame_has_no_noise_and_its_own_noise_level(clean):
    model, params, apply = clean
    noisy, timestep = draw(B, F, *model.latent_shape), jnp.array([800.0, 300.0])
    given = given_to(model, [1.0, 0.0])
    found = apply(params, noisy, timestep, given)

    text = given.text[0] * given.text_mask[0][..., None]
    levels = jnp.array([[0, 800, 800], [300, 300, 300]], jnp.float32)
    seen = noisy.at[0, 0].set(given.image[0])
    expected = wan_network.Transformer(model.network).apply({"params": params}, seen, levels, text)
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1, 0], expected[1, 0], rtol=1e-4, atol=1e-5)  # has no picture
    # The velocity with which flow matching comes from this noise to the picture at level 0.
    np.testing.assert_allclose(noisy[0, 0] - 0.8 * found[0, 0], given.image[0], atol=1e-5)


def test_where_text_ends_the_rest_does_not_count(clean):
    model, params, apply = clean
    noisy, timestep, given = draw(B, F, *model.latent_shape), jnp.full(B, 500.0), given_to(model, [1.0, 1.0])
    shorter = given._replace(text=(given.text[0][1:, :4],), text_mask=(given.text_mask[0][1:, :4],))
    shorter = jax.tree.map(lambda x: x if len(x) == 1 else x[1:], shorter)
    alone = apply(params, noisy[1:], timestep[1:], shorter)
    np.testing.assert_allclose(alone[0], apply(params, noisy, timestep, given)[1], rtol=1e-4, atol=1e-5)
    longer = given._replace(text=(draw(B, WORDS + 1, model.text_dim),), text_mask=(jnp.ones((B, WORDS + 1)),))
    with pytest.raises(UserError, match="the text has 7 tokens, config.backbone.kwargs.num_text_tokens is 6"):
        model.apply(params, noisy, timestep, longer)


def test_further_channels_say_which_frames_are_given():
    model = wan.Model(**(plain(wan_sizes.SMALL["i2v"]) | CHANNELS))
    params = moved(model.init(jax.random.key(0)))
    noisy, timestep, given = draw(B, F, *model.latent_shape), jnp.full(B, 500.0), given_to(model, [1.0, 0.0])
    mask = np.zeros((B, F, 4, 4, 4), np.float32)
    mask[0, 0] = 1
    clip = np.array(given.clip)
    clip[1] = 0
    seen = jnp.concatenate([noisy, mask, clip], -1)
    tokens = given.image_tokens * np.array([1.0, 0])[:, None, None]
    text = given.text[0] * given.text_mask[0][..., None]
    network = wan_network.Transformer(model.network)
    expected = network.apply({"params": params}, seen, timestep, text, tokens)
    found = model.apply(params, noisy, timestep, given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_each_noise_level_has_its_expert():
    sizes = plain(dataclasses.replace(wan_sizes.SMALL["ti2v"], num_layers=1))
    model = wan.Model(**sizes, latent_shape=(4, 4, 48), num_text_tokens=WORDS, experts=True, boundary=0.5)
    alone = dataclasses.replace(model, experts=False)
    params = moved(model.init(jax.random.key(0)))
    noisy, given = draw(B, F, *model.latent_shape), given_to(model, [1.0, 0.0])
    apply = jax.jit(model.apply)
    for levels, experts in {(500, 900): "high high", (499, 3): "low low", (700, 20): "high low"}.items():
        timestep = jnp.array(levels, jnp.float32)
        found = apply(params, noisy, timestep, given)
        for b, name in enumerate(experts.split()):
            expected = alone.apply(params[name], noisy, timestep, given)[b]
            np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changed, says",
    [
        (dict(latent_shape=(4, 4, 16)), "out_channels is 48, and latents have 16 channels"),
        (dict(first_frame="channels"), "in_channels is 48, and first_frame 'channels' .* makes 100"),
        (dict(latent_shape=(5, 4, 48)), "latents of 1x5x4 do not divide into patches of 1x2x2"),
        (dict(latent_shape=(4, 4)), r"latent_shape \(4, 4\) is not \(height, width, channels\)"),
        (dict(first_frame="last"), "first_frame"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changed, says):
    with pytest.raises(UserError, match=says):
        backbones.build("wan", wan.SMALL | changed)
