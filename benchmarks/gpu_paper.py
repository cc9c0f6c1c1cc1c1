"""configs/paper_512.py with random weights and embeddings, which is enough to measure time."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.backbones import Backbone, Params, emu_video
from im3d_jax.conditions import precomputed

PROMPT = "a toy"
SMALL_NETWORK = emu_video.SMALL | dict(
    latent_shape=(16, 16, 8), num_transformer_layers=1, max_words=8, query_chunk=64
)
SMALL_CODEC = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
SMALL_STEPS = {
    "video.num_steps": 2,
    "rounds.num_steps": 1,
    "rounds.at_steps": (10, 20),
    "fit.num_steps": 30,
    "fit.num_gaussians": 300,
}


class RandomEncoder:
    """Random embeddings, in the shape of those of a text encoder."""

    def __init__(self, length: int, width: int):
        self.shape, self.digest = (length, width), f"random {length} {width}"

    def encode(self, prompts):
        embeddings = np.random.default_rng(0).standard_normal((len(prompts), *self.shape), np.float32)
        return embeddings, np.ones((len(prompts), self.shape[0]), np.float32)


def load_config(directory: Path, small: bool) -> ConfigDict:
    """The config. Its text embeddings, of `PROMPT` and of "", are written to `directory`.

    Args:
        small: reduces the network, the autoencoder and the numbers of steps, so that a CPU can run it.
    """
    config = config_flags.load("configs/paper_512.py")
    config.autoencoder.kwargs.path = "random"
    config.fit.update(lpips_weights="random", lpips_stages=5)  # 5 stages, as with trained weights
    if small:
        config.backbone.kwargs.update(SMALL_NETWORK)
        config.autoencoder.kwargs = config.autoencoder.kwargs.to_dict() | SMALL_CODEC
        config.update_from_flattened_dict(SMALL_STEPS)
        config.size = 8 * SMALL_NETWORK["latent_shape"][0]
    sizes = config.backbone.kwargs
    encoders = [RandomEncoder(sizes.max_words, width) for width in sizes.text_dims]
    precomputed.write(encoders, [PROMPT], directory)
    config.text = dict(name="precomputed", kwargs=dict(path=str(directory)))
    return config


def random_params(model: Backbone) -> Params:
    """Random parameters in bfloat16, made by one program that holds no float32 copy of all of them.

    All are normal numbers. Parameters that start at zero would make the rest of the network constant.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        scales = [
            max(1, leaf.size // max(1, leaf.shape[-1])) ** -0.5 if leaf.ndim > 1 else 0.1 for leaf in leaves
        ]
        return [
            scale * jax.random.normal(each, leaf.shape, jnp.bfloat16)
            for each, leaf, scale in zip(keys, leaves, scales, strict=True)
        ]

    return jax.tree.unflatten(structure, jax.block_until_ready(draw(jax.random.key(0, impl="rbg"))))
