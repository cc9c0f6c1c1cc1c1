"""Layers that the UNets of this package share: embeddings of numbers, normalisation, convolution.

Latents are [B, K, h, w, c]: B assets of K frames each. The layers' own names are those of diffusers' modules,
so that a parameter's path says its tensor in a public checkpoint. Normalisation and embeddings of numbers are
computed in float32, the rest in `dtype`. `attention` has the transformers.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.conditions.conditioning import Conditioning

PARTITION_RULES = (
    (r"(proj_out|to_out|to_out_0|ff_out|net_2|conv2|linear_2)/kernel", ("mlp", "embed")),
    (r"/kernel", ("embed", "mlp")),
)
"""Logical names of a parameter's last axes; the first pattern that is found in its path counts."""

RANDOM, ZEROS = nn.initializers.lecun_normal(), nn.initializers.zeros


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module, recomputed in the backward pass but for what the policy keeps; itself if there is none."""
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, policy)) if policy else module


# ---- What the network is told ----


def sinusoids(values: Float[Array, " N"], dim: int) -> Float[Array, "N d"]:
    """Embedding of numbers (Ho et al. 2020): cosines, then sines."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(dim // 2) / (dim // 2))
    phases = values.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], -1)


class Embedding(nn.Module):
    """Two linear layers on sinusoids, in float32."""

    width: int
    out_width: int | None = None
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(self.width, name="linear_1")(x))
        return nn.Dense(self.out_width or self.width, kernel_init=self.out_init, name="linear_2")(x)


def append_image(
    noisy: Float[Array, "B K h w c"], conditioning: Conditioning, in_every_view: bool = False
) -> Float[Array, "B K h w 2*c+1"]:
    """Appends the image at view 0, or at all, zeros elsewhere, and a mask that is 1 at view 0 if it is given.

    Emu Video's way of conditioning (Girdhar et al. 2023).
    """
    given = conditioning.image_mask[:, None, None, None].astype(noisy.dtype)
    image = conditioning.image.astype(noisy.dtype) * given
    views = jnp.zeros_like(noisy).at[:, 0].set(image)
    if in_every_view:
        views = jnp.broadcast_to(image[:, None], noisy.shape)
    mask = jnp.zeros_like(noisy[..., :1]).at[:, 0].set(given)
    return jnp.concatenate([noisy, views, mask], -1)


# ---- Normalisation and convolution ----


def group_norm(x: Float[Array, "B K h w c"], groups: int, epsilon: float, name: str, over_frames=False):
    """Normalisation in `groups` of channels, of each frame by itself or of all frames of an asset."""
    axes = (1, 2, 3, 4) if over_frames else (2, 3, 4)
    # The fast variance, E x^2 - (E x)^2, loses its digits where the mean is far beyond the spread.
    settings = dict(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
    return nn.GroupNorm(groups, reduction_axes=axes, **settings)(x).astype(x.dtype)


def layer_norm(x: Float[Array, "*S c"], name: str) -> Float[Array, "*S c"]:
    """Normalisation of each token."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(x).astype(x.dtype)


class TemporalConv(nn.Module):
    """1D convolution over the frames of each place, kernel 3, as shifted matrix products.

    closed_orbit: the last frame is next to the first; otherwise zeros are next to both.
    """

    dtype: Any
    kernel_init: Any = RANDOM
    closed_orbit: bool = False

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, channels, channels)).astype(self.dtype)
        bias = self.param("bias", ZEROS, (channels,)).astype(self.dtype)
        padding = ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))
        padded = jnp.pad(x, padding, mode="wrap" if self.closed_orbit else "constant")
        return sum(padded[:, i : i + x.shape[1]] @ kernel[i] for i in range(3)) + bias[None, None, None, None]


class ResBlock(nn.Module):
    """Two normalised convolutions of each frame; an embedding [B, K or 1, d] is added between them."""

    channels: int
    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x, emb=None):
        h = nn.silu(group_norm(x, self.groups, self.epsilon, "norm1"))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
        h = _add_embedding(h, emb, self.dtype)
        h = nn.silu(group_norm(h, self.groups, self.epsilon, "norm2"))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class TemporalResBlock(nn.Module):
    """The same along frames, normalised over all of them; with `out_init` zeros the identity."""

    groups: int
    epsilon: float
    dtype: Any
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x, emb=None):
        h = nn.silu(group_norm(x, self.groups, self.epsilon, "norm1", over_frames=True))
        h = _add_embedding(TemporalConv(self.dtype, name="conv1")(h), emb, self.dtype)
        h = nn.silu(group_norm(h, self.groups, self.epsilon, "norm2", over_frames=True))
        return x + TemporalConv(self.dtype, self.out_init, name="conv2")(h)


def _add_embedding(h, emb, dtype):
    if emb is None:
        return h
    return h + nn.Dense(h.shape[-1], dtype=dtype, name="time_emb_proj")(nn.silu(emb))[:, :, None, None]


class Resample(nn.Module):
    """The convolution that halves the latent's sides, or follows their doubling."""

    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        return nn.Conv(x.shape[-1], (3, 3), strides, padding=1, dtype=self.dtype, name="conv")(x)


def upsample(x: Float[Array, "B K h w c"]) -> Float[Array, "B K 2*h 2*w c"]:
    """Every place four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)


class Mixer(nn.Module):
    """sigmoid(w) of the first array and the rest of the second, w one learned number."""

    initial: float = 0.5

    @nn.compact
    def __call__(self, first, second):
        factor = self.param("mix_factor", nn.initializers.constant(self.initial), (1,))
        # Exactly the first where both are the same, which is the identity at initialisation.
        return first + (1 - nn.sigmoid(factor[0])).astype(first.dtype) * (second - first)
