"""Attention and transformer blocks, which the UNets of this package share.

Tokens are [N, S, c]: N sequences, which are the places of each frame or, as `columns`, the frames of each
place. Names are those of diffusers' modules, as in `layers`; softmax is computed in float32.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.backbones.layers import RANDOM, layer_norm

FLASH_LENGTH = 256
"""Tokens from which attention is not to keep its matrix: an image has as many, a video's frames do not."""


def columns(x: Float[Array, "B K h w c"]) -> Float[Array, "B*h*w K c"]:
    """The frames of each place as a sequence, for attention across frames."""
    b, k, h, w, c = x.shape
    return x.reshape(b, k, h * w, c).swapaxes(1, 2).reshape(b * h * w, k, c)


def from_columns(tokens: Float[Array, "N K d"], shape) -> Float[Array, "B K h w d"]:
    """The inverse of `columns` of an array of `shape`, whatever the channels have become."""
    b, k, h, w, _ = shape
    return tokens.reshape(b, h * w, k, -1).swapaxes(1, 2).reshape(b, k, h, w, -1)


def attend(
    queries: Float[Array, "N Q heads d"],
    keys: Float[Array, "N S heads d"],
    values: Float[Array, "N S heads d"],
    mask: Float[Array, "N S"] | None = None,
    query_chunk: int = 0,
) -> Float[Array, "N Q heads d"]:
    """softmax(q k / sqrt d) v where `mask` is 1.

    The matrix of Q S weights is what takes memory. Long sequences in 16 bits on a GPU never have it; others
    have that of `query_chunk` queries at a time, a divisor of Q, also in the backward pass (0: of all).
    """
    if mask is not None:
        return jax.nn.dot_product_attention(queries, keys, values, mask=(mask > 0)[:, None, None, :])
    if _flash_has(queries, keys):
        return jax.nn.dot_product_attention(queries, keys, values, implementation="cudnn")
    if not query_chunk or queries.shape[1] <= query_chunk:
        return jax.nn.dot_product_attention(queries, keys, values)
    chunks = queries.reshape(len(queries), -1, query_chunk, *queries.shape[2:]).swapaxes(0, 1)
    some = jax.checkpoint(lambda chunk: jax.nn.dot_product_attention(chunk, keys, values))
    return jax.lax.map(some, chunks).swapaxes(0, 1).reshape(queries.shape)


def _flash_has(queries, keys) -> bool:
    """Whether it is cuDNN's flash attention that computes this: JAX does not choose it by itself."""
    long = min(queries.shape[1], keys.shape[1]) >= FLASH_LENGTH
    fits = queries.dtype.itemsize == 2 and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 128
    return long and fits and jax.default_backend() == "gpu"


class Attention(nn.Module):
    """Multi-head attention of `queries` [N, Q, c] to `context` [N, S, d] where `mask` [N, S] is 1.

    qk_init, out_init: initial values of queries' and keys' projections, and of the output's.
    out_name: of the output's projection.
    """

    num_heads: int
    head_dim: int
    dtype: Any
    query_chunk: int = 0
    qk_init: Any = RANDOM
    out_init: Any = RANDOM
    out_name: str = "to_out_0"

    @nn.compact
    def __call__(self, queries, context, mask=None):
        def project(x, name, init):
            inner = self.num_heads * self.head_dim
            y = nn.Dense(inner, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

        q, k = project(queries, "to_q", self.qk_init), project(context, "to_k", self.qk_init)
        out = attend(q, k, project(context, "to_v", RANDOM), mask, self.query_chunk)
        out = out.reshape(*out.shape[:2], -1)
        return nn.Dense(queries.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name=self.out_name)(
            out
        )


def geglu(x: Float[Array, "*S c"], width: int, dtype, name: str) -> Float[Array, "*S width"]:
    """A linear layer gated by the GELU of another (Shazeer 2020), both in the parameters `name`."""
    hidden, gate = jnp.split(nn.Dense(2 * width, dtype=dtype, name=name)(x), 2, -1)
    return hidden * nn.gelu(gate, approximate=False)


class GEGLU(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return geglu(x, self.width, self.dtype, "proj")


class FeedForward(nn.Module):
    """GEGLU feed-forward layer of four times the width."""

    dtype: Any
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x):
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention in tokens [N, S, c], attention to a context [B, L, d] of B assets, feed-forward.

    Without a context it is attention to themselves again.

    out_init: initial values of each layer's last projection; zeros make the block the identity.
    ff_first: one more feed-forward layer at the start, which SVD's temporal blocks have.
    """

    num_heads: int
    head_dim: int
    dtype: Any
    query_chunk: int = 0
    out_init: Any = RANDOM
    ff_first: bool = False

    @nn.compact
    def __call__(self, tokens, context=None, mask=None):
        heads = dict(num_heads=self.num_heads, head_dim=self.head_dim)
        last = dict(dtype=self.dtype, out_init=self.out_init)
        if self.ff_first:
            tokens += FeedForward(**last, name="ff_in")(layer_norm(tokens, "norm_in"))
        y = layer_norm(tokens, "norm1")
        tokens += Attention(**heads, **last, query_chunk=self.query_chunk, name="attn1")(y, y)
        y = layer_norm(tokens, "norm2")
        if context is None:
            context = y
        # Queries of all frames of an asset share its context, so no copy of the context for each frame.
        y = y.reshape(len(context), -1, y.shape[-1])
        tokens += Attention(**heads, **last, name="attn2")(y, context, mask).reshape(tokens.shape)
        return tokens + FeedForward(**last, name="ff")(layer_norm(tokens, "norm3"))
