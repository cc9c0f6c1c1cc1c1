"""Stable Video Diffusion and SV3D: image to video, and image to orbit, with public weights.

SVD (Blattmann et al. 2023, arXiv 2311.15127) puts a temporal residual block after every spatial one and a
temporal transformer after every spatial one, and blends each pair with a learned weight. SV3D (Voleti et al.
2024, arXiv 2403.12008) is SVD fine-tuned to 21 frames around an object, and SV3D_p is also told the cameras.
The picture is shown to every frame, as a latent on extra channels and as a CLIP embedding to attend to; there
is no text. IM-3D's own generator is not public: these are the public ones that do its part (Sec. 3.1).

Both were trained with EDM (Karras et al. 2022): use `config.schedule.kind = "edm"`, in whose terms they
predict "v". Parameters have the names of diffusers' UNetSpatioTemporalConditionModel; `svd_checkpoints` reads
and writes its weights and those in the layout of Stability's own files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from im3d_jax.backbones import Params, attention, layers, svd_checkpoints, unet
from im3d_jax.backbones.layers import FrameEmbeddings, Frames
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.pretrained import SourceOf
from recon_torch.ranges import NumViews, Positive, Range

GROUPS = 32
"""Groups of channels that are normalised together."""

SMALL = dict(
    latent_shape=(4, 4, 4),
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(0,),
    num_attention_heads=(2, 4),
    cross_attention_dim=24,
    addition_time_embed_dim=16,
    num_views=3,
)
"""Arguments of a model that checks and benchmarks can run anywhere."""


class Vector(enum.StrEnum):
    """What every frame is told, as sinusoids; numbers that a published model was trained with."""

    SVD = "svd"
    """Frames per second less one, the amount of motion and the noise of the picture."""
    SV3D_U = "sv3d_u"
    """The noise of the picture."""
    SV3D_P = "sv3d_p"
    """The noise of the picture and, twice as wide, the camera's polar angle and azimuth."""


class InputView(enum.StrEnum):
    """The frame that is the picture's view, which is view 0 of the contract."""

    FIRST = "first"
    """SVD."""
    LAST = "last"
    """SV3D: frame i stands at azimuth 2 pi (i + 1) / K."""


@dataclass(frozen=True, kw_only=True)
class Model(unet.UNetModel):
    """A denoiser under the backbone contract, by default SVD-XT; see `unet.UNetModel` for arguments not
    listed.

    Args:
        block_out_channels, layers_per_block: channels of the levels, in 32 groups; residual blocks of each.
        attention_levels: levels with attention; level l has latents of side h / 2^l.
        num_attention_heads: of each level.
        cross_attention_dim: of the image's embedding.
        num_views: frames that the weights were trained for: 14 (SVD), 25 (SVD-XT), 21 (SV3D); None for any.
        vector: the `Vector` that every frame is told, each number as `addition_time_embed_dim` sinusoids.
        fps, motion_bucket: frames per second, and amount of motion in [0, 255].
        noise_aug: standard deviation of the noise that the picture is said to have; none is added here.
        input_view: the `InputView`.
        orbit_direction: 1 if the frames' azimuths grow counter-clockwise seen from above, -1 if clockwise.
            SV3D's published examples turn counter-clockwise.
        latent_scale: factor of noisy latents that the picture's latent, on the extra channels, is without.
        groupnorm_eps: of the residual blocks that have 1e-6 in diffusers: on the way down in levels with
            attention, on the way up in all. Stability's own code, which the weights were trained with, has
            1e-5 there as everywhere.
    """

    latent_shape: unet.LatentShape = (72, 72, 4)
    block_out_channels: Sequence[unet.Channels] = (320, 640, 1280, 1280)
    layers_per_block: unet.Layers = 2
    attention_levels: Sequence[unet.Level] = (0, 1, 2)
    num_attention_heads: Sequence[Annotated[int, Range(1, 1024)]] = (5, 10, 20, 20)
    cross_attention_dim: unet.Channels = 1024
    addition_time_embed_dim: unet.Channels = 256
    num_views: NumViews | None = 25
    vector: Vector | str = Vector.SVD
    fps: Annotated[int, Range(1, 1000)] = 7
    motion_bucket: Annotated[int, Range(0, 255)] = 127
    noise_aug: Annotated[float, Range(0, 1000)] = 0.02
    input_view: InputView | str = InputView.FIRST
    orbit_direction: Annotated[int, Range(-1, 1)] = 1
    latent_scale: Positive = 0.18215
    groupnorm_eps: Annotated[float, Range(above=0, most=1)] = 1e-6

    choices: ClassVar = {"vector": Vector, "input_view": InputView}
    prediction_type: ClassVar[str] = "v"
    temporal_pattern: ClassVar[str] = (
        "temporal_res_block|temporal_transformer_blocks|time_mixer|time_pos_embed"
    )

    def problems(self) -> Iterator[str]:
        num_levels = len(self.block_out_channels)
        yield from self.latent_problems(num_levels)
        yield from self.level_problems(num_levels, num_attention_heads=self.num_attention_heads)
        if any(channels % GROUPS for channels in self.block_out_channels):
            yield f"block_out_channels {self.block_out_channels} are not multiples of 32, the norms' groups"
        if self.orbit_direction not in (1, -1):
            yield f"orbit_direction {self.orbit_direction} is not 1 or -1"

    @property
    def net(self) -> UNet:
        return UNet(self)

    def frame_order(self, num_views: int) -> Int[np.ndarray, " K"]:
        """The view that each of the network's own frames shows."""
        return self.orbit_direction * self.frame_steps(num_views) % num_views

    def frame_steps(self, num_views: int) -> Int[np.ndarray, " K"]:
        """Steps that each of the network's own frames stands from the picture along its orbit."""
        return (np.arange(num_views) + (self.input_view == InputView.LAST)) % num_views

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image. SV3D_p is told that its cameras are level with the object. There is no text."""
        return Conditioning(
            image=jnp.zeros((batch, *self.latent_shape)),
            image_mask=jnp.zeros(batch),
            text=(),
            text_mask=(),
            image_tokens=jnp.zeros((batch, 1, self.cross_attention_dim)),
            elevation_rad=jnp.zeros(batch) if self.vector == Vector.SV3D_P else None,
        )

    def from_pretrained(self, path: str | Path, params: Params, averaged: bool = False) -> Params:
        """See `svd_checkpoints.from_pretrained`."""
        heads = self.num_attention_heads
        return svd_checkpoints.from_pretrained(path, params, self._layout, heads, averaged)

    def to_pretrained(self, params: Params) -> dict[str, np.ndarray]:
        """The parameters as tensors of diffusers' UNetSpatioTemporalConditionModel."""
        return svd_checkpoints.to_pretrained(params)

    def to_stability(self, params: Params) -> dict[str, np.ndarray]:
        """The parameters as tensors of Stability's own files."""
        return svd_checkpoints.to_stability(params, self._layout)

    def public_names(self) -> dict[str, SourceOf]:
        """See `backbones.NamedBackbone`."""
        return svd_checkpoints.public_names(self._layout)

    @property
    def _layout(self) -> svd_checkpoints.Layout:
        num_levels, levels = len(self.block_out_channels), tuple(self.attention_levels)
        return svd_checkpoints.Layout(num_levels, self.layers_per_block, levels)


# ---- The network ----


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has.

    `timestep` is EDM's c_noise = ln(sigma) / 4. Inside, frames are in the network's own order.
    """

    spec: Model

    @nn.compact
    def __call__(self, noisy: Frames, timestep: Float[Array, " B"], conditioning: Conditioning) -> Frames:
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        order, width = spec.frame_order(noisy.shape[1]), spec.block_out_channels[0]
        emb = layers.Embedding(4 * width, name="time_embedding")(layers.sinusoids(timestep, width))[:, None]
        emb += layers.Embedding(4 * width, name="add_embedding")(
            frame_vectors(spec, conditioning, len(order))
        )
        tokens = image_tokens(spec, conditioning).astype(dtype)

        noisy = noisy[:, order]
        image = conditioning.image * conditioning.image_mask[:, None, None, None] / spec.latent_scale
        x = jnp.concatenate([noisy, jnp.broadcast_to(image[:, None], noisy.shape)], -1).astype(dtype)
        x = nn.Conv(width, (3, 3), dtype=dtype, name="conv_in")(x)
        x = unet.down_and_up(parts(spec), x, emb, tokens)
        x = nn.silu(layers.group_norm(x, GROUPS, 1e-5, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)[:, np.argsort(order)]


def image_tokens(spec: Model, conditioning: Conditioning) -> Float[Array, "B L d"]:
    """What the network attends to: the picture's embedding, or zeros."""
    tokens = conditioning.image_tokens
    if tokens is None:
        tokens = jnp.zeros((len(conditioning.image), 1, spec.cross_attention_dim))
    return tokens * conditioning.image_mask[:, None, None]


def frame_vectors(spec: Model, conditioning: Conditioning, num_views: int) -> Float[Array, "B K d"]:
    """What each of the network's own frames is told; see `Vector`."""
    batch, dim = len(conditioning.image), spec.addition_time_embed_dim
    numbers = [spec.noise_aug]
    if spec.vector == Vector.SVD:  # trained with the frame rate less one
        numbers = [spec.fps - 1, spec.motion_bucket, spec.noise_aug]
    told = [layers.sinusoids(jnp.array(numbers), dim).reshape(1, 1, -1)]
    if spec.vector == Vector.SV3D_P:
        elevation = conditioning.elevation_rad
        polar = jnp.pi / 2 - (jnp.zeros(batch) if elevation is None else elevation)
        azimuth = jnp.asarray(2 * np.pi * spec.frame_steps(num_views) / num_views)
        told += [layers.sinusoids(polar, 2 * dim)[:, None], layers.sinusoids(azimuth, 2 * dim)[None]]
    return jnp.concatenate([jnp.broadcast_to(p, (batch, num_views, p.shape[-1])) for p in told], -1)


def parts(spec: Model) -> unet.Parts:
    """The levels of this network: spatial layers blended with temporal ones."""
    blocks = (spec.layers_per_block,) * len(spec.block_out_channels)
    dtype, levels = jnp.dtype(spec.dtype), tuple(spec.attention_levels)
    return unet.Parts(blocks, levels, dtype, partial(_residual, spec), partial(_attention, spec))


def _residual(
    spec: Model, x: Frames, emb: FrameEmbeddings, level: int, index: int, way: unet.Way
) -> Float[Array, "B K h w out"]:
    """As diffusers has it: with `groupnorm_eps` on the way up, and on the way down beside attention."""
    block = layers.remat(SpatioTemporalResBlock, spec.remat)
    ours = way is unet.Way.UP or (way is unet.Way.DOWN and level in spec.attention_levels)
    epsilon = spec.groupnorm_eps if ours else 1e-5
    return block(spec.block_out_channels[level], epsilon, spec.dtype, name=f"resnets_{index}")(x, emb)


def _attention(spec: Model, x: Frames, context: Float[Array, "B L d"], level: int, index: int) -> Frames:
    block, heads = layers.remat(SpatioTemporalTransformer, spec.remat), spec.num_attention_heads[level]
    return block(heads, spec.query_chunk, spec.dtype, name=f"attentions_{index}")(x, context)


class SpatioTemporalResBlock(nn.Module):
    """A residual block on each frame, blended with one on the frames of each place."""

    channels: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Frames, emb: FrameEmbeddings) -> Float[Array, "B K h w out"]:
        x = layers.ResBlock(self.channels, GROUPS, self.epsilon, self.dtype, name="spatial_res_block")(x, emb)
        y = layers.TemporalResBlock(
            GROUPS, self.epsilon, self.dtype, layers.ZEROS, name="temporal_res_block"
        )(x, emb)
        return layers.Mixer(name="time_mixer")(x, y)


class SpatioTemporalTransformer(nn.Module):
    """Attention within each frame and to the image's embedding, blended with attention across frames."""

    num_heads: int
    query_chunk: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Frames, context: Float[Array, "B L d"]) -> Frames:
        (k, c), dtype = (x.shape[1], x.shape[-1]), self.dtype
        sizes = dict(num_heads=self.num_heads, head_dim=c // self.num_heads, dtype=dtype)
        tokens = nn.Dense(c, dtype=dtype, name="proj_in")(layers.group_norm(x, GROUPS, 1e-6, "norm"))
        within = attention.TransformerBlock(
            **sizes, query_chunk=self.query_chunk, name="transformer_blocks_0"
        )
        tokens = within(attention.frame_tokens(tokens), context).reshape(x.shape)
        place = layers.Embedding(4 * c, c, layers.ZEROS, name="time_pos_embed")(
            layers.sinusoids(jnp.arange(k), c)
        )
        placed = attention.columns(tokens + place.astype(dtype)[None, :, None, None])
        name = "temporal_transformer_blocks_0"
        across = attention.TransformerBlock(**sizes, out_init=layers.ZEROS, ff_first=True, name=name)
        tokens = layers.Mixer(name="time_mixer")(
            tokens, attention.from_columns(across(placed, context), x.shape)
        )
        return x + nn.Dense(c, dtype=dtype, name="proj_out")(tokens)


# ---- Guidance ----


def triangular(
    num_views: int,
    low: float = 1.0,
    high: float = 2.5,
    frame_order: Sequence[int] | Int[np.ndarray, " K"] | None = None,
) -> tuple[float, ...]:
    """SV3D's weights of guidance on the image, one for each view: `low` at the picture, `high` behind it.

    A triangle over the network's own frames ("triangular CFG scaling", Voleti et al. 2024) of which the first
    and the last have `low`; `frame_order` is `Model.frame_order`, by default SV3D's, whose last frame is view
    0. So views 0 and 1 both have `low`.
    """
    order = (np.arange(num_views) + 1) % num_views if frame_order is None else np.asarray(frame_order)
    rising = np.linspace(0, 2, num_views)
    weights = low + (high - low) * np.minimum(rising, 2 - rising)
    return tuple(weights[np.argsort(order)].tolist())
