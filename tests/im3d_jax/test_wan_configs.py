"""Configs of Wan: what they name fits together, and the small one trains and samples."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import autoencoders, backbones, config_flags, generator, parts, pipeline
from im3d_jax.autoencoders import wan_sizes
from im3d_jax.clips import Clip
from im3d_jax.commands import train

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan22_i2v_a14b"])
def test_parts_of_the_published_sizes_fit(name):
    config = config_flags.load(CONFIGS / f"{name}.py")
    pipeline.read_settings(config)  # or raises
    parts.check(config)
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    family = wan_sizes.PUBLISHED["wan2.2" if "5b" in name else "wan2.1"]
    side = config.size // family.side_factor
    assert tuple(model.latent_shape) == (side, side, family.z_dim)
    clip = Clip.of(generator.clip_settings(config), config.num_views)
    frames = autoencoders.num_latents("wan", config.autoencoder.kwargs.to_dict(), clip.num_pictures)
    assert (clip.num_pictures, frames) == (17, 5)
    assert model.network.grid(frames, side, side)[0] == 5


@pytest.fixture
def small():
    config = config_flags.load(CONFIGS / "tiny_flow.py")
    config.size, config.video.num_steps, config.rounds.num_steps = 8, 2, 2
    config.backbone.kwargs.update(latent_shape=(2, 2, 256), num_attention_heads=1, attention_head_dim=8)
    config.backbone.kwargs.update(num_layers=1, ffn_dim=8, freq_dim=8)
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("quick_draws")
def test_the_small_flow_model_takes_a_step_and_samples(tmp_path, small):
    small.train.update(num_steps=1, warmup_steps=0, decay_steps=0, log_every=1)
    state, is_done = train.train(small, tmp_path)
    assert state.step == 1 and is_done
    small.weights = str(tmp_path / "weights.safetensors")
    loaded = generator.load(small)
    picture = jnp.full((1, 8, 8, 3), 0.25), jnp.ones((1, 8, 8, 1))
    given = loaded.condition([""], *picture)
    views, _ = loaded.decode(loaded.turntable(given, jax.random.key(0)))
    assert views.shape == (1, 16, 8, 8, 3)
    np.testing.assert_allclose(views[:, 0], picture[0], atol=1e-5)  # view 0 is the picture
