"""ModelScope's text to video and I2VGen-XL: the public generators nearest to Emu Video.

Both add temporal layers to a Stable Diffusion, as the paper's generator does (Sec. 3.1): four temporal
convolutions after every residual block and a temporal transformer after every spatial one, each on a residual
of its own (Wang et al. 2023, arXiv 2308.06571). ModelScope sees text alone; fine-tuned here with the image on
extra input channels it is conditioned as Emu Video is. I2VGen-XL (Zhang et al. 2023, arXiv 2311.04145) sees
the image as a latent on extra channels, as tokens beside the text's, and as a CLIP embedding.

The modules have the names of diffusers' UNet3DConditionModel and I2VGenXLUNet. Arrays are [B, K, h, w, c].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax import pretrained
from im3d_jax.backbones.svd_unet import Embedding, FeedForward, Resample, TemporalConv, sinusoids
from im3d_jax.conditioning import Conditioning
from im3d_jax.pretrained import Source
from recon_torch.errors import UserError

TEMPORAL = "temp_convs|temp_attentions|transformer_in"
"""Pattern of the parameter paths that Sec. 3.1 trains."""

PARTITION_RULES = (
    (r"(proj_out|to_out_0|net_2|conv2|linear_2)/kernel", ("mlp", "embed")),
    (r"/kernel", ("embed", "mlp")),
)
"""Logical names of a parameter's last axes; the first pattern that is found in its path counts."""

FAMILIES = {"none": "UNet3DConditionModel", "channels": "UNet3DConditionModel", "i2vgen": "I2VGenXLUNet"}
"""How the image enters -> the class of diffusers whose parameters the network has."""

SMALL = dict(
    latent_shape=(8, 8, 4),
    block_out_channels=(32, 64),
    layers_per_block=1,
    head_dim=8,
    cross_attention_dim=32,
    max_words=5,
    image="i2vgen",
)
"""Arguments of a model that checks and benchmarks can run anywhere."""

POOLED_SIDE = 32  # to which I2VGen-XL averages the image's latent before it makes tokens of it


@dataclass(frozen=True)
class Model:
    """A denoiser under the backbone contract; the defaults are ModelScope's and I2VGen-XL's sizes.

    Args:
        latent_shape: (h, w, c) of one frame's latent; h and w are multiples of 2^(levels - 1).
        block_out_channels, layers_per_block: channels of the levels, and their residual blocks. All levels
            but the last have attention.
        norm_num_groups, head_dim: groups of channels that are normalised together; size of attention heads.
        cross_attention_dim, max_words: of the text's embedding, which is CLIP's.
        image: how the picture enters. "none": not at all (ModelScope); "channels": its latent at frame 0 and
            a mask, on input channels whose weights start at zero (Emu Video's way, for a ModelScope
            fine-tuned here); "i2vgen": as in I2VGen-XL, which also asks for `Conditioning.image_tokens`, one
            CLIP embedding.
        fps: what I2VGen-XL is told of the frame rate. It was trained at 16 frames, 8 to 16 a second.
        prediction_type: of the trained network: "epsilon" for ModelScope, "v" for I2VGen-XL.
        dtype: of the computation; normalisation, softmax and the embedding of the noise level stay float32.
        remat: what the backward pass computes again instead of keeping: "" for nothing, or a policy of
            `jax.checkpoint_policies` that says what is kept inside the blocks.
    """

    latent_shape: Sequence[int] = (32, 32, 4)
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    head_dim: int = 64
    cross_attention_dim: int = 1024
    max_words: int = 77
    image: str = "none"
    fps: float = 16.0
    prediction_type: str = "epsilon"
    dtype: Any = "float32"
    remat: str = ""
    net: nn.Module = field(init=False, repr=False, compare=False)

    num_views = None
    temporal_pattern = TEMPORAL
    partition_rules = PARTITION_RULES
    traceable = True

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # a model is a static argument of jit, so it must be hashable
                object.__setattr__(self, name, tuple(value))
        for problem in self._problems():
            raise UserError(f"unet3d: {problem}")
        object.__setattr__(self, "net", UNet(self))

    def _problems(self) -> Iterator[str]:
        """What arguments are wrong, and why."""
        divisor = 2 ** (len(self.block_out_channels) - 1)
        if any(side % divisor for side in self.latent_shape[:2]):
            yield f"latent_shape {self.latent_shape} is not divisible by {divisor}; change config.size"
        for name, size in (("norm_num_groups", self.norm_num_groups), ("head_dim", self.head_dim)):
            if any(channels % size for channels in self.block_out_channels):
                yield f"block_out_channels {self.block_out_channels} are not multiples of {name} {size}"
        if self.image not in FAMILIES:
            yield f"no image {self.image!r}; there is {', '.join(FAMILIES)}"
        if self.remat and not hasattr(jax.checkpoint_policies, self.remat):
            yield f"remat {self.remat!r} is not a policy of jax.checkpoint_policies"

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
        """The network's prediction, float32, of type `prediction_type`.

        The public networks were trained to attend to the padding of their prompts as well: give them a text
        mask of ones.
        """
        return self.net.apply({"params": params}, noisy, timestep, conditioning)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        text = jnp.zeros((batch, self.max_words, self.cross_attention_dim))
        mask = jnp.zeros((batch, self.max_words)).at[:, 0].set(1)
        tokens = jnp.zeros((batch, 1, self.cross_attention_dim)) if self.image == "i2vgen" else None
        image = jnp.zeros((batch, *self.latent_shape))
        return Conditioning(image, jnp.zeros(batch), (text,), (mask,), tokens)

    def from_pretrained(self, path: str | Path, params) -> dict:
        """The parameters of a checkpoint of diffusers, float32.

        Args:
            path: a .safetensors file or a diffusers directory.
            params: their shapes. With `image` "channels" and a checkpoint that knows no image, the weights of
                the image's channels are theirs: zero after `init`.

        Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in
        the directory's config.json that this model does not have.
        """
        family = FAMILIES[self.image]
        self._check_config(pretrained.read_config(path), path)
        tensors = pretrained.read(path)
        width, channels = self.block_out_channels[0], self.latent_shape[-1]
        kernel = tensors.get("conv_in.weight")
        if self.image == "channels" and kernel is not None and kernel.shape == (width, channels, 3, 3):
            image = np.asarray(params["conv_in"]["kernel"])[:, :, channels:].transpose(3, 2, 0, 1)
            tensors["conv_in.weight"] = np.concatenate([kernel, image], 1)
        return pretrained.to_params(tensors, params, _source_of, f"{path} ({family})")

    def to_pretrained(self, params) -> dict[str, np.ndarray]:
        """The parameters as tensors of diffusers' class; "channels" is one of 2 c + 1 input channels."""
        return pretrained.to_tensors(params, _source_of)

    def _check_config(self, config: dict, path) -> None:
        """What shapes do not show."""
        ours = {
            "_class_name": FAMILIES[self.image],
            "attention_head_dim": self.head_dim,
            "norm_num_groups": self.norm_num_groups,
        }
        for key, value in ours.items():
            if config.get(key, value) != value:
                raise UserError(
                    f"{path}: config.json has {key} {config[key]}, config.backbone makes it {value}"
                )


def _source_of(path: str) -> Source:
    path = path.replace("/ff_in/", "/ff/net_0/proj/").replace("/ff_out/", "/ff/net_2/")
    return Source(pretrained.torch_name(path))


# ---- The network ----


class Context(NamedTuple):
    """What spatial transformers attend to: tokens [B, L, d] where mask [B, L] is 1."""

    tokens: Array
    mask: Array


class UNet(nn.Module):
    """The whole network; `spec` is the `Model` whose sizes it has."""

    spec: Any

    @nn.compact
    def __call__(self, noisy, timestep, conditioning: Conditioning):
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        width, levels = spec.block_out_channels[0], range(len(spec.block_out_channels))
        emb = Embedding(4 * width, name="time_embedding")(sinusoids(timestep, width))
        (text,), (mask,) = conditioning.text, conditioning.text_mask
        context, x = Context(text.astype(dtype), mask), noisy.astype(dtype)
        if spec.image == "channels":
            x = _with_image(x, conditioning)
        elif spec.image == "i2vgen":
            emb += self._frame_rate(width)
            context = self._with_image_tokens(context, conditioning)
            x = jnp.concatenate([x, self._image_frames(conditioning, noisy.shape[1])], -1)
        emb = emb[:, None]  # the same for every frame

        def kernel_init(key, shape, kernel_dtype=jnp.float32):
            kernel = nn.initializers.lecun_normal()(key, shape, kernel_dtype)
            return kernel.at[:, :, noisy.shape[-1] :].set(0)

        x = nn.Conv(width, (3, 3), dtype=dtype, kernel_init=kernel_init, name="conv_in")(x)
        x = TemporalTransformer(spec, 8 * spec.head_dim, name="transformer_in")(x)
        skips = [x]
        for level in levels:
            x, outputs = DownBlock(spec, level, name=f"down_blocks_{level}")(x, emb, context)
            skips += outputs
        x = MidBlock(spec, name="mid_block")(x, emb, context)
        for i, level in enumerate(reversed(levels)):
            taken = spec.layers_per_block + 1
            x = UpBlock(spec, level, name=f"up_blocks_{i}")(x, skips[-taken:], emb, context)
            skips = skips[:-taken]
        x = nn.silu(_group_norm(x, spec, "conv_norm_out"))
        x = nn.Conv(noisy.shape[-1], (3, 3), dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)

    # ---- What I2VGen-XL makes of its image ----

    def _frame_rate(self, width):
        """Embedding [1, d] of the frames per second."""
        x = nn.Dense(4 * width, name="fps_embedding_0")(sinusoids(jnp.array([self.spec.fps]), width))
        return nn.Dense(4 * width, name="fps_embedding_2")(nn.silu(x))

    def _with_image_tokens(self, context: Context, conditioning: Conditioning) -> Context:
        """Appends an 8x8 grid of tokens of the image's latent, and c tokens of its CLIP embedding."""
        spec, dtype = self.spec, jnp.dtype(self.spec.dtype)
        channels, dim = spec.latent_shape[-1], spec.cross_attention_dim
        given = conditioning.image_mask[:, None, None]
        conv = dict(kernel_size=(3, 3), padding=1, dtype=dtype)
        image = (conditioning.image * given[..., None]).astype(dtype)
        x = nn.silu(nn.Conv(8 * channels, name="image_latents_context_embedding_0", **conv)(image))
        x, conv["strides"] = _average(x, POOLED_SIDE), (2, 2)
        x = nn.silu(nn.Conv(16 * channels, name="image_latents_context_embedding_3", **conv)(x))
        x = nn.Conv(dim, name="image_latents_context_embedding_5", **conv)(x)
        grid = x.reshape(len(x), -1, dim)

        tokens = (conditioning.image_tokens * given).astype(dtype)
        width = 4 * spec.block_out_channels[0]
        x = nn.silu(nn.Dense(width, dtype=dtype, name="context_embedding_0")(tokens))
        x = nn.Dense(channels * dim, dtype=dtype, name="context_embedding_2")(x)
        tokens = jnp.concatenate([context.tokens, grid, x.reshape(len(x), -1, dim)], 1)
        seen = jnp.ones((len(tokens), tokens.shape[1] - context.tokens.shape[1]))
        return Context(tokens, jnp.concatenate([context.mask, seen], 1))

    def _image_frames(self, conditioning: Conditioning, num_frames: int):
        """Features [B, K, h, w, c] of the image at frame 0 and, behind it, of how far a frame is from it."""
        dtype, channels = jnp.dtype(self.spec.dtype), self.spec.latent_shape[-1]
        image = conditioning.image
        distance = jnp.linspace(0, 1, num_frames)[None, :, None, None, None]
        frames = jnp.broadcast_to(distance, (len(image), num_frames, *image.shape[1:])).at[:, 0].set(image)
        x = (frames * conditioning.image_mask[:, None, None, None, None]).astype(dtype)
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_0")(x))
        x = nn.silu(nn.Conv(4 * channels, (3, 3), dtype=dtype, name="image_latents_proj_in_2")(x))
        x = nn.Conv(channels, (3, 3), dtype=dtype, name="image_latents_proj_in_4")(x)
        return ImageFrames(dtype, name="image_latents_temporal_encoder")(x)


def _with_image(noisy, conditioning: Conditioning):
    """Appends the image at frame 0, zeros elsewhere, and a mask that is 1 where there is an image."""
    given = conditioning.image_mask[:, None, None, None].astype(noisy.dtype)
    image = jnp.zeros_like(noisy).at[:, 0].set(conditioning.image.astype(noisy.dtype) * given)
    mask = jnp.zeros_like(noisy[..., :1]).at[:, 0].set(given)
    return jnp.concatenate([noisy, image, mask], -1)


def _average(x, side: int):
    """Means over a `side` x `side` grid of cells that cover [B, h, w, c], whatever its size."""
    rows, columns = (jnp.asarray(_cells(size, side), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("pi,qj,bijc->bpqc", rows, columns, x)


def _cells(size: int, number: int) -> np.ndarray:
    """Weights [number, size] of the places in each cell. Cells overlap where they do not divide evenly."""
    cell, place = np.arange(number)[:, None], np.arange(size)[None]
    inside = (place >= cell * size // number) & (place < -(-(cell + 1) * size // number))
    return inside / inside.sum(1, keepdims=True)


class ImageFrames(nn.Module):
    """Attention across frames, as wide as the latent, on what is given of the image."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        (b, k, h, w, c), dtype = x.shape, self.dtype
        tokens = x.reshape(b, k, h * w, c).swapaxes(1, 2).reshape(b * h * w, k, c)
        y = _layer_norm(tokens, "norm1")
        tokens += Attention(2, c, dtype, name="attn1")(y, y)
        hidden = nn.gelu(nn.Dense(4 * c, dtype=dtype, name="ff_in")(tokens), approximate=False)
        tokens += nn.Dense(c, dtype=dtype, name="ff_out")(hidden)
        return tokens.reshape(b, h * w, k, c).swapaxes(1, 2).reshape(x.shape)


# ---- Blocks ----


class DownBlock(nn.Module):
    """One level on the way down. Returns its result and the outputs of all its layers, for the way up."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, emb, context):
        spec, outputs = self.spec, []
        last = len(spec.block_out_channels) - 1
        for i in range(spec.layers_per_block):
            x = _residual(spec, self.level, i, x, emb)
            if self.level < last:
                x = _attention(spec, i, x, context)
            outputs.append(x)
        if self.level < last:
            x = Resample(stride=2, dtype=spec.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """The middle of the network, with attention though its level has none."""

    spec: Any

    @nn.compact
    def __call__(self, x, emb, context):
        level = len(self.spec.block_out_channels) - 1
        x = _residual(self.spec, level, 0, x, emb)
        x = _attention(self.spec, 0, x, context)
        return _residual(self.spec, level, 1, x, emb)


class UpBlock(nn.Module):
    """One level on the way up; takes `skips` from the way down, the last one first."""

    spec: Any
    level: int

    @nn.compact
    def __call__(self, x, skips, emb, context):
        spec = self.spec
        for i, skip in enumerate(reversed(skips)):
            x = _residual(spec, self.level, i, jnp.concatenate([x, skip], -1), emb)
            if self.level + 1 < len(spec.block_out_channels):
                x = _attention(spec, i, x, context)
        if self.level:
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = Resample(stride=1, dtype=spec.dtype, name="upsamplers_0")(x)
        return x


def _residual(spec, level, index, x, emb):
    """A spatial residual block and the temporal convolutions that follow it, in the module being traced."""
    block, convs = _remat(spec, ResBlock), _remat(spec, TemporalConvs)
    x = block(spec, spec.block_out_channels[level], name=f"resnets_{index}")(x, emb)
    return convs(spec, name=f"temp_convs_{index}")(x)


def _attention(spec, index, x, context):
    """A spatial transformer and the temporal one that follows it, in the module being traced."""
    spatial, temporal = _remat(spec, SpatialTransformer), _remat(spec, TemporalTransformer)
    x = spatial(spec, name=f"attentions_{index}")(x, context)
    return temporal(spec, x.shape[-1], name=f"temp_attentions_{index}")(x)


def _remat(spec, module):
    """The module, recomputed in the backward pass as `spec.remat` says."""
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, spec.remat)) if spec.remat else module


class ResBlock(nn.Module):
    """Two normalised convolutions of each frame, with the embedding [B, 1, d] added between them."""

    spec: Any
    channels: int

    @nn.compact
    def __call__(self, x, emb):
        spec, channels, dtype = self.spec, self.channels, self.spec.dtype
        h = nn.silu(_group_norm(x, spec, "norm1"))
        h = nn.Conv(channels, (3, 3), dtype=dtype, name="conv1")(h)
        h += nn.Dense(channels, dtype=dtype, name="time_emb_proj")(nn.silu(emb))[:, :, None, None]
        h = nn.silu(_group_norm(h, spec, "norm2"))
        h = nn.Conv(channels, (3, 3), dtype=dtype, name="conv2")(h)
        if x.shape[-1] != channels:
            x = nn.Conv(channels, (1, 1), dtype=dtype, name="conv_shortcut")(x)
        return x + h


class TemporalConvs(nn.Module):
    """Four convolutions over frames, each normalised over all of them; the identity at initialisation."""

    spec: Any

    @nn.compact
    def __call__(self, x):
        inits, h = [nn.initializers.lecun_normal()] * 3 + [nn.initializers.zeros], x
        for i, init in enumerate(inits, start=1):
            h = nn.silu(_group_norm(h, self.spec, f"conv{i}_0", over_frames=True))
            # diffusers counts the layers of a list, and from the second on there is dropout in it.
            h = TemporalConv(self.spec.dtype, init, name=f"conv{i}_{2 if i == 1 else 3}")(h)
        return x + h


class SpatialTransformer(nn.Module):
    """Self-attention within each frame and cross-attention to the context."""

    spec: Any

    @nn.compact
    def __call__(self, x, context: Context):
        spec, (b, k, h, w, c) = self.spec, x.shape
        tokens = _group_norm(x, spec, "norm", epsilon=1e-6).reshape(b * k, h * w, c)
        tokens = nn.Dense(c, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = TransformerBlock(spec, name="transformer_blocks_0")(tokens, context)
        return x + nn.Dense(c, dtype=spec.dtype, name="proj_out")(tokens).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Self-attention across the frames of each place, twice; the identity at initialisation."""

    spec: Any
    inner_channels: int

    @nn.compact
    def __call__(self, x):
        spec, (b, k, h, w, c) = self.spec, x.shape
        tokens = _group_norm(x, spec, "norm", over_frames=True, epsilon=1e-6)
        tokens = tokens.reshape(b, k, h * w, c).swapaxes(1, 2).reshape(b * h * w, k, c)
        tokens = nn.Dense(self.inner_channels, dtype=spec.dtype, name="proj_in")(tokens)
        tokens = TransformerBlock(spec, name="transformer_blocks_0")(tokens)
        zeros = nn.initializers.zeros
        tokens = nn.Dense(c, dtype=spec.dtype, kernel_init=zeros, name="proj_out")(tokens)
        return x + tokens.reshape(b, h * w, k, c).swapaxes(1, 2).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention in tokens [N, S, c], attention to the context or again to themselves, feed-forward."""

    spec: Any

    @nn.compact
    def __call__(self, tokens, context: Context | None = None):
        spec, channels = self.spec, tokens.shape[-1]
        heads, dtype = channels // spec.head_dim, spec.dtype
        y = _layer_norm(tokens, "norm1")
        tokens += Attention(heads, spec.head_dim, dtype, name="attn1")(y, y)
        y = _layer_norm(tokens, "norm2")
        attend = Attention(heads, spec.head_dim, dtype, name="attn2")
        if context is None:
            tokens += attend(y, y)
        else:
            # Queries of all frames of an asset share its context, so no copy of the context for each frame.
            y = y.reshape(len(context.tokens), -1, channels)
            tokens += attend(y, *context).reshape(tokens.shape)
        return tokens + FeedForward(dtype, name="ff")(_layer_norm(tokens, "norm3"))


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, Q, c] to `context` [B, S, d] where `mask` [B, S] is 1."""

    num_heads: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, queries, context, mask=None):
        def project(x, name):
            inner = self.num_heads * self.head_dim
            y = nn.Dense(inner, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

        q, k, v = project(queries, "to_q"), project(context, "to_k"), project(context, "to_v")
        allowed = None if mask is None else (mask > 0)[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return nn.Dense(queries.shape[-1], dtype=self.dtype, name="to_out_0")(out.reshape(*q.shape[:2], -1))


def _group_norm(x, spec, name, over_frames=False, epsilon=1e-5):
    """Normalisation of groups of channels, of each frame or of each asset, in float32."""
    axes = (1, 2, 3, 4) if over_frames else (2, 3, 4)
    settings = dict(epsilon=epsilon, dtype=jnp.float32, reduction_axes=axes, name=name)
    return nn.GroupNorm(spec.norm_num_groups, **settings)(x).astype(x.dtype)


def _layer_norm(x, name):
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(x).astype(x.dtype)
