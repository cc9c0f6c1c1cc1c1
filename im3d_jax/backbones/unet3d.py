"""ModelScope's text to video and I2VGen-XL: the public generators nearest to Emu Video.

Both add temporal layers to a Stable Diffusion, as the paper's generator does (Sec. 3.1): four temporal
convolutions after every residual block and a temporal transformer after every spatial one, each on a residual
of its own (Wang et al. 2023, arXiv 2308.06571). ModelScope sees text alone; fine-tuned here with the image on
extra input channels it is conditioned as Emu Video is. I2VGen-XL (Zhang et al. 2023, arXiv 2311.04145) sees
the image as a latent on extra channels, as tokens beside the text's, and as a CLIP embedding.

Parameters have the names of diffusers' UNet3DConditionModel and I2VGenXLUNet; `unet3d_checkpoints` reads and
writes their weights.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones import Params, attention, layers, unet, unet3d_checkpoints
from im3d_jax.backbones.layers import RANDOM, ZEROS, FrameEmbeddings, Frames
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.diffusion.objective import PredictionType
from im3d_jax.pretrained import SourceOf
from recon_torch.ranges import Range

POOLED_SIDE = 32
"""Side of the grid to which I2VGen-XL averages the image's latent before it makes tokens of it."""

SMALL = dict(
    latent_shape=(8, 8, 4),
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    head_dim=8,
    cross_attention_dim=32,
    max_words=5,
    image="i2vgen",
)
"""Arguments of a model that checks and benchmarks can run anywhere."""


class ImageInput(enum.StrEnum):
    """How the picture enters the network."""

    NONE = "none"
    """Not at all (ModelScope)."""
    CHANNELS = "channels"
    """As Emu Video does, for a ModelScope that is fine-tuned here: its latent at frame 0 and a mask are on
    input channels whose weights start at zero."""
    I2VGEN = "i2vgen"
    """As in I2VGen-XL, which also asks for `Conditioning.image_tokens`, one CLIP embedding."""


@dataclass(frozen=True, kw_only=True)
class Model(unet.UNetModel):
    """A denoiser under the backbone contract; see `unet.UNetModel` for the arguments that are not listed.

    The defaults are the sizes of ModelScope and of I2VGen-XL.

    Args:
        prediction_type: of the trained network: "epsilon" for ModelScope, "v" for I2VGen-XL.
        block_out_channels, layers_per_block: channels of the levels, and their residual blocks. All levels
            but the last have attention.
        norm_num_groups, head_dim: groups of channels that are normalised together; size of attention heads.
        cross_attention_dim, max_words: of the text's embedding, which is CLIP's.
        image: the `ImageInput`.
        fps: what I2VGen-XL is told of the frame rate. It was trained at 16 frames, 8 to 16 a second.

    The public networks were trained to attend to the padding of their prompts as well: give them a text mask
    of ones.
    """

    latent_shape: unet.LatentShape = (32, 32, 4)
    prediction_type: PredictionType | str = PredictionType.EPSILON
    block_out_channels: Sequence[unet.Channels] = (320, 640, 1280, 1280)
    layers_per_block: unet.Layers = 2
    norm_num_groups: unet.Channels = 32
    head_dim: Annotated[int, Range(1, 4096)] = 64
    cross_attention_dim: unet.Channels = 1024
    max_words: unet.MaxWords = 77
    image: ImageInput | str = ImageInput.NONE
    fps: Annotated[float, Range(above=0, most=1000)] = 16.0

    choices: ClassVar = {"image": ImageInput, "prediction_type": PredictionType}
    num_views: ClassVar[int | None] = None
    temporal_pattern: ClassVar[str] = "temp_convs|temp_attentions|transformer_in"

    def problems(self) -> Iterator[str]:
        yield from self.latent_problems(len(self.block_out_channels))
        yield from self.level_problems(len(self.block_out_channels))
        for name, size in (("norm_num_groups", self.norm_num_groups), ("head_dim", self.head_dim)):
            if any(channels % size for channels in self.block_out_channels):
                yield f"block_out_channels {self.block_out_channels} are not multiples of {name} {size}"

    @property
    def net(self) -> UNet:
        return UNet(self)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        text = jnp.zeros((batch, self.max_words, self.cross_attention_dim))
        mask = jnp.zeros((batch, self.max_words)).at[:, 0].set(1)
        told = self.image == ImageInput.I2VGEN
        tokens = jnp.zeros((batch, 1, self.cross_attention_dim)) if told else None
        image = jnp.zeros((batch, *self.latent_shape))
        return Conditioning(image, jnp.zeros(batch), (text,), (mask,), tokens)

    def from_pretrained(self, path: str | Path, params: Params, averaged: bool = False) -> Params:
        """The parameters of a checkpoint of diffusers; see `unet3d_checkpoints`."""
        settings = {"attention_head_dim": self.head_dim, "norm_num_groups": self.norm_num_groups}
        family, channels = self._family, self.latent_shape[-1]
        return unet3d_checkpoints.from_pretrained(path, params, family, channels, settings, averaged)

    def to_pretrained(self, params: Params) -> dict[str, np.ndarray]:
        """The parameters as tensors of diffusers' class; see `unet3d_checkpoints`."""
        return unet3d_checkpoints.to_pretrained(params)

    def public_names(self) -> dict[str, SourceOf]:
        """See `backbones.NamedBackbone`."""
        return {"unet": unet3d_checkpoints.source_of}

    @property
    def _family(self) -> str:
        """The class of diffusers whose parameters the network has."""
        return "I2VGenXLUNet" if self.image == ImageInput.I2VGEN else "UNet3DConditionModel"


# ---- The network ----


class Context(NamedTuple):
    """What spatial transformers attend to: tokens [B, L, d] where mask [B, L] is 1."""

    tokens: Float[Array, "B L d"]
    mask: Float[Array, "B L"]


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has."""

    spec: Model

    @nn.compact
    def __call__(self, noisy: Frames, timestep: Float[Array, " B"], conditioning: Conditioning) -> Frames:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        width = spec.block_out_channels[0]
        emb = layers.Embedding(4 * width, name="time_embedding")(layers.sinusoids(timestep, width))
        (text,), (mask,) = conditioning.text, conditioning.text_mask
        context, x = Context(text.astype(dtype), mask), noisy.astype(dtype)
        if spec.image == ImageInput.CHANNELS:
            x = layers.append_image(x, conditioning)
        elif spec.image == ImageInput.I2VGEN:
            emb += self._frame_rate(width)
            context = self._with_image_tokens(context, conditioning)
            x = jnp.concatenate([x, self._image_frames(conditioning, noisy.shape[1])], -1)

        x = layers.input_conv(x, width, noisy.shape[-1], dtype)
        x = TemporalTransformer(spec, 8 * spec.head_dim, name="transformer_in")(x)
        x = unet.down_and_up(parts(spec), x, emb[:, None], context)  # one embedding for all frames
        x = nn.silu(layers.group_norm(x, spec.norm_num_groups, 1e-5, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)

    # ---- What I2VGen-XL makes of its image ----

    def _frame_rate(self, width: int) -> Float[Array, "1 d"]:
        """Embedding of the frames per second."""
        x = nn.Dense(4 * width, name="fps_embedding_0")(layers.sinusoids(jnp.array([self.spec.fps]), width))
        return nn.Dense(4 * width, name="fps_embedding_2")(nn.silu(x))

    def _with_image_tokens(self, context: Context, conditioning: Conditioning) -> Context:
        """Appends an 8x8 grid of tokens of the image's latent, and c tokens of its CLIP embedding."""
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        channels, dim = spec.latent_shape[-1], spec.cross_attention_dim
        given = conditioning.image_mask[:, None, None]
        conv: dict[str, Any] = dict(kernel_size=(3, 3), padding=1, dtype=dtype)
        halve: dict[str, Any] = dict(conv, strides=(2, 2))
        image = (conditioning.image * given[..., None]).astype(dtype)
        x = nn.silu(nn.Conv(8 * channels, name="image_latents_context_embedding_0", **conv)(image))
        x = averages(x, POOLED_SIDE)
        x = nn.silu(nn.Conv(16 * channels, name="image_latents_context_embedding_3", **halve)(x))
        x = nn.Conv(dim, name="image_latents_context_embedding_5", **halve)(x)
        grid = x.reshape(len(x), -1, dim)

        tokens = conditioning.image_tokens
        tokens = jnp.zeros((len(x), 1, dim), dtype) if tokens is None else (tokens * given).astype(dtype)
        width = 4 * spec.block_out_channels[0]
        x = nn.silu(nn.Dense(width, dtype=dtype, name="context_embedding_0")(tokens))
        x = nn.Dense(channels * dim, dtype=dtype, name="context_embedding_2")(x)
        tokens = jnp.concatenate([context.tokens, grid, x.reshape(len(x), -1, dim)], 1)
        seen = jnp.ones((len(tokens), tokens.shape[1] - context.tokens.shape[1]))
        return Context(tokens, jnp.concatenate([context.mask, seen], 1))

    def _image_frames(
        self, conditioning: Conditioning, num_frames: int
    ) -> Float[Array, "B {num_frames} h w c"]:
        """Features of the image at frame 0 and, at the others, of how far a frame is from it."""
        dtype, channels = jnp.dtype(self.spec.dtype), self.spec.latent_shape[-1]
        image = conditioning.image
        distance = jnp.linspace(0, 1, num_frames)[None, :, None, None, None]
        frames = jnp.broadcast_to(distance, (len(image), num_frames, *image.shape[1:])).at[:, 0].set(image)
        x = (frames * conditioning.image_mask[:, None, None, None, None]).astype(dtype)
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_0")(x))
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_2")(x))
        x = nn.Conv(channels, (3, 3), dtype=dtype, name="image_latents_proj_in_4")(x)
        return ImageFrames(dtype, name="image_latents_temporal_encoder")(x)


def averages(x: Float[Array, "B h w c"], side: int) -> Float[Array, "B {side} {side} c"]:
    """Means over a grid of `side` x `side` cells that cover each picture, whatever its size."""
    rows, columns = (jnp.asarray(_cells(size, side), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("pi,qj,bijc->bpqc", rows, columns, x)


def _cells(size: int, number: int) -> Float[np.ndarray, "{number} {size}"]:
    """Weights of the places in each cell. Cells overlap where they do not divide evenly."""
    cell, place = np.arange(number)[:, None], np.arange(size)[None]
    inside = (place >= cell * size // number) & (place < -(-(cell + 1) * size // number))
    return inside / inside.sum(1, keepdims=True)


class ImageFrames(nn.Module):
    """Attention across frames, as wide as the latent, on what is given of the image."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        channels, dtype, tokens = x.shape[-1], self.dtype, attention.columns(x)
        y = layers.layer_norm(tokens, "norm1")
        tokens += attention.Attention(2, channels, dtype, name="attn1")(y, y)
        hidden = nn.gelu(nn.Dense(4 * channels, dtype=dtype, name="ff_in")(tokens), approximate=False)
        tokens += nn.Dense(channels, dtype=dtype, name="ff_out")(hidden)
        return attention.from_columns(tokens, x.shape)


# ---- Its parts ----


def parts(spec: Model) -> unet.Parts:
    """The levels of this network: temporal layers follow spatial ones, on residuals of their own."""
    num_levels = len(spec.block_out_channels)
    blocks, levels = (spec.layers_per_block,) * num_levels, tuple(range(num_levels - 1))
    return unet.Parts(
        blocks, levels, jnp.dtype(spec.dtype), partial(_residual, spec), partial(_attention, spec)
    )


def _residual(
    spec: Model, x: Frames, emb: FrameEmbeddings, level: int, index: int, way: unet.Way
) -> Float[Array, "B K h w out"]:
    block, convs = layers.remat(layers.ResBlock, spec.remat), layers.remat(TemporalConvs, spec.remat)
    sizes = spec.block_out_channels[level], spec.norm_num_groups
    x = block(*sizes, 1e-5, spec.dtype, name=f"resnets_{index}")(x, emb)
    return convs(spec, name=f"temp_convs_{index}")(x)


def _attention(spec: Model, x: Frames, context: Context, level: int, index: int) -> Frames:
    spatial = layers.remat(SpatialTransformer, spec.remat)
    temporal = layers.remat(TemporalTransformer, spec.remat)
    x = spatial(spec, name=f"attentions_{index}")(x, context)
    return temporal(spec, x.shape[-1], name=f"temp_attentions_{index}")(x)


class TemporalConvs(nn.Module):
    """Four convolutions over frames, each normalised over all of them; the identity at initialisation."""

    spec: Model

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        spec, h = self.spec, x
        for i, init in enumerate((RANDOM, RANDOM, RANDOM, ZEROS), start=1):
            h = nn.silu(layers.group_norm(h, spec.norm_num_groups, 1e-5, f"conv{i}_0", over_frames=True))
            # diffusers counts the layers of a list, and from the second on there is dropout in it.
            h = layers.TemporalConv(spec.dtype, init, name=f"conv{i}_{2 if i == 1 else 3}")(h)
        return x + h


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to the context."""

    spec: Model

    @nn.compact
    def __call__(self, x: Frames, context: Context) -> Frames:
        spec, c = self.spec, x.shape[-1]
        sizes = c // spec.head_dim, spec.head_dim, spec.dtype, spec.query_chunk
        tokens = attention.frame_tokens(layers.group_norm(x, spec.norm_num_groups, 1e-6, "norm"))
        tokens = nn.Dense(c, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = attention.TransformerBlock(*sizes, name="transformer_blocks_0")(tokens, *context)
        return x + nn.Dense(c, dtype=spec.dtype, name="proj_out")(tokens).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Self-attention across the frames of each place, twice; the identity at initialisation."""

    spec: Model
    inner_channels: int

    @nn.compact
    def __call__(self, x: Frames) -> Frames:
        spec, inner = self.spec, self.inner_channels
        sizes = inner // spec.head_dim, spec.head_dim, spec.dtype
        tokens = attention.columns(layers.group_norm(x, spec.norm_num_groups, 1e-6, "norm", over_frames=True))
        tokens = nn.Dense(inner, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = attention.TransformerBlock(*sizes, name="transformer_blocks_0")(tokens)
        project = nn.Dense(x.shape[-1], dtype=spec.dtype, kernel_init=ZEROS, name="proj_out")
        return x + attention.from_columns(project(tokens), x.shape)
