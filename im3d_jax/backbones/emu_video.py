"""The paper's generator: Emu Video's factorised UNet (Girdhar et al. 2023, arXiv 2311.10709; IM-3D Sec. 3.1).

A text-to-image UNet in the layout of latent diffusion is turned into a video model by a 1D temporal
convolution after every spatial convolution and a temporal attention block after every spatial one. Those
start as the identity, so at initialisation a video is K separate images; and for a single frame they are
skipped, so that the same parameters without time are the text-to-image model. The conditioning image enters
as frame 0's latent, with zeros elsewhere and a mask, on extra input channels whose weights start at zero.

The tiny model and the paper's size are this code with other arguments. The path of every temporal parameter
contains "temporal", which is what `Model.temporal_pattern` matches and fine-tuning trains. Spatial parameters
have the names of diffusers' UNet2DConditionModel; `emu_video_checkpoints` reads and writes its weights.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones import Params, attention, emu_video_checkpoints, layers, unet
from im3d_jax.backbones.layers import ZEROS, FrameEmbeddings, Frames
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.conditions.words import WordEncoder
from im3d_jax.diffusion.objective import PredictionType
from im3d_jax.pretrained import SourceOf
from recon_torch.ranges import Range

GROUPS = 32
"""Groups of channels that are normalised together, as in Stable Diffusion."""

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


class Span(enum.StrEnum):
    """What a place of a frame attends to across frames."""

    PIXEL = "pixel"
    """The same place in every frame (Emu Video)."""
    FIRST = "first"
    """All places of frame 0."""
    VIDEO = "video"
    """All places of every frame."""


@dataclass(frozen=True, kw_only=True)
class Model(unet.UNetModel):
    """A denoiser under the backbone contract; see `unet.UNetModel` for the arguments that are not listed.

    Args:
        prediction_type: of the trained network, see `diffusion`.
        model_channels, channel_mult, num_res_blocks: width of the UNet's levels, and their residual blocks.
        attention_levels: levels with attention; level l has latents of side h / 2^l. The middle of the UNet
            has it as well, as in latent diffusion, on which Emu builds.
        head_dim, num_transformer_layers, ff_mult: size of the heads, and depth and feed-forward width of
            every attention block.
        num_heads: if set, the number of heads in every level, of whatever size, as in Stable Diffusion 1.
        temporal_span: the `Span` of each level's temporal attention. Paper: "pixel". The tiny model uses the
            others, because with few layers content has no other way to move across the image from one view to
            the next.
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
        max_words: tokens of the empty prompt.
    """

    latent_shape: unet.LatentShape = (64, 64, 8)
    prediction_type: PredictionType | str = PredictionType.V
    model_channels: unet.Channels = 384
    channel_mult: Sequence[Annotated[int, Range(1, 64)]] = (1, 2, 4, 4)
    num_res_blocks: Sequence[unet.Layers] = (3, 4, 4, 4)
    attention_levels: Sequence[unet.Level] = (0, 1, 2)
    head_dim: Annotated[int, Range(1, 4096)] = 64
    num_heads: Annotated[int, Range(0, 1024)] = 0
    num_transformer_layers: unet.Layers = 2
    ff_mult: Annotated[int, Range(1, 64)] = 4
    temporal_span: Sequence[Span | str] = (Span.PIXEL,) * 4
    closed_orbit: bool = False
    clean_first_view: bool = False
    image_in_every_view: bool = False
    copy_gate: bool = False
    text_dims: Sequence[unet.Channels] = (768, 2048)
    vocabulary: Annotated[int, Range(0, 10_000_000)] = 0
    max_words: unet.MaxWords = 16

    choices: ClassVar = {"temporal_span": Span, "prediction_type": PredictionType}
    num_views: ClassVar[int | None] = None
    temporal_pattern: ClassVar[str] = "temporal"

    def problems(self) -> Iterator[str]:
        num_levels = len(self.channel_mult)
        yield from self.latent_problems(num_levels)
        yield from self.level_problems(
            num_levels, num_res_blocks=self.num_res_blocks, temporal_span=self.temporal_span
        )
        if self.copy_gate and self.prediction_type != "x0":
            yield f"copy_gate blends clean views; it cannot predict {self.prediction_type!r}"

    @property
    def net(self) -> UNet:
        return UNet(self)

    def num_heads_of(self, channels: int) -> int:
        """Attention heads of a level that is `channels` wide."""
        return self.num_heads or max(1, channels // self.head_dim)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        text: tuple[Array, ...]
        if self.vocabulary:
            text = (jnp.zeros((batch, self.max_words), jnp.int32),)
        else:
            text = tuple(jnp.zeros((batch, self.max_words, dim)) for dim in self.text_dims)
        mask = tuple(jnp.zeros((batch, self.max_words)).at[:, 0].set(1) for _ in text)
        return Conditioning(jnp.zeros((batch, *self.latent_shape)), jnp.zeros(batch), text, mask)

    def from_pretrained(self, path: str | Path, params: Params, averaged: bool = False) -> Params:
        """`params` with the spatial layers of a Stable Diffusion; see `emu_video_checkpoints`."""
        heads = [self.num_heads_of(mult * self.model_channels) for mult in self.channel_mult]
        channels, convolves = self.latent_shape[-1], bool(self.num_heads)
        return emu_video_checkpoints.from_pretrained(path, params, channels, heads, convolves, averaged)

    def to_pretrained(self, params: Params) -> dict[str, np.ndarray]:
        """The spatial layers in the layout of a Stable Diffusion; see `emu_video_checkpoints`."""
        return emu_video_checkpoints.to_pretrained(params, self.latent_shape[-1], bool(self.num_heads))

    def public_names(self) -> dict[str, SourceOf]:
        """See `backbones.NamedBackbone`. The first convolution is no kernel there: it has other channels."""
        spatial = emu_video_checkpoints.source_of(bool(self.num_heads))
        return {"unet": lambda path: None if path.startswith("conv_in/") else spatial(path)}

    def renew(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a weights file, also of one from before the layers had diffusers' names."""
        return emu_video_checkpoints.renew(tensors, len(self.channel_mult))


# ---- The network ----


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has."""

    spec: Model

    @nn.compact
    def __call__(self, noisy: Frames, timestep: Float[Array, " B"], conditioning: Conditioning) -> Frames:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        width, num_frames = spec.model_channels, noisy.shape[1]
        text = self._text(conditioning)
        emb = layers.Embedding(4 * width, name="time_embedding")(layers.sinusoids(timestep, width))
        emb = FrameEmbedding(name="temporal_embedding")(emb, num_frames)

        x = with_image(noisy, conditioning, spec).astype(dtype)
        x = temporal_conv(spec, layers.input_conv(x, width, noisy.shape[-1], dtype), "conv_in")
        x = unet.down_and_up(parts(spec), x, emb, text)
        features = nn.silu(layers.group_norm(x, GROUPS, 1e-5, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), kernel_init=ZEROS, dtype=dtype, name="conv_out")(features)
        x = temporal_conv(spec, x, "conv_out")
        if spec.copy_gate and num_frames > 1:
            x = CopyGate(dtype, name="temporal_copy_gate")(features, x, conditioning)
        return x.astype(jnp.float32)

    def _text(self, conditioning: Conditioning) -> Text:
        if not self.spec.vocabulary:
            return list(zip(conditioning.text, conditioning.text_mask, strict=True))
        encoder = WordEncoder(self.spec.vocabulary, self.spec.text_dims[0], name="text_encoder")
        (words,), (mask,) = conditioning.text, conditioning.text_mask
        return [(encoder(words, mask), mask)]


Text = list[tuple[Float[Array, "B _ _"], Float[Array, "B _"]]]
"""(tokens [B, L, d], mask [B, L]) of each text encoder; L and d differ from one to the next."""


def parts(spec: Model) -> unet.Parts:
    """The levels of this network: with several frames, temporal layers follow the spatial ones."""
    blocks, levels = tuple(spec.num_res_blocks), tuple(spec.attention_levels)
    functions = partial(_residual, spec), partial(_attention, spec), partial(temporal_conv, spec)
    return unet.Parts(blocks, levels, jnp.dtype(spec.dtype), *functions)


def temporal_conv(spec: Model, x: Frames, name: str) -> Frames:
    """The temporal convolution that follows the spatial one of this name, where there are several frames."""
    if x.shape[1] == 1:
        return x
    dtype = jnp.dtype(spec.dtype)
    return layers.TemporalConv(dtype, _identity_in_time, spec.closed_orbit, name=f"{name}_temporal")(x)


def _residual(
    spec: Model, x: Frames, emb: FrameEmbeddings, level: int, index: int, way: unet.Way
) -> Float[Array, "B K h w out"]:
    block, channels = (
        layers.remat(layers.ResBlock, spec.remat),
        spec.channel_mult[level] * spec.model_channels,
    )
    settings = channels, GROUPS, 1e-5, jnp.dtype(spec.dtype), partial(temporal_conv, spec)
    return block(*settings, name=f"resnets_{index}")(x, emb)


def _attention(spec: Model, x: Frames, context: Text, level: int, index: int) -> Frames:
    spatial = layers.remat(SpatialTransformer, spec.remat)
    temporal = layers.remat(TemporalTransformer, spec.remat)
    x = spatial(spec, name=f"attentions_{index}")(x, context)
    if x.shape[1] == 1:
        return x
    return temporal(spec, spec.temporal_span[level], name=f"temporal_attentions_{index}")(x)


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to the text."""

    spec: Model

    @nn.compact
    def __call__(self, x: Frames, text: Text) -> Frames:
        spec, c, dtype = self.spec, x.shape[-1], jnp.dtype(self.spec.dtype)
        sizes = dict(**_heads(spec, c), query_chunk=spec.query_chunk, ff_mult=spec.ff_mult)
        tokens = attention.frame_tokens(layers.group_norm(x, GROUPS, 1e-6, "norm"))
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(tokens)
        for layer in range(spec.num_transformer_layers):
            words, mask = text[layer % len(text)]
            block = attention.TransformerBlock(**sizes, name=f"transformer_blocks_{layer}")
            tokens = block(tokens, words.astype(dtype), mask)
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens).reshape(x.shape)


# ---- Temporal layers: the identity at initialisation, skipped for a single frame ----


class FrameEmbedding(nn.Module):
    """Adds a frame's azimuth to the noise level's embedding; zero at initialisation.

    Paper: no camera input. Here: none either, since the azimuth follows from the frame's number.
    """

    @nn.compact
    def __call__(self, emb: Float[Array, "B d"], num_frames: int) -> Float[Array, "B {num_frames} d"]:
        emb = jnp.broadcast_to(emb[:, None], (emb.shape[0], num_frames, emb.shape[-1]))
        if num_frames == 1:
            return emb
        project = nn.Dense(emb.shape[-1], use_bias=False, kernel_init=ZEROS, dtype=emb.dtype)
        return emb + project(frame_azimuths(num_frames).astype(emb.dtype))[None]


class CopyGate(nn.Module):
    """Blends the image that is given into every view; almost closed at initialisation."""

    dtype: Any

    @nn.compact
    def __call__(
        self, features: Frames, drawn: Float[Array, "B K h w d"], conditioning: Conditioning
    ) -> Float[Array, "B K h w d"]:
        init: dict[str, Any] = {"kernel_init": ZEROS, "bias_init": nn.initializers.constant(-3.0)}
        gate = nn.sigmoid(nn.Conv(drawn.shape[-1], (3, 3), dtype=self.dtype, name="conv", **init)(features))
        gate *= conditioning.image_mask[:, None, None, None, None].astype(self.dtype)
        return gate * conditioning.image[:, None].astype(self.dtype) + (1 - gate) * drawn


class TemporalTransformer(nn.Module):
    """Attention across frames, to the places in them that `span` says."""

    spec: Model
    span: Span

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        spec, (h, w, c), dtype = self.spec, x.shape[2:], jnp.dtype(self.spec.dtype)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(layers.group_norm(x, GROUPS, 1e-6, "norm"))
        azimuths = frame_azimuths(x.shape[1]).astype(dtype)
        tokens += nn.Dense(c, dtype=dtype, name="azimuth")(azimuths)[None, :, None, None]
        if self.span != Span.PIXEL:
            tokens += self.param("place", _places, (h, w, c)).astype(dtype)[None, None]
        for layer in range(spec.num_transformer_layers):
            tokens = TemporalBlock(spec, self.span, name=f"transformer_blocks_{layer}")(tokens)
        return x + nn.Dense(c, kernel_init=ZEROS, dtype=dtype, name="proj_out")(tokens)


class TemporalBlock(nn.Module):
    """Attention across frames and a feed-forward layer, each around a residual."""

    spec: Model
    span: Span

    @nn.compact
    def __call__(self, tokens: Frames) -> Frames:
        heads, shape = _heads(self.spec, tokens.shape[-1]), tokens.shape
        y = layers.layer_norm(tokens, "norm1")
        if self.span == Span.PIXEL:
            y = attention.columns(y)
            tokens += attention.from_columns(attention.Attention(**heads, name="attn1")(y, y), shape)
        else:
            everything = y.reshape(len(y), -1, shape[-1])
            context = everything[:, : shape[2] * shape[3]] if self.span == Span.FIRST else everything
            # Across places, a token first looks at its likes: queries and keys are the tokens themselves.
            attend = attention.Attention(**heads, qk_init=_identity, name="attn1")
            tokens += attend(everything, context).reshape(shape)
        y = layers.layer_norm(tokens, "norm2")
        return tokens + attention.FeedForward(jnp.dtype(self.spec.dtype), self.spec.ff_mult, name="ff")(y)


def _heads(spec: Model, channels: int) -> dict[str, Any]:
    """Arguments of attention in a layer that is `channels` wide."""
    heads = spec.num_heads_of(channels)
    return dict(num_heads=heads, head_dim=channels // heads, dtype=spec.dtype)


def _identity(key, shape, dtype=jnp.float32) -> Float[Array, "c d"]:
    rows, columns = shape
    return jnp.eye(rows, columns, dtype=dtype)


def _identity_in_time(key, shape, dtype=jnp.float32) -> Float[Array, "3 c c"]:
    return jnp.zeros(shape, dtype).at[1].set(jnp.eye(shape[-1], dtype=dtype))


def _places(key, shape, dtype=jnp.float32) -> Float[Array, "h w c"]:
    """Sinusoids of row and column, of unit size: small random ones would take long to tell apart."""
    height, width, channels = shape
    waves = np.pi / np.geomspace(1, 16, channels // 4)
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    phases = (place[..., None] * waves).reshape(height, width, -1)
    features = np.sqrt(2) * np.concatenate([np.sin(phases), np.cos(phases)], -1)
    return jnp.asarray(np.pad(features, ((0, 0), (0, 0), (0, channels - features.shape[-1]))), dtype)


# ---- What the network is shown ----


def frame_azimuths(num_frames: int, harmonics: int = 4) -> Float[np.ndarray, "K features"]:
    """Cosines and sines of the multiples up to `harmonics` of the azimuth 2 pi k / K of each frame k."""
    angles = 2 * np.pi * np.arange(num_frames) / num_frames
    phases = angles[:, None] * np.arange(1, harmonics + 1)
    return np.concatenate([np.cos(phases), np.sin(phases)], -1).astype(np.float32)


def with_image(
    noisy: Float[Array, "B K h w c"], conditioning: Conditioning, spec: Model
) -> Float[Array, "B K h w 2*c+1"]:
    """Appends the image and its mask; with `clean_first_view` it also takes the place of the noisy view 0."""
    if spec.clean_first_view:
        given = conditioning.image_mask[:, None, None, None]
        noisy = noisy.at[:, 0].set(noisy[:, 0] * (1 - given) + conditioning.image * given)
    return layers.append_image(noisy, conditioning, spec.image_in_every_view)
