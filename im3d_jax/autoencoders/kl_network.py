"""The autoencoder of latent diffusion (Rombach et al. 2022), and SVD's, whose decoder mixes frames.

Emu Video's (Girdhar et al. 2023, appendix), which IM-3D builds on, has this architecture with 8 latent
channels; so have those of Stable Diffusion 1, 2 and XL with 4. Stable Video Diffusion (Blattmann et al. 2023)
follows every residual block of the decoder by one over time, so that the views do not flicker.

Arrays inside are clips [B, F, H, W, C]. Modules carry diffusers' names: a parameter's path says the name of
its tensor in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from im3d_jax import pretrained, public_tensors
from im3d_jax.autoencoders.patches import from_patches, to_patches
from im3d_jax.backbones.attention import attend
from im3d_jax.backbones.layers import Mixer, ResBlock, TemporalConv, TemporalResBlock, group_norm, upsample
from im3d_jax.params import cast
from recon_torch import ranges
from recon_torch.errors import UserError
from recon_torch.files import replacing, write_json
from recon_torch.ranges import Positive, Range, settings

Clips = Float[Array, "B F _ _ _"]
"""B clips of F frames, channels last. Sides and channels change on the way."""


Channels = Annotated[int, Range(1, 65_536)]


class ComputeDtype(StrEnum):
    """The types that the networks compute in: not float16, which published weights' activations overflow."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@settings
class Architecture:
    """Sizes of the networks, by the names of diffusers' config.json. The defaults are Emu Video's.

    Args:
        block_out_channels: width of each level; every level but one halves the side.
        layers_per_block: residual blocks of a level; the decoder has one more.
        scaling_factor, shift_factor: the diffusion model sees (mean - shift) * scale. Unspecified in the
            paper; the defaults are Stable Diffusion's.
        use_quant_conv, use_post_quant_conv: a 1x1 convolution after the encoder and before the decoder.
        temporal_decoder: whether the decoder is SVD's, which has no convolution before it.
        rgba: whether alpha is a fourth channel of the images. Latents then hold the object's silhouette,
            which gives the fit its masks (Sec. 3.3).
        patch_size: squares of so many pixels become channels before the first convolution and pixels again
            after the last one. It halves the side at a fraction of the cost of a level, as in LTX-Video's
            autoencoder (HaCohen et al. 2024).
        dtype: of the computation, see `ComputeDtype`; normalisation and softmax stay float32.
    """

    block_out_channels: Sequence[Channels] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Range(1, 64)] = 2
    latent_channels: Annotated[int, Range(1, 4096)] = 8
    norm_num_groups: Channels = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Annotated[float, Range(-1e6, 1e6)] = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    temporal_decoder: bool = False
    rgba: bool = False
    patch_size: Annotated[int, Range(1, 64)] = 1
    dtype: ComputeDtype | str = ComputeDtype.FLOAT32

    def __post_init__(self):
        if not self.block_out_channels:
            raise UserError("block_out_channels is empty; give the width of each level")
        if self.temporal_decoder:
            object.__setattr__(self, "use_post_quant_conv", False)

    @property
    def image_channels(self) -> int:
        """Channels of an image: 3, or 4 with alpha."""
        return 4 if self.rgba else 3

    @property
    def patch_channels(self) -> int:
        """Channels of an image whose patches have become channels."""
        return self.image_channels * self.patch_size**2

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels. Raises UserError if it has none."""
        factor = self.patch_size * 2 ** (len(self.block_out_channels) - 1)
        if size % factor:
            raise UserError(f"config.size is {size}; this autoencoder takes multiples of {factor}")
        return size // factor, size // factor, self.latent_channels

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random parameters; under `jax.eval_shape`, their shapes."""
        side = self.patch_size * 2 ** len(self.block_out_channels)
        return Network(self).init(key, jnp.zeros((1, 1, side, side, self.image_channels)))["params"]


# ---- Weights ----

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FAMILIES = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
BUILT = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
"""Entries of a config.json that diffusers leaves open, and the one value of each that is built here."""

UNSAID = {"block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4}
"""The values that a config.json means where it does not say them and they are not our defaults."""

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention's layers in files from before diffusers 0.12, such as Stable Diffusion 1's."""


def read_architecture(path: str, **sizes: Any) -> Architecture:
    """The architecture of the config.json at `path`, or of `sizes` if there is none. It reads no weights.

    Raises UserError for sizes that do not exist or repeat a config.json, and for what is not built here.
    """
    unknown = sizes.keys() - {each.name for each in fields(Architecture)}
    if unknown:
        raise UserError(
            f"config.autoencoder.kwargs: autoencoder_kl takes no argument {min(unknown)}; remove it"
        )
    config = pretrained.read_config(_directory(path)) if path else {}
    if not config:
        return _architecture("config.autoencoder.kwargs", sizes)
    if repeated := sizes.keys() - {"dtype"}:
        raise UserError(
            f"config.autoencoder.kwargs.{min(repeated)}: config.json of {path} says it; remove it"
        )
    family = config.get("_class_name")
    if family not in FAMILIES:
        raise UserError(f"{path} holds {family or 'a model of no name'}; give an {' or '.join(FAMILIES)}")
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    other = [f"{key} {config[key]!r}" for key in BUILT if config.get(key, BUILT[key]) != BUILT[key]]
    other += sorted(blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"})
    if other:
        raise UserError(f"{path} has {other[0]}, which autoencoder_kl does not build; give another")
    said = {name: value for name, value in (UNSAID | config).items() if value is not None}
    sizes |= {each.name: said[each.name] for each in fields(Architecture) if each.name in said}
    sizes |= _image_format(path, said)
    sizes["temporal_decoder"] = family == "AutoencoderKLTemporalDecoder"
    return _architecture(f"autoencoder_kl of {path}", sizes)


def _architecture(source: str, sizes: Mapping[str, Any]) -> Architecture:
    """The architecture of these sizes. Raises UserError that names the source of a size that cannot be."""
    ranges.check_arguments(Architecture, sizes, source)
    return Architecture(**sizes)


def _image_format(path: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the images of a config.json have alpha. Raises UserError for any other number of channels."""
    area = said.get("patch_size", 1) ** 2
    taken, made = (said.get(key, 3 * area) for key in ("in_channels", "out_channels"))
    if taken != made or taken not in (3 * area, 4 * area):
        found = f"{taken} channels in and {made} out"
        raise UserError(
            f"{path} has {found}; autoencoder_kl builds 3 (RGB) or 4 (RGBA) of each; give another"
        )
    return {"rgba": taken == 4 * area}


def read_params(path: str, architecture: Architecture) -> dict[str, Any]:
    """The weights at `path` as float32 parameters; see `kl.load`."""
    if not path:
        hint = "name a diffusers AutoencoderKL, or 'random' for a test"
        raise UserError(f"config.autoencoder.kwargs.path is empty; {hint}")
    if path == "random":
        return jax.jit(architecture.init)(jax.random.key(0, impl="rbg"))  # which compiles in less time
    found = public_tensors.read(_directory(path), public_tensors.AUTOENCODER)
    tensors = {_present_name(name): tensor for name, tensor in found.items()}
    shapes = jax.eval_shape(architecture.init, jax.random.key(0))
    return pretrained.to_params(tensors, shapes, source_of, f"autoencoder {path}")


def write(
    directory: str | Path, params: PyTree, architecture: Architecture, dtype: DTypeLike = np.float32
) -> None:
    """Writes an autoencoder as diffusers does: config.json and weights of `dtype`. `read_params` reads them.

    Raises UserError that names a weight with a value that `dtype` does not hold.
    """
    path = Path(directory) / WEIGHTS_NAME
    tensors = pretrained.to_tensors(params, source_of)
    tensors = {name: cast(tensor, dtype, f"{path}: {name}") for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    levels = len(architecture.block_out_channels)
    config = {
        "_class_name": FAMILIES[architecture.temporal_decoder],
        "in_channels": architecture.patch_channels,
        "out_channels": architecture.patch_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "block_out_channels": architecture.block_out_channels,
        "layers_per_block": architecture.layers_per_block,
        "latent_channels": architecture.latent_channels,
        "scaling_factor": architecture.scaling_factor,
    }
    if architecture.patch_size > 1:
        config["patch_size"] = architecture.patch_size  # diffusers takes images whose patches are channels
    if not architecture.temporal_decoder:  # which has the others built in
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
        others = "norm_num_groups shift_factor use_quant_conv use_post_quant_conv mid_block_add_attention"
        config |= {name: getattr(architecture, name) for name in others.split()}
    write_json(Path(directory) / "config.json", config)


def source_of(path: str) -> pretrained.Source:
    """Where a parameter stands in a checkpoint, for `pretrained`."""
    return pretrained.Source(pretrained.torch_name(path))


def _directory(path: str) -> Path:
    inside_pipeline = Path(path) / "vae"
    return inside_pipeline if inside_pipeline.is_dir() else Path(path)


def _present_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    parent, _, layer = module.rpartition(".")
    return f"{parent}.{OLD_NAMES[layer]}.{leaf}" if layer in OLD_NAMES else name


# ---- Networks ----


class Network(nn.Module):
    """The encoder and the decoder, with the 1x1 convolutions between them."""

    spec: Architecture

    def setup(self):
        spec = self.spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        if spec.use_quant_conv:
            self.quant_conv = _conv(spec, 2 * spec.latent_channels, 1)
        if spec.use_post_quant_conv:
            self.post_quant_conv = _conv(spec, spec.latent_channels, 1)

    def encode(self, images: Clips) -> Float[Array, "B F h w c2"]:
        """Images in [-1, 1] -> the channels of the posterior: its means, then its log variances."""
        moments = self.encoder(to_patches(images, self.spec.patch_size))
        return (self.quant_conv(moments) if self.spec.use_quant_conv else moments).astype(jnp.float32)

    def decode(self, latents: Float[Array, "B F h w c"]) -> Clips:
        """Unscaled latents -> images around [-1, 1]."""
        latents = self.post_quant_conv(latents) if self.spec.use_post_quant_conv else latents
        return from_patches(self.decoder(latents).astype(jnp.float32), self.spec.patch_size)

    def __call__(self, images: Clips) -> Clips:
        return self.decode(self.encode(images)[..., : self.spec.latent_channels])


class Encoder(nn.Module):
    """Images, with patches as channels -> the channels of the posterior, before the 1x1 convolution."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Float[Array, "B F h w c2"]:
        spec = self.spec
        x = _conv(spec, spec.block_out_channels[0], name="conv_in")(x)
        for level, channels in enumerate(spec.block_out_channels):
            down = level + 1 < len(spec.block_out_channels)
            x = DownBlock(spec, channels, down, name=f"down_blocks_{level}")(x)
        x = MidBlock(spec, res_block, name="mid_block")(x)
        x = nn.silu(_norm(x, spec, "conv_norm_out"))
        return _conv(spec, 2 * spec.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents, after the 1x1 convolution -> images."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Float[Array, "B F h w c"]) -> Clips:
        spec = self.spec
        block = SpatioTemporalResBlock if spec.temporal_decoder else res_block
        x = _conv(spec, spec.block_out_channels[-1], name="conv_in")(x)
        x = MidBlock(spec, block, name="mid_block")(x)
        for level, channels in enumerate(reversed(spec.block_out_channels)):
            up = level + 1 < len(spec.block_out_channels)
            x = UpBlock(spec, block, channels, up, name=f"up_blocks_{level}")(x)
        x = nn.silu(_norm(x, spec, "conv_norm_out"))
        x = _conv(spec, spec.patch_channels, name="conv_out")(x)
        return TemporalConv(x.dtype, name="time_conv_out")(x) if spec.temporal_decoder else x


class DownBlock(nn.Module):
    """Residual blocks of one width, and half the side after them if `down`."""

    spec: Architecture
    channels: int
    down: bool

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        for i in range(self.spec.layers_per_block):
            x = res_block(self.spec, self.channels, name=f"resnets_{i}")(x)
        return Downsample(self.spec, name="downsamplers_0")(x) if self.down else x


class Downsample(nn.Module):
    """Halves the side. Only the lower and the right border are padded, as the weights were trained."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        padding = ((0, 1), (0, 1))
        return _conv(self.spec, x.shape[-1], strides=(2, 2), padding=padding, name="conv")(x)


class UpBlock(nn.Module):
    """Residual blocks of one width, and twice the side after them if `up`."""

    spec: Architecture
    block: Callable[..., nn.Module]
    channels: int
    up: bool

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        for i in range(self.spec.layers_per_block + 1):
            x = self.block(self.spec, self.channels, name=f"resnets_{i}")(x)
        return Upsample(self.spec, name="upsamplers_0")(x) if self.up else x


class Upsample(nn.Module):
    """Doubles the side."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        return _conv(self.spec, x.shape[-1], name="conv")(upsample(x))


class MidBlock(nn.Module):
    """Two residual blocks with attention within each frame between them."""

    spec: Architecture
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        x = self.block(self.spec, x.shape[-1], name="resnets_0")(x)
        if self.spec.mid_block_add_attention:
            x = Attention(self.spec, name="attentions_0")(x)
        return self.block(self.spec, x.shape[-1], name="resnets_1")(x)


class Attention(nn.Module):
    """Residual self-attention with one head over the places of each frame."""

    spec: Architecture

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        b, f, h, w, c = x.shape
        tokens = _norm(x, self.spec, "group_norm").reshape(b * f, h * w, 1, c)
        q, k, v = (nn.Dense(c, dtype=x.dtype, name=f"to_{each}")(tokens) for each in "qkv")
        out = attend(q, k, v)
        return x + nn.Dense(c, dtype=x.dtype, name="to_out_0")(out).reshape(x.shape)


def res_block(spec: Architecture, channels: int, **kwargs: Any) -> ResBlock:
    """A residual block of two normalised convolutions within each frame."""
    return ResBlock(channels, spec.norm_num_groups, 1e-6, jnp.dtype(spec.dtype), **kwargs)


# ---- Over time: SVD's decoder ----


class SpatioTemporalResBlock(nn.Module):
    """A residual block within each frame, blended with the block over time that follows it."""

    spec: Architecture
    channels: int

    @nn.compact
    def __call__(self, x: Clips) -> Clips:
        within = res_block(self.spec, self.channels, name="spatial_res_block")(x)
        across = temporal_res_block(self.spec, name="temporal_res_block")(within)
        return Mixer(0.0, name="time_mixer")(across, within)


def temporal_res_block(spec: Architecture, **kwargs: Any) -> TemporalResBlock:
    """A residual block of two convolutions over time, which are normalised over the whole clip."""
    return TemporalResBlock(spec.norm_num_groups, 1e-5, jnp.dtype(spec.dtype), **kwargs)


def _conv(spec: Architecture, channels: int, kernel: int = 3, **kwargs: Any) -> nn.Conv:
    arguments: dict[str, Any] = {"padding": kernel // 2, "dtype": jnp.dtype(spec.dtype)} | kwargs
    return nn.Conv(channels, (kernel, kernel), **arguments)


def _norm(x: Clips, spec: Architecture, name: str) -> Clips:
    return group_norm(x, spec.norm_num_groups, 1e-6, name)
