"""The networks of Wan's autoencoders (Wan Team 2025, arXiv 2503.20314), which compress time as well.

Every convolution along time sees its own and earlier frames alone, so a clip can be encoded and decoded in
chunks: each layer keeps the last frames that it saw, in the Flax collection "past". The first picture of a
clip has a latent frame of its own, and each further one holds four pictures. Whether a chunk is the first of
its clip is said by `first`.

Two families: Wan 2.1's with 16 latent channels, and Wan 2.2's with 48, whose levels have a shortcut around
them and whose pictures enter as patches of 2 x 2 pixels. Arrays are clips [B, F, H, W, C]. Modules carry
diffusers' names, so that a parameter's path says the name of its tensor in a checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.autoencoders.wan_sizes import Architecture
from im3d_jax.backbones.attention import attend
from im3d_jax.backbones.layers import RANDOM, ZEROS, upsample

Clips = Float[Array, "B _ _ _ _"]
"""B clips, channels last. Frames, sides and channels change on the way."""


class Network(nn.Module):
    """The encoder and the decoder, with the 1x1x1 convolutions between them."""

    spec: Architecture

    def setup(self):
        spec = self.spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.quant_conv = _conv(spec, 2 * spec.z_dim, 1)
        self.post_quant_conv = _conv(spec, spec.z_dim, 1)

    def encode(self, images: Clips, first: bool) -> Float[Array, "B f h w c"]:
        """Images in [-1, 1] -> the means of the posterior, not normalised."""
        moments = self.quant_conv(self.encoder(to_patches(images, self.spec.patch_size), first))
        return moments[..., : self.spec.z_dim].astype(jnp.float32)

    def decode(self, latents: Float[Array, "B f h w c"], first: bool) -> Clips:
        """Latents, not normalised -> images around [-1, 1]."""
        images = self.decoder(self.post_quant_conv(latents), first)
        return from_patches(images.astype(jnp.float32), self.spec.patch_size)

    def __call__(self, images: Clips) -> Clips:
        return self.decode(self.encode(images, True), True)


class Encoder(nn.Module):
    """Images, with patches as channels -> the channels of the posterior, before the 1x1x1 convolution."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips, first: bool) -> Float[Array, "B f h w c2"]:
        spec = self.spec
        x = _conv(spec, spec.base_dim, name="conv_in")(x)
        if spec.is_residual:
            for level in range(spec.num_levels):
                x = ResidualDownBlock(spec, level, name=f"down_blocks_{level}")(x, first)
        else:
            x = self._plain_levels(x, first)
        x = MidBlock(spec, name="mid_block")(x)
        x = nn.silu(Norm(name="norm_out")(x))
        return _conv(spec, 2 * spec.z_dim, name="conv_out")(x)

    def _plain_levels(self, x: Clips, first: bool) -> Clips:
        """The blocks of all levels, which are numbered through."""
        spec, number = self.spec, 0
        for level, multiple in enumerate(spec.dim_mult):
            for _ in range(spec.num_res_blocks):
                x = ResBlock(spec, multiple * spec.base_dim, name=f"down_blocks_{number}")(x)
                number += 1
            if level + 1 < spec.num_levels:
                over_time = spec.temperal_downsample[level]
                x = Downsample(spec, over_time, name=f"down_blocks_{number}")(x, first)
                number += 1
        return x


class Decoder(nn.Module):
    """Latents, after the 1x1x1 convolution -> images, with patches as channels."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Float[Array, "B f h w c"], first: bool) -> Clips:
        spec = self.spec
        x = _conv(spec, spec.dim_mult[-1] * spec.decoder_width, name="conv_in")(x)
        x = MidBlock(spec, name="mid_block")(x)
        for level in range(spec.num_levels):
            x = UpBlock(spec, level, name=f"up_blocks_{level}")(x, first)
        x = nn.silu(Norm(name="norm_out")(x))
        return _conv(spec, spec.out_channels, name="conv_out")(x)


# ---- Levels ----


class ResidualDownBlock(nn.Module):
    """A level of the second family on the way down, with a shortcut that averages what it brings together."""

    spec: Architecture
    level: int

    @nn.compact
    def __call__(self, x: Clips, first: bool) -> Clips:
        spec = self.spec
        channels, is_last = spec.dim_mult[self.level] * spec.base_dim, self.level + 1 == spec.num_levels
        over_time = not is_last and spec.temperal_downsample[self.level]
        y = x
        for i in range(spec.num_res_blocks):
            y = ResBlock(spec, channels, name=f"resnets_{i}")(y)
        if not is_last:
            y = Downsample(spec, over_time, name="downsampler")(y, first)
        return y + averaged(x, channels, 1 + over_time, 1 if is_last else 2)


class UpBlock(nn.Module):
    """A level on the way up; in the second family with a shortcut that repeats what it spreads."""

    spec: Architecture
    level: int

    @nn.compact
    def __call__(self, x: Clips, first: bool) -> Clips:
        spec = self.spec
        channels = spec.dim_mult[::-1][self.level] * spec.decoder_width
        y = x
        for i in range(spec.num_res_blocks + 1):
            y = ResBlock(spec, channels, name=f"resnets_{i}")(y)
        if self.level + 1 == spec.num_levels:
            return y
        over_time = spec.temperal_downsample[::-1][self.level]
        if not spec.is_residual:
            return Upsample(spec, channels // 2, over_time, name="upsamplers_0")(y, first)
        y = Upsample(spec, channels, over_time, name="upsampler")(y, first)
        return y + repeated(x, channels, 1 + over_time, 2, first)


class Downsample(nn.Module):
    """Halves the sides, and the frames if `over_time`: the first of a clip stays, and two become one."""

    spec: Architecture
    over_time: bool

    @nn.compact
    def __call__(self, x: Clips, first: bool) -> Clips:
        dtype, sides = jnp.dtype(self.spec.dtype), ((0, 1), (0, 1))
        x = nn.Conv(x.shape[-1], (3, 3), (2, 2), padding=sides, dtype=dtype, name="resample_1")(x)
        if not self.over_time:
            return x
        conv = TimeConv(self.spec, x.shape[-1], stride=2, name="time_conv")
        if not first:
            return conv(remembering(self, x, 1))
        remembering(self, x, 1)
        return jnp.concatenate([x[:, :1], conv(x)], 1) if x.shape[1] > 1 else x


class Upsample(nn.Module):
    """Doubles the sides, and the frames if `over_time`: the first of a clip stays, and one becomes two."""

    spec: Architecture
    channels: int
    over_time: bool

    @nn.compact
    def __call__(self, x: Clips, first: bool) -> Clips:
        if self.over_time:
            x = jnp.concatenate([x[:, :1], self._doubled(x[:, 1:])], 1) if first else self._doubled(x)
        dtype = jnp.dtype(self.spec.dtype)
        return nn.Conv(self.channels, (3, 3), padding=1, dtype=dtype, name="resample_1")(upsample(x))

    def _doubled(self, x: Clips) -> Clips:
        """Two frames from each. The first frame of a clip is not among those that they are made of."""
        seen = remembering(self, x, 2)
        if not x.shape[1]:
            return x
        batch, frames, height, width, channels = x.shape
        y = TimeConv(self.spec, 2 * channels, name="time_conv")(seen)
        y = y.reshape(batch, frames, height, width, 2, channels).transpose(0, 1, 4, 2, 3, 5)
        return y.reshape(batch, 2 * frames, height, width, channels)


class MidBlock(nn.Module):
    """Two residual blocks with attention within each frame between them."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        x = ResBlock(self.spec, x.shape[-1], name="resnets_0")(x)
        x = Attention(self.spec, name="attentions_0")(x)
        return ResBlock(self.spec, x.shape[-1], name="resnets_1")(x)


# ---- Layers ----


class ResBlock(nn.Module):
    """Two normalised convolutions around a residual."""

    spec: Architecture
    channels: int

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        spec, channels = self.spec, self.channels
        y = _conv(spec, channels, name="conv1")(nn.silu(Norm(name="norm1")(x)))
        y = _conv(spec, channels, name="conv2")(nn.silu(Norm(name="norm2")(y)))
        return y + (x if x.shape[-1] == channels else _conv(spec, channels, 1, name="conv_shortcut")(x))


class Attention(nn.Module):
    """Residual self-attention with one head over the places of each frame."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        batch, frames, height, width, channels = x.shape
        dtype = jnp.dtype(self.spec.dtype)
        tokens = Norm(name="norm")(x).reshape(batch * frames, height * width, 1, channels)
        q, k, v = jnp.split(nn.Dense(3 * channels, dtype=dtype, name="to_qkv")(tokens), 3, -1)
        return x + nn.Dense(channels, dtype=dtype, name="proj")(attend(q, k, v)).reshape(x.shape)


class Norm(nn.Module):
    """The channels of each place over their root mean square, in float32, times a weight."""

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)
        wide = x.astype(jnp.float32)
        length = jnp.sqrt((wide**2).sum(-1, keepdims=True))
        unit = (wide / jnp.maximum(length, 1e-12)).astype(x.dtype)
        return unit * x.shape[-1] ** 0.5 * gamma.reshape(1, 1, 1, 1, -1)


class CausalConv(nn.Module):
    """A convolution over `kernel` frames, rows and columns, of which no frame is a later one."""

    spec: Architecture
    channels: int
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        side = self.kernel
        seen = remembering(self, x, side - 1) if side > 1 else x
        kernel, bias = _weights(self, (side, side, side, x.shape[-1], self.channels))
        seen = seen.astype(self.spec.dtype)

        # As many 2D convolutions as frames: XLA takes twice as long for one in 3D on a CPU.
        def tap(i: int) -> Clips:
            frames = seen[:, i : i + x.shape[1]]
            flat = frames.reshape(-1, *frames.shape[2:])
            layout = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(flat, kernel[i], (1, 1), "SAME", dimension_numbers=layout)
            return y.reshape(*frames.shape[:-1], -1)

        return sum(tap(i) for i in range(side)) + bias


class TimeConv(nn.Module):
    """A convolution over three frames, without any before the first; every `stride`-th of its results."""

    spec: Architecture
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        kernel, bias = _weights(self, (3, 1, 1, x.shape[-1], self.channels))
        x, last = x.astype(self.spec.dtype), x.shape[1] - 2
        return sum(x[:, i : i + last : self.stride] @ kernel[i, 0, 0] for i in range(3)) + bias


def _conv(spec: Architecture, channels: int, kernel: int = 3, **kwargs: Any) -> CausalConv:
    return CausalConv(spec, channels, kernel, **kwargs)


def _weights(
    module: CausalConv | TimeConv, shape: tuple[int, ...]
) -> tuple[Float[Array, "t i j c d"], Float[Array, "1 1 1 1 d"]]:
    dtype = jnp.dtype(module.spec.dtype)
    bias = module.param("bias", ZEROS, shape[-1:]).reshape(1, 1, 1, 1, -1)
    return module.param("kernel", RANDOM, shape).astype(dtype), bias.astype(dtype)


def remembering(module: nn.Module, x: Clips, count: int) -> Clips:
    """The frames of a chunk after the `count` last ones of earlier chunks; zeros come before a clip.

    The module keeps the last frames of what is returned for the next chunk.
    """
    shape = (len(x), count, *x.shape[2:])
    past = module.variable("past", "frames", jnp.zeros, shape, x.dtype)
    seen = jnp.concatenate([past.value, x], 1)
    past.value = seen[:, -count:]
    return seen


# ---- Shortcuts and patches ----


def averaged(x: Clips, channels: int, time: int, side: int) -> Clips:
    """Blocks of time x side x side values as channels, of which neighbouring ones are averaged to `channels`.

    Zeros come before the first frame where frames do not fill a block.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), *((0, 0),) * 3))
    batch, frames, height, width, _ = x.shape
    x = x.reshape(batch, frames // time, time, height // side, side, width // side, side, -1)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], channels, -1).mean(-1)


def repeated(x: Clips, channels: int, time: int, side: int, first: bool) -> Clips:
    """The values of each place, repeated as channels, in a block of time x side x side places.

    The first frame of a clip has no frames before it, so that only the last of its block stays.
    """
    batch, frames, height, width, own = x.shape
    x = jnp.repeat(x, channels * time * side * side // own, axis=-1)
    x = x.reshape(batch, frames, height, width, channels, time, side, side)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * time, height * side, width * side, channels)
    return x[:, time - 1 :] if first else x


def to_patches(images: Clips, size: int) -> Clips:
    """Squares of `size` x `size` pixels as channels: channel, column and row of a pixel, in this order."""
    batch, frames, height, width, channels = images.shape
    x = images.reshape(batch, frames, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(*x.shape[:4], math.prod(x.shape[4:]))


def from_patches(patches: Clips, size: int) -> Clips:
    """The inverse of `to_patches`."""
    batch, frames, height, width, _ = patches.shape
    x = patches.reshape(batch, frames, height, width, -1, size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(batch, frames, height * size, width * size, -1)
