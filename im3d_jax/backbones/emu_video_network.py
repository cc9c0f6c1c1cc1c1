"""The factorised UNet of Emu Video: Stable Diffusion's layout with 1D temporal layers after spatial ones.

Girdhar et al. 2023 (arXiv 2311.10709); IM-3D Sec. 3.1. Temporal layers are the identity at initialisation and
are skipped for a single frame. Arrays are [B, K, h, w, c].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones.attention import Attention, columns, from_columns, geglu
from im3d_jax.backbones.layers import (
    RANDOM,
    ZEROS,
    TemporalConv,
    append_image,
    group_norm,
    layer_norm,
    remat,
    sinusoids,
    upsample,
)
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.conditions.words import WordEncoder


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has."""

    spec: Any

    @nn.compact
    def __call__(self, noisy, timestep, conditioning: Conditioning):
        spec = self.spec
        width = spec.model_channels
        dtype = jnp.dtype(spec.dtype)
        block = Block(spec, _frame_azimuths(noisy.shape[1]))
        attended = spec.attention_levels
        text = self._text(conditioning)
        emb = nn.Dense(4 * width, name="time_embedding_1")(sinusoids(timestep, width))
        emb = nn.Dense(4 * width, name="time_embedding_2")(nn.silu(emb))
        emb = FrameEmbedding(name="temporal_embedding")(emb, noisy.shape[1])

        x = _with_image(noisy, conditioning, spec).astype(dtype)
        x = InputConv(width, noisy.shape[-1], dtype, name="conv_in")(x)
        x = block.temporal_conv(x, "conv_in_temporal")
        skips = [x]
        for level, mult in enumerate(spec.channel_mult):
            for i in range(spec.num_res_blocks[level]):
                x = block(x, emb, text, level, mult * width, f"down_{level}_{i}", level in attended)
                skips.append(x)
            if level + 1 < len(spec.channel_mult):
                x = block.conv(x, mult * width, f"down_{level}_sample", stride=2)
                skips.append(x)
        last = len(spec.channel_mult) - 1
        x = block(x, emb, text, last, x.shape[-1], "middle_0", attend=True)
        x = block(x, emb, text, last, x.shape[-1], "middle_1", attend=False)
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            for i in range(spec.num_res_blocks[level] + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = block(x, emb, text, level, mult * width, f"up_{level}_{i}", level in attended)
            if level:
                x = upsample(x)
                x = block.conv(x, mult * width, f"up_{level}_sample")
        features = nn.silu(GroupNorm(name="norm_out")(x))
        x = nn.Conv(noisy.shape[-1], (3, 3), kernel_init=ZEROS, dtype=dtype, name="conv_out")(features)
        x = block.temporal_conv(x, "conv_out_temporal")
        if spec.copy_gate and noisy.shape[1] > 1:
            x = CopyGate(dtype, name="temporal_copy_gate")(features, x, conditioning)
        return x.astype(jnp.float32)

    def _text(self, conditioning: Conditioning):
        """One (tokens [B, L, d], mask [B, L]) for each text encoder."""
        if not self.spec.vocabulary:
            return list(zip(conditioning.text, conditioning.text_mask, strict=True))
        encoder = WordEncoder(self.spec.vocabulary, self.spec.text_dims[0], name="text_encoder")
        (words,), (mask,) = conditioning.text, conditioning.text_mask
        return [(encoder(words, mask), mask)]


@dataclass(frozen=True)
class Block:
    """Builds the pieces of one level: calls create submodules of the UNet that is being traced."""

    spec: Any
    azimuths: np.ndarray

    def __call__(self, x, emb, text, level, channels, name, attend):
        """Residual block, then if it is to `attend` spatial and temporal attention."""
        spec = self.spec
        x = remat(ResBlock, spec.remat)(spec, channels, self, name=f"{name}_res")(x, emb)
        if attend:
            x = remat(SpatialTransformer, spec.remat)(spec, name=f"{name}_attention")(x, text)
            if x.shape[1] > 1:
                transformer = remat(TemporalTransformer, spec.remat)
                name = f"{name}_temporal_attention"
                x = transformer(spec, spec.temporal_span[level], name=name)(x, self.azimuths)
        return x

    def conv(self, x, channels, name, stride=1):
        """3x3 spatial convolution and the temporal one that follows it."""
        dtype = jnp.dtype(self.spec.dtype)
        x = nn.Conv(channels, (3, 3), (stride, stride), padding=1, dtype=dtype, name=name)(x)
        return self.temporal_conv(x, f"{name}_temporal")

    def temporal_conv(self, x, name):
        if x.shape[1] == 1:
            return x
        dtype = jnp.dtype(self.spec.dtype)
        return TemporalConv(dtype, _identity_in_time, self.spec.closed_orbit, name=name)(x)


# ---- Spatial layers: the text-to-image model ----


class GroupNorm(nn.Module):
    """Group normalisation of each frame by itself."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        return group_norm(x, math.gcd(32, x.shape[-1]), self.epsilon, "norm")


class LayerNorm(nn.Module):
    """Normalisation of each token."""

    @nn.compact
    def __call__(self, x):
        return layer_norm(x, "norm")


class InputConv(nn.Module):
    """The first convolution. The weights of the channels beyond the noisy latent start at zero."""

    features: int
    noisy_channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def kernel(key, shape, dtype=jnp.float32):
            spatial = RANDOM(key, (*shape[:2], self.noisy_channels, shape[3]), dtype)
            return jnp.zeros(shape, dtype).at[:, :, : self.noisy_channels].set(spatial)

        return nn.Conv(self.features, (3, 3), kernel_init=kernel, dtype=self.dtype, name="conv")(x)


class ResBlock(nn.Module):
    """Two normalised convolutions with the noise level added between them."""

    spec: Any
    channels: int
    block: Block

    @nn.compact
    def __call__(self, x, emb):
        dtype = jnp.dtype(self.spec.dtype)
        h = self.block.conv(nn.silu(GroupNorm(name="norm1")(x)), self.channels, "conv1")
        h += nn.Dense(self.channels, dtype=dtype, name="emb")(nn.silu(emb))[:, :, None, None]
        h = self.block.conv(nn.silu(GroupNorm(name="norm2")(h)), self.channels, "conv2")
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=dtype, name="shortcut")(x)
        return x + h


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to the text."""

    spec: Any

    @nn.compact
    def __call__(self, x, text):
        spec, (b, k, h, w, c) = self.spec, x.shape
        dtype = jnp.dtype(spec.dtype)
        heads = _heads(spec, c)
        tokens = GroupNorm(1e-6, name="norm")(x).reshape(b * k, h * w, c)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(tokens)
        for layer in range(spec.num_transformer_layers):
            words, mask = text[layer % len(text)]
            # Queries of all frames of an asset share its text, so no copy of the text for each frame.
            y = LayerNorm(name=f"norm1_{layer}")(tokens)
            tokens += Attention(**heads, query_chunk=spec.query_chunk, name=f"self_{layer}")(y, y)
            y = LayerNorm(name=f"norm2_{layer}")(tokens).reshape(b, k * h * w, c)
            cross = Attention(**heads, name=f"cross_{layer}")(y, words.astype(dtype), mask)
            tokens += cross.reshape(tokens.shape)
            y = LayerNorm(name=f"norm3_{layer}")(tokens)
            tokens += FeedForward(spec.ff_mult, dtype, name=f"ff_{layer}")(y)
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens).reshape(x.shape)


class FeedForward(nn.Module):
    """GEGLU feed-forward layer of `mult` times the width."""

    mult: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        gated = geglu(x, self.mult * channels, self.dtype, "ff_in")
        return nn.Dense(channels, dtype=self.dtype, name="ff_out")(gated)


# ---- Temporal layers: identity at initialisation, skipped for a single frame ----


class FrameEmbedding(nn.Module):
    """Adds a frame's azimuth to the noise level's embedding: [B, d] -> [B, K, d]; zero at initialisation.

    Paper: no camera input. Here: none either, since the azimuth follows from the frame's number.
    """

    @nn.compact
    def __call__(self, emb, num_frames):
        emb = jnp.broadcast_to(emb[:, None], (emb.shape[0], num_frames, emb.shape[-1]))
        if num_frames == 1:
            return emb
        project = nn.Dense(emb.shape[-1], use_bias=False, kernel_init=ZEROS, dtype=emb.dtype)
        return emb + project(_frame_azimuths(num_frames).astype(emb.dtype))[None]


class CopyGate(nn.Module):
    """Blends the image that is given into every view; almost closed at initialisation."""

    dtype: Any

    @nn.compact
    def __call__(self, features, drawn, conditioning: Conditioning):
        init = {"kernel_init": ZEROS, "bias_init": nn.initializers.constant(-3.0)}
        gate = nn.sigmoid(nn.Conv(drawn.shape[-1], (3, 3), dtype=self.dtype, name="conv", **init)(features))
        gate *= conditioning.image_mask[:, None, None, None, None].astype(self.dtype)
        return gate * conditioning.image[:, None].astype(self.dtype) + (1 - gate) * drawn


class TemporalTransformer(nn.Module):
    """Attention across frames; `span` says which of their places it sees (see `Model.temporal_span`)."""

    spec: Any
    span: str

    @nn.compact
    def __call__(self, x, azimuths):
        spec, (h, w, c) = self.spec, x.shape[2:]
        dtype = jnp.dtype(spec.dtype)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(GroupNorm(1e-6, name="norm")(x))
        tokens += nn.Dense(c, dtype=dtype, name="azimuth")(azimuths.astype(dtype))[None, :, None, None]
        if self.span != "pixel":
            place = self.param("place", _places, (h, w, c)).astype(dtype)
            tokens += place[None, None]
        for layer in range(spec.num_transformer_layers):
            y = LayerNorm(name=f"norm1_{layer}")(tokens)
            queries, context = _pair(y, self.span)
            # Across places, a token first looks at its likes: queries and keys are the tokens themselves.
            alike = RANDOM if self.span == "pixel" else _identity
            out = Attention(**_heads(spec, c), qk_init=alike, name=f"self_{layer}")(queries, context)
            tokens += from_columns(out, x.shape) if self.span == "pixel" else out.reshape(x.shape)
            y = LayerNorm(name=f"norm2_{layer}")(tokens)
            tokens += FeedForward(spec.ff_mult, dtype, name=f"ff_{layer}")(y)
        return x + nn.Dense(c, kernel_init=ZEROS, dtype=dtype, name="proj_out")(tokens)


def _pair(tokens, span):
    """Queries and context of temporal attention from tokens [B, K, h, w, c]."""
    b, k, h, w, c = tokens.shape
    if span == "pixel":
        return columns(tokens), columns(tokens)
    everything = tokens.reshape(b, k * h * w, c)
    return everything, everything[:, : h * w] if span == "first" else everything


def _heads(spec, channels) -> dict:
    """Arguments of `Attention` in a layer that is `channels` wide."""
    heads = spec.num_heads_of(channels)
    return dict(num_heads=heads, head_dim=channels // heads, dtype=spec.dtype, out_name="to_out")


def _identity(key, shape, dtype=jnp.float32):
    return jnp.eye(*shape, dtype=dtype)


def _identity_in_time(key, shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype).at[1].set(jnp.eye(shape[-1], dtype=dtype))


def _places(key, shape, dtype=jnp.float32) -> Float[Array, "h w c"]:
    """Sinusoids of row and column, of unit size: small random ones would take long to tell apart."""
    height, width, channels = shape
    waves = np.pi / np.geomspace(1, 16, channels // 4)
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    phases = (place[..., None] * waves).reshape(height, width, -1)
    features = np.sqrt(2) * np.concatenate([np.sin(phases), np.cos(phases)], -1)
    return jnp.asarray(np.pad(features, ((0, 0), (0, 0), (0, channels - features.shape[-1]))), dtype)


def _frame_azimuths(num_frames: int, harmonics: int = 4) -> np.ndarray:
    """Features [K, 2 * harmonics] of the azimuth 2 pi k / K of each frame."""
    angles = 2 * np.pi * np.arange(num_frames) / num_frames
    phases = angles[:, None] * np.arange(1, harmonics + 1)
    return np.concatenate([np.cos(phases), np.sin(phases)], -1).astype(np.float32)


def _with_image(noisy, conditioning: Conditioning, spec):
    """Appends the image and its mask, and shows it in the place of view 0 where that comes in clean."""
    if spec.clean_first_view:
        given = conditioning.image_mask[:, None, None, None]
        noisy = noisy.at[:, 0].set(noisy[:, 0] * (1 - given) + conditioning.image * given)
    return append_image(noisy, conditioning, spec.image_in_every_view)
