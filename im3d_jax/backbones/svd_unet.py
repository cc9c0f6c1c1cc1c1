"""The UNet of SVD and SV3D, whose modules have the names of diffusers' UNetSpatioTemporalConditionModel.

A temporal residual block follows every spatial one, a temporal transformer every spatial one, and each pair
is blended by a learned number (Blattmann et al. 2023, arXiv 2311.15127). Arrays are [B, K, h, w, c];
K is in the network's own order of frames.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FLASH_LENGTH = 256
"""Tokens from which attention is not to keep its matrix: an image has as many, a video's frames do not."""


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
        x = nn.silu(_group_norm(x, 1e-5, "conv_norm_out"))
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
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = Resample(stride=1, dtype=spec.dtype, name="upsamplers_0")(x)
        return x


def _res_block(spec, level, epsilon, index):
    channels = spec.block_out_channels[level]
    return _remat(spec, SpatioTemporalResBlock)(channels, epsilon, spec.dtype, name=f"resnets_{index}")


def _transformer(spec, level, index):
    heads = spec.num_attention_heads[level]
    return _remat(spec, SpatioTemporalTransformer)(heads, spec.dtype, name=f"attentions_{index}")


def _remat(spec, module):
    """The module, recomputed in the backward pass as `spec.remat` says."""
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, spec.remat)) if spec.remat else module


class Resample(nn.Module):
    """The convolution that halves the latent's sides, or follows their doubling."""

    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        return nn.Conv(x.shape[-1], (3, 3), strides, padding=1, dtype=self.dtype, name="conv")(x)


class SpatioTemporalResBlock(nn.Module):
    """A residual block on each frame, blended with one on each pixel's frames."""

    channels: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, emb):
        x = ResBlock(self.channels, self.epsilon, self.dtype, name="spatial_res_block")(x, emb)
        y = TemporalResBlock(self.epsilon, self.dtype, name="temporal_res_block")(x, emb)
        return Mixer(name="time_mixer")(x, y)


class ResBlock(nn.Module):
    """Two normalised convolutions of each frame, with the embedding [B, K, d] added between them."""

    channels: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, emb):
        dtype = self.dtype
        h = nn.silu(_group_norm(x, self.epsilon, "norm1"))
        h = nn.Conv(self.channels, (3, 3), dtype=dtype, name="conv1")(h)
        h += nn.Dense(self.channels, dtype=dtype, name="time_emb_proj")(nn.silu(emb))[:, :, None, None]
        h = nn.silu(_group_norm(h, self.epsilon, "norm2"))
        h = nn.Conv(self.channels, (3, 3), dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=dtype, name="conv_shortcut")(x)
        return x + h


class TemporalResBlock(nn.Module):
    """The same along frames, normalised over all of them; the identity at initialisation."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, emb):
        dtype, channels, zeros = self.dtype, x.shape[-1], nn.initializers.zeros
        h = nn.silu(_group_norm(x, self.epsilon, "norm1", over_frames=True))
        h = TemporalConv(dtype, name="conv1")(h)
        h += nn.Dense(channels, dtype=dtype, name="time_emb_proj")(nn.silu(emb))[:, :, None, None]
        h = nn.silu(_group_norm(h, self.epsilon, "norm2", over_frames=True))
        return x + TemporalConv(dtype, zeros, name="conv2")(h)


class TemporalConv(nn.Module):
    """1D convolution over frames, kernel 3, as shifted matrix products."""

    dtype: Any
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, channels, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        return sum(padded[:, i : i + x.shape[1]] @ kernel[i] for i in range(3)) + bias[None, None, None, None]


class Mixer(nn.Module):
    """Blends a spatial and a temporal result by the sigmoid of one learned number."""

    @nn.compact
    def __call__(self, spatial, temporal):
        factor = self.param("mix_factor", nn.initializers.constant(0.5), (1,))
        # Exactly the spatial result where both are the same, which is the identity at initialisation.
        return spatial + (1 - nn.sigmoid(factor[0])).astype(spatial.dtype) * (temporal - spatial)


class SpatioTemporalTransformer(nn.Module):
    """Attention within each frame and to the image's embedding, blended with attention across frames."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, context):
        (b, k, h, w, c), dtype = x.shape, self.dtype
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(_group_norm(x, 1e-6, "norm"))
        tokens = tokens.reshape(b, k, h * w, c)
        tokens = TransformerBlock(self.num_heads, dtype, name="transformer_blocks_0")(tokens, context)
        place = Embedding(4 * c, c, nn.initializers.zeros, name="time_pos_embed")(sinusoids(jnp.arange(k), c))
        block = TemporalTransformerBlock(self.num_heads, dtype, name="temporal_transformer_blocks_0")
        mixed = block(tokens + place.astype(dtype)[None, :, None], context)
        tokens = Mixer(name="time_mixer")(tokens, mixed)
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Attention within each frame's tokens [B, K, S, c] and to the context [B, L, d]."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens, context):
        b, k, s, c = tokens.shape
        y = _layer_norm(tokens, "norm1").reshape(b * k, s, c)
        tokens += Attention(self.num_heads, self.dtype, name="attn1")(y, y).reshape(tokens.shape)
        # Queries of all frames of an asset share its context, so no copy of the context for each frame.
        y = _layer_norm(tokens, "norm2").reshape(b, k * s, c)
        tokens += Attention(self.num_heads, self.dtype, name="attn2")(y, context).reshape(tokens.shape)
        return tokens + FeedForward(self.dtype, name="ff")(_layer_norm(tokens, "norm3"))


class TemporalTransformerBlock(nn.Module):
    """Attention across the frames of each place in tokens [B, K, S, c]; the identity at initialisation."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens, context):
        b, k, s, c = tokens.shape
        zeros = nn.initializers.zeros
        x = tokens.swapaxes(1, 2)
        x += FeedForward(self.dtype, zeros, name="ff_in")(_layer_norm(x, "norm_in"))
        y = _layer_norm(x, "norm1").reshape(b * s, k, c)
        x += Attention(self.num_heads, self.dtype, zeros, name="attn1")(y, y).reshape(x.shape)
        y = _layer_norm(x, "norm2").reshape(b, s * k, c)
        x += Attention(self.num_heads, self.dtype, zeros, name="attn2")(y, context).reshape(x.shape)
        x += FeedForward(self.dtype, zeros, name="ff")(_layer_norm(x, "norm3"))
        return x.swapaxes(1, 2)


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, Q, c] to `context` [B, S, d]."""

    num_heads: int
    dtype: Any
    out_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, queries, context):
        channels = queries.shape[-1]

        def project(x, name):
            y = nn.Dense(channels, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)

        q, k, v = project(queries, "to_q"), project(context, "to_k"), project(context, "to_v")
        out = jax.nn.dot_product_attention(q, k, v, implementation=_implementation(q, k))
        out = out.reshape(queries.shape)
        return nn.Dense(channels, dtype=self.dtype, kernel_init=self.out_init, name="to_out_0")(out)


def _implementation(q, k) -> str | None:
    """cuDNN's flash attention for long sequences in 16 bits on a GPU: JAX does not choose it by itself."""
    long = min(q.shape[1], k.shape[1]) >= FLASH_LENGTH
    return "cudnn" if long and q.dtype.itemsize == 2 and jax.default_backend() == "gpu" else None


class FeedForward(nn.Module):
    """GEGLU feed-forward layer (Shazeer 2020) of four times the width."""

    dtype: Any
    out_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="net_2")(hidden)


class GEGLU(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        projected = nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x)
        hidden, gate = jnp.split(projected, 2, -1)
        return hidden * nn.gelu(gate, approximate=False)


class Embedding(nn.Module):
    """Two linear layers on sinusoids, in float32."""

    width: int
    out_width: int | None = None
    out_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(self.width, name="linear_1")(x))
        return nn.Dense(self.out_width or self.width, kernel_init=self.out_init, name="linear_2")(x)


def _group_norm(x, epsilon, name, over_frames=False):
    """Normalisation in 32 groups of channels of each frame, or of each asset, in float32."""
    axes = (1, 2, 3, 4) if over_frames else (2, 3, 4)
    # The fast variance, E x^2 - (E x)^2, loses its digits where the mean is far beyond the spread.
    settings = dict(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
    return nn.GroupNorm(32, reduction_axes=axes, **settings)(x).astype(x.dtype)


def _layer_norm(x, name):
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(x).astype(x.dtype)


def sinusoids(values: Float[Array, " N"], dim: int) -> Float[Array, "N d"]:
    """Embedding of numbers (Ho et al. 2020): cosines, then sines."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(dim // 2) / (dim // 2))
    phases = values.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], -1)
