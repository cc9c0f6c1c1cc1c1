"""The UNet of ModelScope and I2VGen-XL, whose modules have the names of diffusers' classes.

A spatial layer of Stable Diffusion and a temporal one behind it take turns, each on a residual of its own
(Wang et al. 2023, arXiv 2308.06571; Zhang et al. 2023, arXiv 2311.04145). Arrays are [B, K, h, w, c].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones.attention import Attention, TransformerBlock, columns, from_columns
from im3d_jax.backbones.layers import (
    RANDOM,
    ZEROS,
    Embedding,
    Resample,
    ResBlock,
    TemporalConv,
    append_image,
    group_norm,
    layer_norm,
    remat,
    sinusoids,
    upsample,
)
from im3d_jax.conditions.conditioning import Conditioning

POOLED_SIDE = 32  # to which I2VGen-XL averages the image's latent before it makes tokens of it


class Context(NamedTuple):
    """What spatial transformers attend to: tokens [B, L, d] where mask [B, L] is 1."""

    tokens: Float[Array, "B L d"]
    mask: Float[Array, "B L"]


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has."""

    spec: Any

    @nn.compact
    def __call__(self, noisy, timestep, conditioning: Conditioning):
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        width, levels = spec.block_out_channels[0], range(len(spec.block_out_channels))
        emb = Embedding(4 * width, name="time_embedding")(sinusoids(timestep, width))
        (text,), (mask,) = conditioning.text, conditioning.text_mask
        context, x = Context(text.astype(dtype), mask), noisy.astype(dtype)
        if spec.image == "channels":
            x = append_image(x, conditioning)
        elif spec.image == "i2vgen":
            emb += self._frame_rate(width)
            context = self._with_image_tokens(context, conditioning)
            x = jnp.concatenate([x, self._image_frames(conditioning, noisy.shape[1])], -1)
        emb = emb[:, None]  # the same for every frame

        def kernel_init(key, shape, kernel_dtype=jnp.float32):
            return RANDOM(key, shape, kernel_dtype).at[:, :, noisy.shape[-1] :].set(0)

        x = nn.Conv(width, (3, 3), dtype=dtype, kernel_init=kernel_init, name="conv_in")(x)
        x = TemporalTransformer(spec, 8 * spec.head_dim, name="transformer_in")(x)
        skips = [x]
        for level in levels:
            x, outputs = DownBlock(spec, level, name=f"down_blocks_{level}")(x, emb, context)
            skips += outputs
        x = MidBlock(spec, name="mid_block")(x, emb, context)
        for i, level in enumerate(reversed(levels)):
            taken = spec.layers_per_block + 1
            x = UpBlock(spec, level, name=f"up_blocks_{i}")(x, skips[-taken:], emb, context)
            skips = skips[:-taken]
        x = nn.silu(group_norm(x, spec.norm_num_groups, 1e-5, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)

    # ---- What I2VGen-XL makes of its image ----

    def _frame_rate(self, width):
        """Embedding [1, d] of the frames per second."""
        x = nn.Dense(4 * width, name="fps_embedding_0")(sinusoids(jnp.array([self.spec.fps]), width))
        return nn.Dense(4 * width, name="fps_embedding_2")(nn.silu(x))

    def _with_image_tokens(self, context: Context, conditioning: Conditioning) -> Context:
        """Appends an 8x8 grid of tokens of the image's latent, and c tokens of its CLIP embedding."""
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        channels, dim = spec.latent_shape[-1], spec.cross_attention_dim
        given = conditioning.image_mask[:, None, None]
        conv = dict(kernel_size=(3, 3), padding=1, dtype=dtype)
        halve = dict(conv, strides=(2, 2))
        image = (conditioning.image * given[..., None]).astype(dtype)
        x = nn.silu(nn.Conv(8 * channels, name="image_latents_context_embedding_0", **conv)(image))
        x = _average(x, POOLED_SIDE)
        x = nn.silu(nn.Conv(16 * channels, name="image_latents_context_embedding_3", **halve)(x))
        x = nn.Conv(dim, name="image_latents_context_embedding_5", **halve)(x)
        grid = x.reshape(len(x), -1, dim)

        tokens = conditioning.image_tokens
        tokens = jnp.zeros((len(x), 1, dim), dtype) if tokens is None else (tokens * given).astype(dtype)
        width = 4 * spec.block_out_channels[0]
        x = nn.silu(nn.Dense(width, dtype=dtype, name="context_embedding_0")(tokens))
        x = nn.Dense(channels * dim, dtype=dtype, name="context_embedding_2")(x)
        tokens = jnp.concatenate([context.tokens, grid, x.reshape(len(x), -1, dim)], 1)
        seen = jnp.ones((len(tokens), tokens.shape[1] - context.tokens.shape[1]))
        return Context(tokens, jnp.concatenate([context.mask, seen], 1))

    def _image_frames(self, conditioning: Conditioning, num_frames: int):
        """Features [B, K, h, w, c] of the image at frame 0 and, behind it, of how far a frame is from it."""
        dtype, channels = jnp.dtype(self.spec.dtype), self.spec.latent_shape[-1]
        image = conditioning.image
        distance = jnp.linspace(0, 1, num_frames)[None, :, None, None, None]
        frames = jnp.broadcast_to(distance, (len(image), num_frames, *image.shape[1:])).at[:, 0].set(image)
        x = (frames * conditioning.image_mask[:, None, None, None, None]).astype(dtype)
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_0")(x))
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_2")(x))
        x = nn.Conv(channels, (3, 3), dtype=dtype, name="image_latents_proj_in_4")(x)
        return ImageFrames(dtype, name="image_latents_temporal_encoder")(x)


def _average(x, side: int):
    """Means over a `side` x `side` grid of cells that cover [B, h, w, c], whatever its size."""
    rows, columns = (jnp.asarray(_cells(size, side), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("pi,qj,bijc->bpqc", rows, columns, x)


def _cells(size: int, number: int) -> np.ndarray:
    """Weights [number, size] of the places in each cell. Cells overlap where they do not divide evenly."""
    cell, place = np.arange(number)[:, None], np.arange(size)[None]
    inside = (place >= cell * size // number) & (place < -(-(cell + 1) * size // number))
    return inside / inside.sum(1, keepdims=True)


class ImageFrames(nn.Module):
    """Attention across frames, as wide as the latent, on what is given of the image."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels, dtype, tokens = x.shape[-1], self.dtype, columns(x)
        y = layer_norm(tokens, "norm1")
        tokens += Attention(2, channels, dtype, name="attn1")(y, y)
        hidden = nn.gelu(nn.Dense(4 * channels, dtype=dtype, name="ff_in")(tokens), approximate=False)
        tokens += nn.Dense(channels, dtype=dtype, name="ff_out")(hidden)
        return from_columns(tokens, x.shape)


# ---- Blocks ----


class DownBlock(nn.Module):
    """One level on the way down. Returns its result and the outputs of all its layers, for the way up."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, emb, context):
        spec, outputs = self.spec, []
        last = len(spec.block_out_channels) - 1
        for i in range(spec.layers_per_block):
            x = _residual(spec, self.level, i, x, emb)
            if self.level < last:
                x = _attention(spec, i, x, context)
            outputs.append(x)
        if self.level < last:
            x = Resample(stride=2, dtype=spec.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """The middle of the network, with attention though its level has none."""

    spec: Any

    @nn.compact
    def __call__(self, x, emb, context):
        level = len(self.spec.block_out_channels) - 1
        x = _residual(self.spec, level, 0, x, emb)
        x = _attention(self.spec, 0, x, context)
        return _residual(self.spec, level, 1, x, emb)


class UpBlock(nn.Module):
    """One level on the way up; takes `skips` from the way down, the last one first."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, skips, emb, context):
        spec = self.spec
        for i, skip in enumerate(reversed(skips)):
            x = _residual(spec, self.level, i, jnp.concatenate([x, skip], -1), emb)
            if self.level + 1 < len(spec.block_out_channels):
                x = _attention(spec, i, x, context)
        if self.level:
            x = upsample(x)
            x = Resample(stride=1, dtype=spec.dtype, name="upsamplers_0")(x)
        return x


def _residual(spec, level, index, x, emb):
    """A spatial residual block and the temporal convolutions that follow it, in the module being traced."""
    block, convs = remat(ResBlock, spec.remat), remat(TemporalConvs, spec.remat)
    sizes = spec.block_out_channels[level], spec.norm_num_groups
    x = block(*sizes, 1e-5, spec.dtype, name=f"resnets_{index}")(x, emb)
    return convs(spec, name=f"temp_convs_{index}")(x)


def _attention(spec, index, x, context):
    """A spatial transformer and the temporal one that follows it, in the module being traced."""
    spatial, temporal = remat(SpatialTransformer, spec.remat), remat(TemporalTransformer, spec.remat)
    x = spatial(spec, name=f"attentions_{index}")(x, context)
    return temporal(spec, x.shape[-1], name=f"temp_attentions_{index}")(x)


class TemporalConvs(nn.Module):
    """Four convolutions over frames, each normalised over all of them; the identity at initialisation."""

    spec: Any

    @nn.compact
    def __call__(self, x):
        spec, h = self.spec, x
        for i, init in enumerate((RANDOM, RANDOM, RANDOM, ZEROS), start=1):
            h = nn.silu(group_norm(h, spec.norm_num_groups, 1e-5, f"conv{i}_0", over_frames=True))
            # diffusers counts the layers of a list, and from the second on there is dropout in it.
            h = TemporalConv(spec.dtype, init, name=f"conv{i}_{2 if i == 1 else 3}")(h)
        return x + h


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to the context."""

    spec: Any

    @nn.compact
    def __call__(self, x, context: Context):
        spec, (b, k, h, w, c) = self.spec, x.shape
        sizes = c // spec.head_dim, spec.head_dim, spec.dtype, spec.query_chunk
        tokens = group_norm(x, spec.norm_num_groups, 1e-6, "norm").reshape(b * k, h * w, c)
        tokens = nn.Dense(c, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = TransformerBlock(*sizes, name="transformer_blocks_0")(tokens, *context)
        return x + nn.Dense(c, dtype=spec.dtype, name="proj_out")(tokens).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Self-attention across the frames of each place, twice; the identity at initialisation."""

    spec: Any
    inner_channels: int

    @nn.compact
    def __call__(self, x):
        spec, inner = self.spec, self.inner_channels
        sizes = inner // spec.head_dim, spec.head_dim, spec.dtype
        tokens = columns(group_norm(x, spec.norm_num_groups, 1e-6, "norm", over_frames=True))
        tokens = nn.Dense(inner, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = TransformerBlock(*sizes, name="transformer_blocks_0")(tokens)
        project = nn.Dense(x.shape[-1], dtype=spec.dtype, kernel_init=ZEROS, name="proj_out")
        return x + from_columns(project(tokens), x.shape)
