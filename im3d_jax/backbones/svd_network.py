"""The UNet of SVD and SV3D, whose modules have the names of diffusers' UNetSpatioTemporalConditionModel.

A temporal residual block follows every spatial one, a temporal transformer every spatial one, and each pair
is blended by a learned number (Blattmann et al. 2023, arXiv 2311.15127). Arrays are [B, K, h, w, c];
K is in the network's own order of frames.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from im3d_jax.backbones.attention import TransformerBlock, columns, from_columns
from im3d_jax.backbones.layers import (
    ZEROS,
    Embedding,
    Mixer,
    Resample,
    ResBlock,
    TemporalResBlock,
    group_norm,
    remat,
    sinusoids,
    upsample,
)

GROUPS = 32  # of channels that are normalised together


class UNet(nn.Module):
    """The whole network on its own order of frames; `spec` is the `Model` whose sizes it has."""

    spec: Any

    @nn.compact
    def __call__(self, noisy, timestep, image, tokens, vector):
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        width, levels = spec.block_out_channels[0], range(len(spec.block_out_channels))
        emb = Embedding(4 * width, name="time_embedding")(sinusoids(timestep, width))[:, None]
        emb += Embedding(4 * width, name="add_embedding")(vector)
        tokens = tokens.astype(dtype)

        x = jnp.concatenate([noisy, jnp.broadcast_to(image[:, None], noisy.shape)], -1).astype(dtype)
        x = nn.Conv(width, (3, 3), dtype=dtype, name="conv_in")(x)
        skips = [x]
        for level in levels:
            x, outputs = DownBlock(spec, level, name=f"down_blocks_{level}")(x, emb, tokens)
            skips += outputs
        x = MidBlock(spec, name="mid_block")(x, emb, tokens)
        for i, level in enumerate(reversed(levels)):
            taken = spec.layers_per_block + 1
            x = UpBlock(spec, level, name=f"up_blocks_{i}")(x, skips[-taken:], emb, tokens)
            skips = skips[:-taken]
        x = nn.silu(group_norm(x, GROUPS, 1e-5, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class DownBlock(nn.Module):
    """One level on the way down. Returns its result and the outputs of all its layers, for the way up."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, emb, tokens):
        spec, level, outputs = self.spec, self.level, []
        attend = level in spec.attention_levels
        for i in range(spec.layers_per_block):
            eps = spec.groupnorm_eps if attend else 1e-5
            x = _res_block(spec, level, eps, i)(x, emb)
            if attend:
                x = _transformer(spec, level, i)(x, tokens)
            outputs.append(x)
        if level + 1 < len(spec.block_out_channels):
            x = Resample(stride=2, dtype=spec.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """The middle of the network, with attention whatever the levels have."""

    spec: Any

    @nn.compact
    def __call__(self, x, emb, tokens):
        spec, level = self.spec, len(self.spec.block_out_channels) - 1
        x = _res_block(spec, level, 1e-5, 0)(x, emb)
        x = _transformer(spec, level, 0)(x, tokens)
        return _res_block(spec, level, 1e-5, 1)(x, emb)


class UpBlock(nn.Module):
    """One level on the way up; takes `skips` from the way down, the last one first."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, skips, emb, tokens):
        spec, level = self.spec, self.level
        for i, skip in enumerate(reversed(skips)):
            x = _res_block(spec, level, spec.groupnorm_eps, i)(jnp.concatenate([x, skip], -1), emb)
            if level in spec.attention_levels:
                x = _transformer(spec, level, i)(x, tokens)
        if level:
            x = upsample(x)
            x = Resample(stride=1, dtype=spec.dtype, name="upsamplers_0")(x)
        return x


def _res_block(spec, level, epsilon, index):
    block = remat(SpatioTemporalResBlock, spec.remat)
    return block(spec.block_out_channels[level], epsilon, spec.dtype, name=f"resnets_{index}")


def _transformer(spec, level, index):
    block = remat(SpatioTemporalTransformer, spec.remat)
    heads = spec.num_attention_heads[level]
    return block(heads, spec.query_chunk, spec.dtype, name=f"attentions_{index}")


class SpatioTemporalResBlock(nn.Module):
    """A residual block on each frame, blended with one on each pixel's frames."""

    channels: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, emb):
        x = ResBlock(self.channels, GROUPS, self.epsilon, self.dtype, name="spatial_res_block")(x, emb)
        y = TemporalResBlock(GROUPS, self.epsilon, self.dtype, ZEROS, name="temporal_res_block")(x, emb)
        return Mixer(name="time_mixer")(x, y)


class SpatioTemporalTransformer(nn.Module):
    """Attention within each frame and to the image's embedding, blended with attention across frames."""

    num_heads: int
    query_chunk: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        (b, k, h, w, c), dtype = x.shape, self.dtype
        sizes = dict(num_heads=self.num_heads, head_dim=c // self.num_heads, dtype=dtype)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(group_norm(x, GROUPS, 1e-6, "norm"))
        within = TransformerBlock(**sizes, query_chunk=self.query_chunk, name="transformer_blocks_0")
        tokens = within(tokens.reshape(b * k, h * w, c), context).reshape(x.shape)
        place = Embedding(4 * c, c, ZEROS, name="time_pos_embed")(sinusoids(jnp.arange(k), c))
        placed = columns(tokens + place.astype(dtype)[None, :, None, None])
        name = "temporal_transformer_blocks_0"
        across = TransformerBlock(**sizes, out_init=ZEROS, ff_first=True, name=name)
        tokens = Mixer(name="time_mixer")(tokens, from_columns(across(placed, context), x.shape))
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens)
