"""Any of diffusers' video UNets as the denoiser, run by torch in this process; for inference only.

ModelScope (UNet3DConditionModel), I2VGen-XL and Stable Video Diffusion work as they are; AnimateDiff's motion
adapter and its image model are first joined by UNetMotionModel.from_unet2d and saved. Arrays go to torch and
back by DLPack, without a copy but that of the layout: these networks have the channels before height and
width. To train such weights, convert them with `im3d convert`.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float, PRNGKeyArray, Shaped
from torch import Tensor

from im3d_jax import bridge
from im3d_jax.backbones import Params, svd, unet3d
from im3d_jax.backbones.layers import Frames
from im3d_jax.backbones.unet import WHAT
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch import hosting
from recon_torch.errors import UserError, choice
from recon_torch.ranges import NumViews, Positive, Range

SMALL = dict(
    diffusers_class="I2VGenXLUNet",
    path="random",
    latent_shape=(8, 8, 4),
    max_words=4,
    kwargs=dict(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
    ),
)
"""Arguments of a network that runs anywhere at once."""


@dataclass(frozen=True)
class Model:
    """A torch module behind the backbone contract. It has no parameters on this side: `init` gives {}.

    Args:
        diffusers_class: one of `DiffusersClass`.
        path: directory of the weights, such as `unet` of a diffusers pipeline; "random" for random ones.
        kwargs: arguments of the class, for random weights.
        latent_shape: (h, w, c) of one frame's latent.
        max_words: tokens of the empty prompt.
        prediction_type: "" for that of the family's public weights.
        num_views: frames that the weights were trained for, None for any.
        fps: frames per second that I2VGen-XL is told.
        added_time_ids: what SVD is told: frames per second less one, motion bucket, noise in the image.
        latent_scale: factor of noisy latents that the picture's latent, as SVD takes it, is without.
        dtype: of the computation, one of `hosting.Dtype`.
    """

    diffusers_class: str = ""
    path: str = ""
    kwargs: Mapping[str, Any] | Sequence = ()
    latent_shape: Sequence[Annotated[int, Range(1, 65_536)]] = (64, 64, 4)
    max_words: Annotated[int, Range(1, 4096)] = 77
    prediction_type: str = ""
    num_views: NumViews | None = None
    fps: Annotated[int, Range(1, 1000)] = 16
    added_time_ids: Sequence[Annotated[float, Range(-1e6, 1e6)]] = (6, 127, 0.02)
    latent_scale: Positive = 0.18215
    dtype: hosting.Dtype | str = hosting.Dtype.FLOAT32

    partition_rules = ()
    traceable = False

    def __post_init__(self) -> None:
        family = choice(DiffusersClass, self.diffusers_class, f"{WHAT}.diffusers_class")
        kwargs = self.kwargs.items() if isinstance(self.kwargs, Mapping) else self.kwargs
        frozen = dict(
            diffusers_class=family,
            dtype=choice(hosting.Dtype, self.dtype, f"{WHAT}.dtype"),
            latent_shape=tuple(self.latent_shape),
            added_time_ids=tuple(self.added_time_ids),
            kwargs=tuple((name, _hashable(value)) for name, value in sorted(kwargs)),
            prediction_type=self.prediction_type or FAMILIES[family].prediction_type,
        )
        for name, value in frozen.items():  # a model is hashable
            object.__setattr__(self, name, value)
        self._check_channels()

    @property
    def temporal_pattern(self) -> str:
        """See `Backbone.temporal_pattern`. It matches names of torch parameters, none of which is trained."""
        return self._family.temporal_pattern

    def init(self, key: PRNGKeyArray) -> Params:
        """No parameters: they live in `module`."""
        return {}

    def apply(
        self, params: Params, noisy: Frames, timestep: Float[Array, " B"], conditioning: Conditioning
    ) -> Frames:
        """The network's prediction, float32, of type `prediction_type`.

        Text is attended to with its padding: these classes take no mask. Raises UserError where JAX traces,
        to compile or to differentiate.
        """
        inputs = noisy, timestep, conditioning
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
            raise UserError(
                "torch_hosted cannot be differentiated or compiled by JAX; to train, convert the weights with"
                " `im3d convert` and take emu_video, unet3d or svd"
            )
        dtype = getattr(torch, self.dtype)
        views, *given = jax.tree.map(lambda x: to_torch(x).to(dtype), (noisy, *conditioning[:5]))
        with torch.inference_mode():
            return to_jax(self._family.call(self, views, to_torch(timestep), Given(*given)).float())

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt, as zeros; which of the two there are follows from the family."""
        family, width = self._family, self._text_width
        text = (jnp.zeros((batch, self.max_words, width)),) if family.takes_text else ()
        mask = tuple(jnp.zeros((batch, self.max_words)).at[:, 0].set(1) for _ in text)
        tokens = jnp.zeros((batch, 1, width)) if family.takes_image_tokens else None
        return Conditioning(jnp.zeros((batch, *self.latent_shape)), jnp.zeros(batch), text, mask, tokens)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The network, frozen; loaded at first use."""
        dtype = getattr(torch, self.dtype)
        if self.path != "random":
            return hosting.load(self._class, self.path, f"{WHAT}.path", dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # What diffusers' constructors raise for an architecture that they cannot build: it is the user's.
            try:
                module = self._class(**dict(self.kwargs))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UserError(f"{WHAT}.kwargs: {self.diffusers_class}: {hosting.brief(error)}") from None
        return module.to(hosting.device(), dtype).eval().requires_grad_(False)

    @property
    def _family(self) -> Family:
        return FAMILIES[DiffusersClass(self.diffusers_class)]

    @property
    def _class(self) -> type[Any]:
        return getattr(hosting.library("diffusers"), self.diffusers_class)

    @cached_property
    def _config(self) -> dict:
        """The class's arguments, as its checkpoint or `kwargs` give them."""
        parameters = inspect.signature(self._class.__init__).parameters
        defaults = {name: each.default for name, each in parameters.items()}
        if self.path == "random":
            if unknown := dict(self.kwargs).keys() - defaults.keys():
                names = ", ".join(sorted(unknown))
                raise UserError(f"{WHAT}.kwargs: {self.diffusers_class} takes no {names}; remove it")
            return defaults | dict(self.kwargs)
        if self.kwargs:
            raise UserError(f"{WHAT}.kwargs: {self.path} has its own architecture; leave kwargs empty")
        config = hosting.read_json(self.path, "config.json", f"{WHAT}.path")
        if (found := config.get("_class_name")) != self.diffusers_class:
            raise UserError(
                f"{WHAT}.path: {self.path} is a {found}; name that as diffusers_class, or another path"
            )
        return defaults | config

    @property
    def _text_width(self) -> int:
        width = self._config["cross_attention_dim"]
        return width if isinstance(width, int) else width[0]  # one for each level, all the same

    def _check_channels(self) -> None:
        """Raises UserError for a network whose inputs or outputs are not those of its family."""
        config, channels = self._config, self.latent_shape[-1]
        taken, made = config["in_channels"], config["out_channels"]
        known = self._family.in_channels(channels)
        if made != channels or taken not in known:
            raise UserError(
                f"{WHAT}: {self.diffusers_class} takes {taken} and makes {made} channels; latents of"
                f" {channels} need {' or '.join(map(str, known))} and {channels}"
            )
        for name in ("addition_embed_type", "encoder_hid_dim_type"):
            if config.get(name):
                raise UserError(f"{WHAT}: no conditions for {name} {config[name]!r} (SDXL, IP-Adapter) here")


def to_torch(array: Shaped[Array, "..."]) -> Shaped[Tensor, "..."]:
    """An array of one device as a tensor where hosted models run: the same memory, if that is this device.

    JAX arrays never change, so the tensor must not be written to.
    """
    single = jax.device_put(array, jax.devices()[0]).block_until_ready()
    return torch.from_dlpack(single).to(hosting.device())


def to_jax(tensor: Shaped[Tensor, "..."]) -> Shaped[Array, "..."]:
    """The tensor as an array on JAX's first device: the same memory, if it is there and contiguous."""
    if tensor.is_cuda:  # what torch still reads may be JAX's, which would use it again
        torch.cuda.synchronize(tensor.device)
    where = "cpu" if jax.default_backend() == "cpu" else tensor.device
    return bridge.as_jax(tensor.to(where).contiguous())


# ---- Families: how each class of diffusers is told the conditions ----


class DiffusersClass(enum.StrEnum):
    """The classes of diffusers that can be hosted; `FAMILIES` says how each is told its conditions."""

    UNET_3D = "UNet3DConditionModel"
    MOTION = "UNetMotionModel"
    I2VGEN = "I2VGenXLUNet"
    SVD = "UNetSpatioTemporalConditionModel"


class Family(NamedTuple):
    """What is particular to a class.

    in_channels: latent channels -> what the first convolution may take.
    call: (model, noisy [B,K,h,w,c], timestep [B], conditioning) -> prediction [B,K,h,w,c].
    """

    prediction_type: str
    temporal_pattern: str
    takes_text: bool
    takes_image_tokens: bool
    in_channels: Callable[[int], tuple[int, ...]]
    call: Callable[[Model, Videos, Levels, Given], Videos]


Videos = Float[Tensor, "B K h w c"]
Levels = Float[Tensor, " B"]


class Given(NamedTuple):
    """The first members of `Conditioning`, as tensors."""

    image: Float[Tensor, "B h w c"]
    image_mask: Float[Tensor, " B"]
    text: tuple[Float[Tensor, "B L d"], ...]
    text_mask: tuple[Float[Tensor, "B L"], ...]
    image_tokens: Float[Tensor, "B L d"] | None


def _call_unet_3d(model: Model, noisy: Videos, timestep: Levels, given: Given) -> Videos:
    sample = _channels_first(_with_image(model, noisy, given))
    (text,) = given.text
    return _channels_last(model.module(sample, timestep, text, return_dict=False)[0])


def _call_motion(model: Model, noisy: Videos, timestep: Levels, given: Given) -> Videos:
    sample = _channels_first(_with_image(model, noisy, given))
    text = given.text[0].repeat_interleave(noisy.shape[1], 0)  # this class wants it for each frame
    return _channels_last(model.module(sample, timestep, text, return_dict=False)[0])


def _call_i2vgen(model: Model, noisy: Videos, timestep: Levels, given: Given) -> Videos:
    """Frame 0 is told the image's latent, the others their place in time, from 0 to 1, in all channels."""
    place = torch.linspace(0, 1, noisy.shape[1], device=noisy.device, dtype=noisy.dtype)
    image = place[:, None, None, None].expand_as(noisy).clone()
    image[:, 0] = _image(given)
    fps = torch.full(noisy.shape[:1], model.fps, device=noisy.device)
    prediction = model.module(
        _channels_first(noisy),
        timestep,
        fps=fps,
        image_latents=_channels_first(image),
        image_embeddings=_image_tokens(given)[:, 0],
        encoder_hidden_states=given.text[0],
        return_dict=False,
    )[0]
    return _channels_last(prediction)


def _call_svd(model: Model, noisy: Videos, timestep: Levels, given: Given) -> Videos:
    """The image is told to all frames. This class has the frames before the channels."""
    image = (_image(given) / model.latent_scale)[:, None].expand_as(noisy)
    sample = torch.cat([noisy, image], -1).permute(0, 1, 4, 2, 3)
    ids = torch.tensor(model.added_time_ids, device=noisy.device, dtype=noisy.dtype)
    ids = ids.expand(noisy.shape[0], -1)
    prediction = model.module(sample, timestep, _image_tokens(given), ids, return_dict=False)[0]
    return prediction.permute(0, 1, 3, 4, 2)


def _image(given: Given) -> Float[Tensor, "B h w c"]:
    """The image's latent, zeros where it is dropped."""
    return given.image * given.image_mask[:, None, None, None]


def _image_tokens(given: Given) -> Float[Tensor, "B L d"]:
    """The image's embedding, zeros where it is dropped."""
    assert given.image_tokens is not None, "a family that takes tokens is given them"
    return given.image_tokens * given.image_mask[:, None, None]


def _with_image(model: Model, noisy: Videos, given: Given) -> Float[Tensor, "B K h w channels"]:
    """With the image and a mask at view 0, if the network has channels for them, as Emu Video has."""
    config: Any = model.module.config
    if config.in_channels == noisy.shape[-1]:
        return noisy
    image, mask = torch.zeros_like(noisy), torch.zeros_like(noisy[..., :1])
    image[:, 0], mask[:, 0] = _image(given), given.image_mask[:, None, None, None]
    return torch.cat([noisy, image, mask], -1)


def _channels_first(frames: Float[Tensor, "B K h w c"]) -> Float[Tensor, "B c K h w"]:
    return frames.permute(0, 4, 1, 2, 3)


def _channels_last(frames: Float[Tensor, "B c K h w"]) -> Float[Tensor, "B K h w c"]:
    return frames.permute(0, 2, 3, 4, 1)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


FAMILIES = {
    DiffusersClass.UNET_3D: Family(
        "epsilon", unet3d.Model.temporal_pattern, True, False, lambda c: (c, 2 * c + 1), _call_unet_3d
    ),
    DiffusersClass.MOTION: Family(
        "epsilon", "motion_modules", True, False, lambda c: (c, 2 * c + 1), _call_motion
    ),
    DiffusersClass.I2VGEN: Family(
        "v", unet3d.Model.temporal_pattern, True, True, lambda c: (c,), _call_i2vgen
    ),
    DiffusersClass.SVD: Family("v", svd.Model.temporal_pattern, False, True, lambda c: (2 * c,), _call_svd),
}
