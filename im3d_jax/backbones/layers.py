"""Layers that the networks of this package share: embeddings of numbers, normalisation, convolution.

Arrays are `Frames` [B, K, h, w, c]: B assets of K frames each, channels last. Layers and their parameters
have the names that they have in diffusers, so that the path of a parameter tells the name of its tensor in a
public checkpoint. Normalisation and the embeddings of numbers are computed in float32, the rest in `dtype`.
Attention and transformers are in `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

from im3d_jax.conditions.conditioning import Conditioning

PARTITION_RULES = (
    (r"(proj_out|to_out_0|ff_out|net_2|conv2|linear_2)/kernel", ("mlp", "embed")),
    (r"/kernel", ("embed", "mlp")),
)
"""Logical names of a parameter's last axes; the first pattern that is found in its path counts."""

Frames = Float[Array, "B K h w c"]
"""The frames of B assets, on their way through a network."""

FrameEmbeddings = Float[Array, "B #K emb"]
"""A vector for each frame of each asset, or one that holds for all frames of an asset."""

AfterConv = Callable[[Frames, str], Frames]
"""What follows a convolution: its result and its name -> the result to go on with."""

RANDOM, ZEROS = nn.initializers.lecun_normal(), nn.initializers.zeros


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module, recomputed in the backward pass except for what `policy` keeps; unchanged if it is ""."""
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, policy)) if policy else module


# ---- What the network is told ----


def sinusoids(values: Num[Array, " N"], dim: int) -> Float[Array, "N {dim}"]:
    """Embedding of numbers (Ho et al. 2020): cosines, then sines."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(dim // 2) / (dim // 2))
    phases = values.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], -1)


class Embedding(nn.Module):
    """Two linear layers that sinusoids go through, in float32."""

    width: int
    out_width: int | None = None
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x: Float[Array, "*N d"]) -> Float[Array, "*N out"]:
        x = nn.silu(nn.Dense(self.width, name="linear_1")(x))
        return nn.Dense(self.out_width or self.width, kernel_init=self.out_init, name="linear_2")(x)


def append_image(
    noisy: Float[Array, "B K h w c"], conditioning: Conditioning, in_every_view: bool = False
) -> Float[Array, "B K h w 2*c+1"]:
    """Appends the image's latent and a mask as channels, as Emu Video does (Girdhar et al. 2023).

    The latent is shown to view 0, or to all views, and is zero elsewhere and where no image is given. The
    mask is 1 at view 0 of assets with an image.
    """
    given = conditioning.image_mask[:, None, None, None].astype(noisy.dtype)
    image = conditioning.image.astype(noisy.dtype) * given
    views = jnp.zeros_like(noisy).at[:, 0].set(image)
    if in_every_view:
        views = jnp.broadcast_to(image[:, None], noisy.shape)
    mask = jnp.zeros_like(noisy[..., :1]).at[:, 0].set(given)
    return jnp.concatenate([noisy, views, mask], -1)


# ---- Normalisation ----


def group_norm(x: Frames, groups: int, epsilon: float, name: str, over_frames: bool = False) -> Frames:
    """Normalisation in groups of channels, of each frame by itself or of all frames of an asset together.

    There are `groups` groups; fewer, the greatest common divisor, where they do not divide the channels.
    """
    return GroupNorm(math.gcd(groups, x.shape[-1]), epsilon, over_frames, name=name)(x)


class GroupNorm(nn.Module):
    """Group normalisation in float32 (Wu and He 2018); see `group_norm`.

    Flax's own reduces over places and the channels of a group at once. Here each channel is reduced over its
    places first, which a CPU does in vectors, and the few sums are brought together afterwards.
    """

    groups: int
    epsilon: float
    over_frames: bool

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        channels, axes = x.shape[-1], (1, 2, 3) if self.over_frames else (2, 3)
        scale = self.param("scale", nn.initializers.ones, (channels,)).reshape(1, 1, 1, 1, -1)
        bias = self.param("bias", ZEROS, (channels,)).reshape(1, 1, 1, 1, -1)

        def mean(values: Frames) -> Array:
            of_channels = values.mean(axes, keepdims=True)
            of_groups = of_channels.reshape(*of_channels.shape[:-1], self.groups, -1).mean(-1)
            return jnp.repeat(of_groups, channels // self.groups, axis=-1)

        # E (x - E x)^2, because E x^2 - (E x)^2 loses its digits where the mean is far beyond the spread.
        centred = x.astype(jnp.float32)
        centred -= mean(centred)
        factor = jax.lax.rsqrt(mean(centred**2) + self.epsilon) * scale
        return (centred * factor + bias).astype(x.dtype)


def layer_norm(x: Float[Array, "*S c"], name: str) -> Float[Array, "*S c"]:
    """Normalisation of each token."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(x).astype(x.dtype)


# ---- Convolution ----


def input_conv(x: Frames, width: int, noisy_channels: int, dtype: Any) -> Float[Array, "B K h w {width}"]:
    """The first convolution, `conv_in`. The weights of the channels beyond the noisy latent start at zero.

    So a network that is told an image on extra channels starts as the one that knew none.
    """

    def kernel_init(key: PRNGKeyArray, shape: tuple[int, ...], kernel_dtype: Any = jnp.float32) -> Array:
        known = RANDOM(key, (*shape[:2], noisy_channels, shape[3]), kernel_dtype)
        return jnp.zeros(shape, kernel_dtype).at[:, :, :noisy_channels].set(known)

    return nn.Conv(width, (3, 3), kernel_init=kernel_init, dtype=dtype, name="conv_in")(x)


def unchanged(x: Frames, name: str) -> Frames:
    """The `AfterConv` that does nothing."""
    return x


class ResBlock(nn.Module):
    """Two normalised convolutions of each frame, around a residual; an embedding is added between them.

    after_conv: what follows each of the two convolutions, such as one along the frames.
    """

    channels: int
    groups: int
    epsilon: float
    dtype: Any
    after_conv: AfterConv = unchanged

    @nn.compact
    def __call__(self, x: Frames, emb: FrameEmbeddings | None = None) -> Float[Array, "B K h w out"]:
        def conv(h: Frames, name: str) -> Float[Array, "B K h w out"]:
            h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name=name)(h)
            return self.after_conv(h, name)

        h = conv(nn.silu(group_norm(x, self.groups, self.epsilon, "norm1")), "conv1")
        h = _add_embedding(h, emb, self.dtype)
        h = conv(nn.silu(group_norm(h, self.groups, self.epsilon, "norm2")), "conv2")
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class TemporalResBlock(nn.Module):
    """The same along frames, normalised over all of them; the identity where `out_init` is zeros."""

    groups: int
    epsilon: float
    dtype: Any
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x: Frames, emb: FrameEmbeddings | None = None) -> Frames:
        h = nn.silu(group_norm(x, self.groups, self.epsilon, "norm1", over_frames=True))
        h = _add_embedding(TemporalConv(self.dtype, name="conv1")(h), emb, self.dtype)
        h = nn.silu(group_norm(h, self.groups, self.epsilon, "norm2", over_frames=True))
        return x + TemporalConv(self.dtype, self.out_init, name="conv2")(h)


def _add_embedding(h: Frames, emb: FrameEmbeddings | None, dtype: Any) -> Frames:
    if emb is None:
        return h
    return h + nn.Dense(h.shape[-1], dtype=dtype, name="time_emb_proj")(nn.silu(emb))[:, :, None, None]


class TemporalConv(nn.Module):
    """1D convolution along the frames of each place, with a kernel of 3, as shifted matrix products.

    closed_orbit: the first and the last frame are neighbours; otherwise both have zeros for a neighbour.
    """

    dtype: Any
    kernel_init: Any = RANDOM
    closed_orbit: bool = False

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, channels, channels)).astype(self.dtype)
        bias = self.param("bias", ZEROS, (channels,)).astype(self.dtype)
        padding = ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))
        padded = jnp.pad(x, padding, mode="wrap" if self.closed_orbit else "constant")
        return sum(padded[:, i : i + x.shape[1]] @ kernel[i] for i in range(3)) + bias[None, None, None, None]


class Resample(nn.Module):
    """The convolution that halves the sides of the latent, or that follows their doubling (stride 1)."""

    stride: int
    dtype: Any
    after_conv: AfterConv = unchanged

    @nn.compact
    def __call__(self, x: Frames) -> Float[Array, "B K h2 w2 c"]:
        strides = (self.stride, self.stride)
        x = nn.Conv(x.shape[-1], (3, 3), strides, padding=1, dtype=self.dtype, name="conv")(x)
        return self.after_conv(x, "conv")


def upsample(x: Float[Array, "B K h w c"]) -> Float[Array, "B K 2*h 2*w c"]:
    """Every place four times, which doubles the sides."""
    return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)


class Mixer(nn.Module):
    """A blend of two arrays: the share sigmoid(w) of the first and the rest of the second; w is learned."""

    initial: float = 0.5

    @nn.compact
    def __call__(self, first: Frames, second: Frames) -> Frames:
        factor = self.param("mix_factor", nn.initializers.constant(self.initial), (1,))
        # Exactly the first where both are the same, which is the identity at initialisation.
        return first + (1 - nn.sigmoid(factor[0])).astype(first.dtype) * (second - first)
