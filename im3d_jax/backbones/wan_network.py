"""Wan's video transformer (Wan Team 2025, arXiv 2503.20314): attention of every token to every other one.

A token is a patch of 1 x 2 x 2 places of a latent that is compressed in time. Tokens know where they are by
rotations of their queries and keys (Su et al. 2021, over time and space), how much noise there is by shifts
and scales of their normalised values (Peebles and Xie 2022), and what to show by attention to text, and in
Wan 2.1's image-to-video model also to an image.

Modules carry the names of diffusers' WanTransformer3DModel, so that a parameter's path says the name of its
tensor in a checkpoint. Normalisation, modulation and the embedding of the noise level are computed in
float32, the rest in `dtype`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax.backbones import layers
from im3d_jax.backbones.attention import attend
from im3d_jax.backbones.wan_sizes import Architecture
from im3d_jax.sharding import PartitionRules

PARTITION_RULES: PartitionRules = (
    (r"to_out_0/kernel", ("heads", "embed")),
    (r"attn\d/\w+/kernel", ("embed", "heads")),
    (r"(net_2|proj_out|linear_2)/kernel", ("mlp", "embed")),
    (r"/kernel", ("embed", "mlp")),
)
"""Logical names of a parameter's last axes; the first pattern that is found in its path counts."""

LAYER_NORM_EPS = 1e-5
"""Of the normalisations of the image's tokens."""

ROPE_BASE = 10_000
"""The longest wavelength of the rotations, in tokens, over 2 pi."""

Tokens = Float[Array, "B G n c"]
"""Tokens in G groups of n consecutive ones, each group with a noise level of its own."""

Rotations = tuple[Float[Array, "S half"], Float[Array, "S half"]]
"""Cosines and sines of the angles by which pairs of channels are turned, for each token."""


def init(spec: Architecture, key: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters of a network of these sizes."""
    latents = jnp.zeros((1, *spec.patch_size, spec.in_channels))
    image = jnp.zeros((1, spec.pos_embed_seq_len or 1, spec.image_dim)) if spec.image_dim else None
    return Transformer(spec).init(key, latents, jnp.zeros(1), jnp.zeros((1, 1, spec.text_dim)), image)[
        "params"
    ]


def shapes(spec: Architecture) -> dict[str, Any]:
    """The parameters as ShapeDtypeStructs. One block is traced for all of them, which are alike."""
    found = jax.eval_shape(partial(init, replace(spec, num_layers=1)), jax.random.key(0))
    return found | {f"blocks_{i}": found["blocks_0"] for i in range(1, spec.num_layers)}


# ---- The network ----


class Transformer(nn.Module):
    """The whole network."""

    spec: Architecture

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B F h w c"],
        timestep: Float[Array, " B"] | Float[Array, "B G"],
        text: Float[Array, "B L d"],
        image: Float[Array, "B M e"] | None = None,
    ) -> Float[Array, "B F h w out"]:
        """The prediction, float32.

        Args:
            timestep: 1000 times the noise level: one for all tokens; or G, each for as many consecutive
                tokens, such as one for each latent frame, or one for each token, in order of frame, row and
                column.
            text: the encoder's tokens, all of which are attended to. Weights were trained with zeros from the
                end of a prompt to 512 tokens.
            image: the image encoder's tokens, where the model has an `image_dim`, and only there.

        Raises UserError for latents that patches do not fill.
        """
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        if (image is None) != (spec.image_dim == 0):
            raise ValueError(f"image_dim is {spec.image_dim}, image is {image if image is None else 'given'}")
        grid = spec.grid(*latents.shape[1:4])
        timestep = timestep.reshape(len(timestep), -1)
        told = ConditionEmbedder(spec, name="condition_embedder")(timestep, text, image)
        x = PatchEmbedding(spec, name="patch_embedding")(latents.astype(dtype))
        if x.shape[1] % timestep.shape[1]:
            raise ValueError(f"{timestep.shape[1]} timesteps do not divide {x.shape[1]} tokens")
        x = x.reshape(*timestep.shape, -1, spec.width)

        turned = rotations(grid, spec.attention_head_dim)
        block = layers.remat(Block, spec.remat)
        for i in range(spec.num_layers):
            x = block(spec, name=f"blocks_{i}")(x, told.modulation, told.text, told.image, turned)

        shift, scale = modulations(self, 2, told.time[:, :, None])
        x = modulated(x, shift, scale, spec.eps)
        x = nn.Dense(math.prod(spec.patch_size) * spec.out_channels, dtype=dtype, name="proj_out")(x)
        return from_patches(x.astype(jnp.float32), grid, spec.patch_size)


class Block(nn.Module):
    """Attention of tokens to each other, attention to the conditions, feed-forward; each on a residual."""

    spec: Architecture

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        modulation: Float[Array, "B G 6 c"],
        text: Float[Array, "B L c"],
        image: Float[Array, "B M e"] | None,
        turned: Rotations,
    ) -> Tokens:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulations(self, 6, modulation)

        def gated(x: Tokens, change: Float[Array, "..."], gate: Float[Array, "B G 1 c"]) -> Tokens:
            return (x + change.reshape(x.shape) * gate).astype(dtype)

        y = modulated(x, shift, scale, spec.eps)
        x = gated(x, SelfAttention(spec, name="attn1")(_sequence(y), turned), gate)

        y = _sequence(layer_norm(x, spec.eps, "norm2"))
        x += CrossAttention(spec, name="attn2")(y, text, image).reshape(x.shape)

        y = modulated(x, ff_shift, ff_scale, spec.eps)
        return gated(x, FeedForward(spec.ffn_dim, spec.width, dtype, name="ffn")(y), ff_gate)


class SelfAttention(nn.Module):
    """Attention of all tokens of an asset to each other."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Float[Array, "B S c"], turned: Rotations) -> Float[Array, "B S c"]:
        q, k, v = (_heads(self.spec, x, f"to_{each}") for each in "qkv")
        q, k = (turn(_normed_heads(self.spec, each, f"norm_{n}"), turned) for n, each in (("q", q), ("k", k)))
        return _merged(self.spec, attend(q, k, _split(self.spec, v), query_chunk=self.spec.query_chunk))


class CrossAttention(nn.Module):
    """Attention of tokens to text, and of the same queries to an image; what both give is added."""

    spec: Architecture

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S c"], text: Float[Array, "B L c"], image: Float[Array, "B M e"] | None
    ) -> Float[Array, "B S c"]:
        spec = self.spec
        q = _normed_heads(spec, _heads(spec, x, "to_q"), "norm_q")
        k = _normed_heads(spec, _heads(spec, text, "to_k"), "norm_k")
        out = attend(q, k, _split(spec, _heads(spec, text, "to_v")))
        if image is not None:
            k = _normed_heads(spec, _heads(spec, image, "add_k_proj"), "norm_added_k")
            out += attend(q, k, _split(spec, _heads(spec, image, "add_v_proj")))
        return _merged(spec, out)


class Gelu(enum.Enum):
    """The GELU of a feed-forward layer."""

    TANH = "tanh"
    EXACT = "exact"


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    inner: int
    out: int
    dtype: Any
    gelu: Gelu = Gelu.TANH

    @nn.compact
    def __call__(self, x: Float[Array, "*S c"]) -> Float[Array, "*S out"]:
        hidden = Projection(self.inner, self.dtype, name="net_0")(x)
        hidden = nn.gelu(hidden, approximate=self.gelu is Gelu.TANH)
        return nn.Dense(self.out, dtype=self.dtype, name="net_2")(hidden)


class Projection(nn.Module):
    """A linear layer, within a module as diffusers has it."""

    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*S c"]) -> Float[Array, "*S out"]:
        return nn.Dense(self.out, dtype=self.dtype, name="proj")(x)


# ---- What the network is told ----


class Told(NamedTuple):
    """What the network is told, as the blocks take it.

    Attributes:
        time: the embedding of each group's noise level, float32.
        modulation: shifts, scales and gates of each group, which every block adds its own to, float32.
    """

    time: Float[Array, "B G c"]
    modulation: Float[Array, "B G 6 c"]
    text: Float[Array, "B L c"]
    image: Float[Array, "B M c"] | None


class ConditionEmbedder(nn.Module):
    """Noise levels, text and image, brought to the width of a token."""

    spec: Architecture

    @nn.compact
    def __call__(
        self, timestep: Float[Array, "B G"], text: Float[Array, "B L d"], image: Float[Array, "B M e"] | None
    ) -> Told:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        told = layers.sinusoids(timestep.reshape(-1), spec.freq_dim)
        time = layers.Embedding(spec.width, name="time_embedder")(told).astype(dtype)
        modulation = nn.Dense(6 * spec.width, dtype=dtype, name="time_proj")(nn.silu(time))
        if image is not None:
            image = ImageEmbedder(spec, name="image_embedder")(image.astype(dtype))
        return Told(
            time.astype(jnp.float32).reshape(*timestep.shape, -1),
            modulation.astype(jnp.float32).reshape(*timestep.shape, 6, -1),
            TextEmbedder(spec, name="text_embedder")(text.astype(dtype)),
            image,
        )


class TextEmbedder(nn.Module):
    """Two linear layers with a GELU between them."""

    spec: Architecture

    @nn.compact
    def __call__(self, text: Float[Array, "B L d"]) -> Float[Array, "B L c"]:
        width, dtype = self.spec.width, jnp.dtype(self.spec.dtype)
        hidden = nn.gelu(nn.Dense(width, dtype=dtype, name="linear_1")(text))
        return nn.Dense(width, dtype=dtype, name="linear_2")(hidden)


class ImageEmbedder(nn.Module):
    """A feed-forward layer between two normalisations; before them, places of the tokens of two images."""

    spec: Architecture

    @nn.compact
    def __call__(self, image: Float[Array, "B M e"]) -> Float[Array, "B M c"]:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        if spec.pos_embed_seq_len:
            shape = (1, spec.pos_embed_seq_len, spec.image_dim)
            image += self.param("pos_embed", layers.ZEROS, shape).astype(dtype)
        image = layer_norm(image, LAYER_NORM_EPS, "norm1")
        image = FeedForward(spec.image_dim, spec.width, dtype, Gelu.EXACT, name="ff")(image)
        return layer_norm(image, LAYER_NORM_EPS, "norm2")


# ---- Patches and places ----


class PatchEmbedding(nn.Module):
    """The linear layer from the values of a patch to a token, in order of frame, row and column."""

    spec: Architecture

    @nn.compact
    def __call__(self, latents: Float[Array, "B F h w c"]) -> Float[Array, "B S d"]:
        batch, *sides, channels = latents.shape
        frames, height, width = self.spec.grid(*sides)
        t, i, j = self.spec.patch_size
        kernel = self.param("kernel", layers.RANDOM, (t, i, j, channels, self.spec.width))
        bias = self.param("bias", layers.ZEROS, (self.spec.width,)).astype(latents.dtype)
        patches = latents.reshape(batch, frames, t, height, i, width, j, channels)
        tokens = jnp.einsum("bfthiwjc,tijcd->bfhwd", patches, kernel.astype(latents.dtype))
        return tokens.reshape(batch, -1, self.spec.width) + bias[None, None]


def from_patches(
    tokens: Float[Array, "B G n d"], grid: tuple[int, int, int], patch_size: Sequence[int]
) -> Float[Array, "B F h w c"]:
    """Tokens with the values of their patch, put where they belong."""
    frames, height, width = grid
    t, i, j = patch_size
    patches = tokens.reshape(len(tokens), frames, height, width, t, i, j, -1)
    placed = patches.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return placed.reshape(len(tokens), frames * t, height * i, width * j, -1)


def rotations(grid: tuple[int, int, int], head_dim: int) -> Rotations:
    """Cosines and sines for the tokens of a grid, in order of frame, row and column.

    A head's pairs of channels are divided among time, height and width; the last two have a third of the
    pairs each, rounded down, and time has the rest. Of n pairs along an axis, pair i is turned by
    place * base^(-i / n).
    """
    pairs, third = head_dim // 2, head_dim // 6
    angles = []
    for axis, (places, count) in enumerate(zip(grid, (pairs - 2 * third, third, third), strict=True)):
        angle = np.outer(np.arange(places), float(ROPE_BASE) ** -(np.arange(count) / count))
        shape = [places if each == axis else 1 for each in range(3)]
        angles.append(angle.reshape(*shape, count))

    def of_tokens(function: Any) -> Float[Array, "S half"]:
        # In float64 along each axis, and put together in the program, which then holds no large constants.
        parts = [jnp.asarray(function(angle), jnp.float32) for angle in angles]
        parts = [jnp.broadcast_to(part, (*grid, part.shape[-1])) for part in parts]
        return jnp.concatenate(parts, -1).reshape(-1, pairs)

    return of_tokens(np.cos), of_tokens(np.sin)


def turn(x: Float[Array, "B S heads d"], turned: Rotations) -> Float[Array, "B S heads d"]:
    """Turns neighbouring channels, and leaves first channels of all pairs before second ones.

    Products of queries and keys do not depend on the order of channels, as long as both have the same.
    """
    cos, sin = (each[None, :, None] for each in turned)
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1).astype(x.dtype)


# ---- Normalisation and modulation ----


def modulations(
    module: nn.Module, count: int, told: Float[Array, "B G #n c"]
) -> list[Float[Array, "B G 1 c"]]:
    """Shifts, scales and gates: what all blocks are told and a table of the module's own, added."""
    width = told.shape[-1]
    initial = nn.initializers.normal(width**-0.5)
    table = module.param("scale_shift_table", initial, (1, count, width)).astype(jnp.float32)
    return jnp.split(table[None] + told, count, axis=2)


def modulated(
    x: Tokens, shift: Float[Array, "B G 1 c"], scale: Float[Array, "B G 1 c"], epsilon: float
) -> Tokens:
    """Normalisation of each token without weights, then a scale and a shift that it is told."""
    centred = x.astype(jnp.float32)
    centred -= centred.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return (normal * (1 + scale) + shift).astype(x.dtype)


def layer_norm(x: Float[Array, "*S c"], epsilon: float, name: str) -> Float[Array, "*S c"]:
    """Normalisation of each token, with weights."""
    norm = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
    return norm(x).astype(x.dtype)


def _heads(spec: Architecture, x: Float[Array, "B S d"], name: str) -> Float[Array, "B S c"]:
    """Queries, keys or values of all heads."""
    return nn.Dense(spec.width, dtype=jnp.dtype(spec.dtype), name=name)(x)


def _normed_heads(
    spec: Architecture, x: Float[Array, "B S c"], name: str
) -> Float[Array, "B S heads head_dim"]:
    """Queries or keys over their root mean square, which is that of all heads together."""
    norm = nn.RMSNorm(epsilon=spec.eps, dtype=jnp.float32, name=name)
    return _split(spec, norm(x).astype(x.dtype))


def _split(spec: Architecture, x: Float[Array, "B S c"]) -> Float[Array, "B S heads head_dim"]:
    return x.reshape(*x.shape[:2], spec.num_attention_heads, spec.attention_head_dim)


def _merged(spec: Architecture, x: Float[Array, "B S heads head_dim"]) -> Float[Array, "B S c"]:
    out = nn.Dense(spec.width, dtype=jnp.dtype(spec.dtype), name="to_out_0")
    return out(x.reshape(*x.shape[:2], -1))


def _sequence(x: Tokens) -> Float[Array, "B S c"]:
    return x.reshape(len(x), -1, x.shape[-1])
