"""The paper's generator: Emu Video's factorised UNet (Girdhar et al. 2023, arXiv 2311.10709; IM-3D Sec. 3.1).

A text-to-image UNet in the layout of latent diffusion is turned into a video model by a 1D temporal
convolution after every spatial convolution and a temporal attention block after every spatial one. Those
start as the identity, so at initialisation a video is K separate images; and for a single frame they are
skipped, so that the same parameters without time are the text-to-image model. The conditioning image enters
as frame 0's latent, with zeros elsewhere and a mask, on extra input channels whose weights start at zero.

The tiny model and the paper's size are this code with other arguments. Every temporal parameter's path
contains "temporal", which is what `TEMPORAL` matches and fine-tuning trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones import emu_video_checkpoints
from im3d_jax.conditioning import Conditioning, WordEncoder
from recon_torch.errors import UserError

TEMPORAL = "temporal"
"""Pattern of the parameter paths that Sec. 3.1 trains."""

SMALL = dict(
    latent_shape=(8, 8, 4),
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    attention_levels=(1,),
    head_dim=16,
    text_dims=(16, 24),
)
"""Arguments of a model that checks and benchmarks can run anywhere."""

PARTITION_RULES = (
    (r"(proj_out|ff_out|to_out|conv2)/kernel", ("mlp", "embed")),
    (r"/kernel", ("embed", "mlp")),
)
"""Logical names of a parameter's last axes; the first pattern that is found in its path counts."""

REMAT = ("", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


@dataclass(frozen=True)
class Model:
    """A denoiser under the backbone contract.

    Args:
        latent_shape: (h, w, c) of one frame's latent.
        model_channels, channel_mult, num_res_blocks: width of the UNet's levels, and their residual blocks.
        attention_levels: levels with attention; level l has latents of side h / 2^l. The middle of the UNet
            has it as well, as in latent diffusion, on which Emu builds.
        head_dim, num_transformer_layers, ff_mult: size of the heads, and depth and feed-forward width of
            every attention block.
        num_heads: if set, of every level, whatever the size that they then have, as in Stable Diffusion 1.
        temporal_span: level -> what temporal attention sees: "pixel", the same place in every frame (Emu
            Video); "first", all of frame 0; "video", all of every frame. Paper: "pixel". The tiny model uses
            the others, because with few layers content has no other way to move across the image from one
            view to the next.
        closed_orbit: temporal convolutions wrap around. Unspecified in the paper; a turntable's last view is
            next to its first.
        clean_first_view: view 0 comes in without noise where the image is given. Paper: noised as the others.
            The tiny model has it clean, because layers that know pictures can then read it from the start.
        image_in_every_view: the extra channels show the image to all views, as SVD does. Paper: to view 0,
            zeros elsewhere. The tiny model needs the short way.
        copy_gate: a view is a blend, with learned weights, of the given image and of what the network draws;
            for x0-prediction. Not in the paper. The tiny model has it, because few channels draw blurred.
        text_dims: width of each text encoder's output; transformer layer j attends to encoder j modulo their
            number.
        vocabulary: if set, text is word indices below it and the model carries its own `WordEncoder` of
            `text_dims[0]`.
        prediction_type: of the trained network, see `diffusion`.
        dtype: of the computation; normalisation, softmax and the embedding of the noise level stay float32.
        remat: what the backward pass computes again instead of keeping: "" for nothing, or a policy of
            `jax.checkpoint_policies` that says what is kept inside the blocks, where most memory goes.
        query_chunk: how many places of each frame attend to the others at a time, a divisor of their number;
            0 for all. At 64x64 places the weights of all at once take 64 MB for each frame and head.
    """

    latent_shape: Sequence[int] = (64, 64, 8)
    model_channels: int = 384
    channel_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: Sequence[int] = (3, 4, 4, 4)
    attention_levels: Sequence[int] = (0, 1, 2)
    head_dim: int = 64
    num_heads: int = 0
    num_transformer_layers: int = 2
    ff_mult: int = 4
    temporal_span: Sequence[str] = ("pixel", "pixel", "pixel", "pixel")
    closed_orbit: bool = False
    clean_first_view: bool = False
    image_in_every_view: bool = False
    copy_gate: bool = False
    text_dims: Sequence[int] = (768, 2048)
    vocabulary: int = 0
    max_words: int = 16
    prediction_type: str = "v"
    dtype: Any = "float32"
    remat: str = ""
    query_chunk: int = 0
    net: nn.Module = field(init=False, repr=False, compare=False)

    num_views = None
    temporal_pattern = TEMPORAL
    partition_rules = PARTITION_RULES
    traceable = True

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # a model is a static argument of jit, so it must be hashable
                object.__setattr__(self, name, tuple(value))
        if self.copy_gate and self.prediction_type != "x0":
            raise UserError(
                f"emu_video: copy_gate blends clean views; it cannot predict {self.prediction_type!r}"
            )
        if self.remat not in REMAT:
            raise UserError(f"emu_video: no policy {self.remat!r} for remat; there is {', '.join(REMAT[1:])}")
        height, width = self.latent_shape[:2]
        places = [height * width // 4**level for level in range(len(self.channel_mult))]
        if any(count > self.query_chunk > 0 and count % self.query_chunk for count in places):
            raise UserError(f"emu_video: query_chunk {self.query_chunk} does not divide the places {places}")
        object.__setattr__(self, "net", UNet(self))

    def init(self, key) -> dict:
        """Parameters, with every temporal layer at the identity."""
        noisy = jnp.zeros((1, 2, *self.latent_shape))
        return self.net.init(key, noisy, jnp.zeros(1), self.empty_conditioning(1))["params"]

    def apply(
        self,
        params,
        noisy: Float[Array, "B K h w c"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B K h w c"]:
        """The network's prediction, float32, of type `prediction_type`."""
        return self.net.apply({"params": params}, noisy, timestep, conditioning)

    def num_heads_of(self, channels: int) -> int:
        """Attention heads of a level that is `channels` wide."""
        return self.num_heads or max(1, channels // self.head_dim)

    def from_pretrained(self, path: str | Path, params) -> dict:
        """`params` with the spatial layers of a Stable Diffusion; see `emu_video_checkpoints`."""
        return emu_video_checkpoints.from_pretrained(self, path, params)

    def to_pretrained(self, params) -> dict[str, np.ndarray]:
        """The spatial layers in the layout of a Stable Diffusion; see `emu_video_checkpoints`."""
        return emu_video_checkpoints.to_pretrained(self, params)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        if self.vocabulary:
            text = (jnp.zeros((batch, self.max_words), jnp.int32),)
        else:
            text = tuple(jnp.zeros((batch, self.max_words, dim)) for dim in self.text_dims)
        mask = tuple(jnp.zeros((batch, self.max_words)).at[:, 0].set(1) for _ in text)
        return Conditioning(jnp.zeros((batch, *self.latent_shape)), jnp.zeros(batch), text, mask)


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
        emb = nn.Dense(4 * width, name="time_embedding_1")(_sinusoids(timestep, width))
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
                x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
                x = block.conv(x, mult * width, f"up_{level}_sample")
        features = nn.silu(GroupNorm(name="norm_out")(x))
        zeros = nn.initializers.zeros
        x = nn.Conv(noisy.shape[-1], (3, 3), kernel_init=zeros, dtype=dtype, name="conv_out")(features)
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
        x = self._remat(ResBlock)(spec, channels, self, name=f"{name}_res")(x, emb)
        if attend:
            x = self._remat(SpatialTransformer)(spec, name=f"{name}_attention")(x, text)
            if x.shape[1] > 1:
                transformer = self._remat(TemporalTransformer)
                name = f"{name}_temporal_attention"
                x = transformer(spec, spec.temporal_span[level], name=name)(x, self.azimuths)
        return x

    def _remat(self, module):
        """The module, recomputed in the backward pass as `spec.remat` says."""
        if not self.spec.remat:
            return module
        return nn.remat(module, policy=getattr(jax.checkpoint_policies, self.spec.remat))

    def conv(self, x, channels, name, stride=1):
        """3x3 spatial convolution and the temporal one that follows it."""
        dtype = jnp.dtype(self.spec.dtype)
        x = nn.Conv(channels, (3, 3), (stride, stride), padding=1, dtype=dtype, name=name)(x)
        return self.temporal_conv(x, f"{name}_temporal")

    def temporal_conv(self, x, name):
        if x.shape[1] == 1:
            return x
        return TemporalConv(self.spec.closed_orbit, jnp.dtype(self.spec.dtype), name=name)(x)


# ---- Spatial layers: the text-to-image model ----


class GroupNorm(nn.Module):
    """Group normalisation of each frame by itself, in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        groups = math.gcd(32, x.shape[-1])
        frames = x.reshape(-1, *x.shape[2:])
        normed = nn.GroupNorm(groups, epsilon=self.epsilon, dtype=jnp.float32, name="norm")(frames)
        return normed.reshape(x.shape).astype(x.dtype)


class InputConv(nn.Module):
    """The first convolution. The weights of the channels beyond the noisy latent start at zero."""

    features: int
    noisy_channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def kernel(key, shape, dtype=jnp.float32):
            spatial = nn.initializers.lecun_normal()(key, (*shape[:2], self.noisy_channels, shape[3]), dtype)
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
        heads = spec.num_heads_of(c)
        tokens = GroupNorm(1e-6, name="norm")(x).reshape(b * k, h * w, c)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(tokens)
        for layer in range(spec.num_transformer_layers):
            words, mask = text[layer % len(text)]
            # Queries of all frames of an asset share its text, so no copy of the text for each frame.
            y = LayerNorm(name=f"norm1_{layer}")(tokens)
            tokens += Attention(heads, dtype, query_chunk=spec.query_chunk, name=f"self_{layer}")(y, y)
            y = LayerNorm(name=f"norm2_{layer}")(tokens).reshape(b, k * h * w, c)
            cross = Attention(heads, dtype, name=f"cross_{layer}")(y, words.astype(dtype), mask)
            tokens += cross.reshape(tokens.shape)
            y = LayerNorm(name=f"norm3_{layer}")(tokens)
            tokens += FeedForward(spec.ff_mult, dtype, name=f"ff_{layer}")(y)
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens).reshape(x.shape)


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name="norm")(x).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, Q, c] to `context` [B, S, d] where `mask` [B, S] is 1.

    like_to_like: queries and keys start as the tokens themselves, so that a token first looks at its likes.
    """

    num_heads: int
    dtype: Any
    like_to_like: bool = False
    query_chunk: int = 0

    @nn.compact
    def __call__(self, queries, context, mask=None):
        channels = queries.shape[-1]

        def project(x, name, init):
            y = nn.Dense(channels, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, channels // self.num_heads)

        random = nn.initializers.lecun_normal()
        alike = _identity if self.like_to_like else random
        q, k = project(queries, "to_q", alike), project(context, "to_k", alike)
        v = project(context, "to_v", random)
        out = _attend(q, k, v, mask, self.query_chunk)
        return nn.Dense(channels, dtype=self.dtype, name="to_out")(out.reshape(queries.shape))


def _attend(queries, keys, values, mask, chunk):
    """softmax(q k) v of [B, Q or S, heads, d], all queries at once or, to save memory, `chunk` at a time."""
    if mask is not None:
        return jax.nn.dot_product_attention(queries, keys, values, mask=(mask > 0)[:, None, None, :])
    if queries.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        # Fused: the weights are never written to memory.
        return jax.nn.dot_product_attention(queries, keys, values, implementation="cudnn")
    if not chunk or queries.shape[1] <= chunk:
        return jax.nn.dot_product_attention(queries, keys, values)
    chunks = queries.reshape(len(queries), -1, chunk, *queries.shape[2:]).swapaxes(0, 1)
    attend = jax.checkpoint(lambda chunk: jax.nn.dot_product_attention(chunk, keys, values))
    return jax.lax.map(attend, chunks).swapaxes(0, 1).reshape(queries.shape)


class FeedForward(nn.Module):
    """GEGLU feed-forward layer (Shazeer 2020) of `mult` times the width."""

    mult: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = nn.Dense(2 * self.mult * channels, dtype=self.dtype, name="ff_in")(x)
        hidden, gate = jnp.split(x, 2, -1)
        gated = hidden * nn.gelu(gate, approximate=False)
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
        project = nn.Dense(emb.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros, dtype=emb.dtype)
        return emb + project(_frame_azimuths(num_frames).astype(emb.dtype))[None]


class CopyGate(nn.Module):
    """Blends the image that is given into every view; almost closed at initialisation."""

    dtype: Any

    @nn.compact
    def __call__(self, features, drawn, conditioning: Conditioning):
        init = {"kernel_init": nn.initializers.zeros, "bias_init": nn.initializers.constant(-3.0)}
        gate = nn.sigmoid(nn.Conv(drawn.shape[-1], (3, 3), dtype=self.dtype, name="conv", **init)(features))
        gate *= conditioning.image_mask[:, None, None, None, None].astype(self.dtype)
        return gate * conditioning.image[:, None].astype(self.dtype) + (1 - gate) * drawn


class TemporalConv(nn.Module):
    """1D convolution over frames, kernel 3, as shifted matrix products; the identity at initialisation."""

    closed_orbit: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]

        def identity(key, shape, dtype=jnp.float32):
            return jnp.zeros(shape, dtype).at[1].set(jnp.eye(c, dtype=dtype))

        kernel = self.param("kernel", identity, (3, c, c)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,)).astype(self.dtype)
        padding = ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))
        padded = jnp.pad(x, padding, mode="wrap" if self.closed_orbit else "constant")
        summed = sum(padded[:, i : i + x.shape[1]] @ kernel[i] for i in range(3))
        return summed + bias[None, None, None, None]


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
            alike = self.span != "pixel"
            attention = Attention(spec.num_heads_of(c), dtype, alike, name=f"self_{layer}")
            out = attention(queries, context)
            tokens += _unpair(out, self.span, tokens.shape)
            y = LayerNorm(name=f"norm2_{layer}")(tokens)
            tokens += FeedForward(spec.ff_mult, dtype, name=f"ff_{layer}")(y)
        return x + nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=dtype, name="proj_out")(tokens)


def _pair(tokens, span):
    """Queries and context of temporal attention from tokens [B, K, h, w, c]."""
    b, k, h, w, c = tokens.shape
    if span == "pixel":
        columns = tokens.reshape(b, k, h * w, c).swapaxes(1, 2).reshape(b * h * w, k, c)
        return columns, columns
    everything = tokens.reshape(b, k * h * w, c)
    return everything, everything[:, : h * w] if span == "first" else everything


def _unpair(out, span, shape):
    b, k, h, w, c = shape
    if span == "pixel":
        return out.reshape(b, h * w, k, c).swapaxes(1, 2).reshape(shape)
    return out.reshape(shape)


def _identity(key, shape, dtype=jnp.float32):
    return jnp.eye(*shape, dtype=dtype)


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


def _sinusoids(timestep: Float[Array, " B"], dim: int) -> Float[Array, "B d"]:
    """Embedding of the time step (Ho et al. 2020)."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(dim // 2) / (dim // 2))
    phases = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], -1)


def _with_image(noisy, conditioning: Conditioning, spec):
    """Appends the image to view 0 or to all, and a mask that is 1 at view 0 if there is an image."""
    given = conditioning.image_mask[:, None, None, None]
    image = conditioning.image * given
    views = jnp.zeros_like(noisy).at[:, 0].set(image)
    if spec.image_in_every_view:
        views = jnp.broadcast_to(image[:, None], noisy.shape)
    mask = jnp.zeros_like(noisy[..., :1]).at[:, 0].set(given)
    if spec.clean_first_view:
        noisy = noisy.at[:, 0].set(noisy[:, 0] * (1 - given) + image)
    return jnp.concatenate([noisy, views, mask], -1)
