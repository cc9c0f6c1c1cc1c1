"""Attention and transformer blocks that the UNets of this package share.

Tokens are [N, S, c]: N sequences of S tokens, which are the places of each frame or, after `columns`, the
frames of each place. Layers are named as in `layers`; softmax is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.backbones.layers import RANDOM, Frames, layer_norm

FLASH_LENGTH = 256
"""Length of sequences from which attention should not store its matrix of weights. The places of an image are
as many; the frames of a video are fewer."""


def columns(x: Float[Array, "B K h w c"]) -> Float[Array, "B*h*w K c"]:
    """The frames of each place as a sequence, for attention across frames."""
    b, k, h, w, c = x.shape
    return x.reshape(b, k, h * w, c).swapaxes(1, 2).reshape(b * h * w, k, c)


def from_columns(tokens: Float[Array, "N K d"], shape: Sequence[int]) -> Float[Array, "B K h w d"]:
    """The inverse of `columns` of an array of `shape` [B, K, h, w, c], whatever the channels have become."""
    b, k, h, w, _ = shape
    return tokens.reshape(b, h * w, k, -1).swapaxes(1, 2).reshape(b, k, h, w, -1)


def attend(
    queries: Float[Array, "N Q heads d"],
    keys: Float[Array, "N S heads d"],
    values: Float[Array, "N S heads d"],
    mask: Float[Array, "N S"] | None = None,
    query_chunk: int = 0,
) -> Float[Array, "N Q heads d"]:
    """softmax(q k / sqrt d) v, over the keys whose `mask` is 1.

    The Q x S weights are what takes memory. Long sequences in 16 bits on a GPU never store them. Elsewhere
    `query_chunk` queries, a divisor of Q, are attended for at a time, also in the backward pass (0: all).
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


def _flash_has(queries: Float[Array, "N Q heads d"], keys: Float[Array, "N S heads d"]) -> bool:
    """Whether cuDNN's flash attention can compute this and should: JAX does not choose it by itself."""
    long = min(queries.shape[1], keys.shape[1]) >= FLASH_LENGTH
    fits = queries.dtype.itemsize == 2 and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 128
    return long and fits and jax.default_backend() == "gpu"


class Attention(nn.Module):
    """Multi-head attention of queries to a context, to the tokens of it whose mask is 1.

    qk_init, out_init: initial values of the projections to queries and keys, and of the one of the output.
    """

    num_heads: int
    head_dim: int
    dtype: Any
    query_chunk: int = 0
    qk_init: Any = RANDOM
    out_init: Any = RANDOM

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "N Q c"],
        context: Float[Array, "N S d"],
        mask: Float[Array, "N S"] | None = None,
    ) -> Float[Array, "N Q c"]:
        def project(x: Float[Array, "N L d"], name: str, init: Any) -> Float[Array, "N L heads head_dim"]:
            inner = self.num_heads * self.head_dim
            y = nn.Dense(inner, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

        q, k = project(queries, "to_q", self.qk_init), project(context, "to_k", self.qk_init)
        out = attend(q, k, project(context, "to_v", RANDOM), mask, self.query_chunk)
        out = out.reshape(*out.shape[:2], -1)
        return nn.Dense(queries.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="to_out_0")(out)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020), both in one matrix."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*S c"]) -> Float[Array, "*S d"]:
        hidden, gate = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x), 2, -1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU feed-forward layer of `mult` times the width."""

    dtype: Any
    mult: int = 4
    out_init: Any = RANDOM

    @nn.compact
    def __call__(self, x: Float[Array, "*S c"]) -> Float[Array, "*S c"]:
        hidden = GEGLU(self.mult * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.out_init, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Attention of tokens to themselves, attention to a context, feed-forward; each around a residual.

    The context is that of B assets, each with the same number of the N sequences. Without a context, the
    second attention is to the tokens themselves as well.

    ff_mult: width of the feed-forward layers, in widths of the tokens.
    out_init: initial values of each layer's last projection; zeros make the block the identity.
    ff_first: adds a feed-forward layer at the start, which the temporal blocks of SVD have.
    """

    num_heads: int
    head_dim: int
    dtype: Any
    query_chunk: int = 0
    ff_mult: int = 4
    out_init: Any = RANDOM
    ff_first: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "N S c"],
        context: Float[Array, "B L d"] | None = None,
        mask: Float[Array, "B L"] | None = None,
    ) -> Float[Array, "N S c"]:
        heads: dict[str, Any] = dict(num_heads=self.num_heads, head_dim=self.head_dim)
        last: dict[str, Any] = dict(dtype=self.dtype, out_init=self.out_init)
        if self.ff_first:
            tokens += FeedForward(**last, mult=self.ff_mult, name="ff_in")(layer_norm(tokens, "norm_in"))
        y = layer_norm(tokens, "norm1")
        tokens += Attention(**heads, **last, query_chunk=self.query_chunk, name="attn1")(y, y)
        y = layer_norm(tokens, "norm2")
        if context is None:
            context = y
        # Queries of all frames of an asset share its context, so no copy of the context for each frame.
        y = y.reshape(len(context), -1, y.shape[-1])
        tokens += Attention(**heads, **last, name="attn2")(y, context, mask).reshape(tokens.shape)
        return tokens + FeedForward(**last, mult=self.ff_mult, name="ff")(layer_norm(tokens, "norm3"))


def frame_tokens(x: Frames) -> Float[Array, "B*K h*w c"]:
    """The places of each frame as a sequence, for attention within frames."""
    b, k, h, w, c = x.shape
    return x.reshape(b * k, h * w, c)
