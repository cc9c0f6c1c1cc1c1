"""Backbones: the denoising networks. This file holds their contract, `Backbone`, and finds them by name.

`config.backbone.name` is one of ours ("emu_video", "svd", "unet3d", "wan", "torch_hosted") or a module of
your own, by the rule of `im3d_jax.registry`; its `Model(**config.backbone.kwargs)` must satisfy `Backbone`. A
module may also have `SMALL`, a dictionary of arguments that make a model small enough to be checked anywhere.

Nothing outside a backbone depends on Flax. `im3d check-backbone NAME` tests all that is said here, for a
model of ours or of yours (`conformance`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax import checkpoint
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.pretrained import SourceOf
from im3d_jax.registry import Registry
from im3d_jax.sharding import PartitionRules

Params = dict[str, Any]
"""The parameters of a model: nested dictionaries of arrays. The keys that lead to a parameter, joined by "/",
are its path. A model that keeps its weights elsewhere has none."""


@runtime_checkable
class Backbone(Protocol):
    """A denoiser of a turntable (Sec. 3.1), as pure functions of its parameters.

    It denoises the F frames of latents that the autoencoder makes of the clip (`im3d_jax.clips`). Frame 0 is
    the latent of view 0 alone, which is the view of the conditioning image at azimuth 0, and view k is at
    azimuth 2 pi k / K, counter-clockwise seen from above. Where the autoencoder does not compress time and
    `config.clip` is left as it is, the frames are the views. A model that was trained with its frames in
    another order translates inside `apply`.

    Models are static arguments of `jax.jit`, so they are hashable, and two of the same arguments are equal.
    """

    @property
    def latent_shape(self) -> Sequence[int]:
        """(h, w, c) of a frame of latents."""

    @property
    def prediction_type(self) -> str:
        """What `apply` predicts: "epsilon", "v", "x0" or "flow" (see `diffusion.objective`)."""

    @property
    def num_views(self) -> int | None:
        """The number of views, which are its frames, that the weights were trained for; None for any."""

    @property
    def temporal_pattern(self) -> str:
        """A regular expression found in the paths of temporal parameters, which Sec. 3.1 trains alone.

        "" for a model that has none, such as a transformer that attends to all frames at once.
        """

    @property
    def partition_rules(self) -> PartitionRules:
        """(regular expression of a path, logical names of the parameter's last axes); the first that is found
        counts, and a parameter that no rule names is on every device whole (see `sharding`)."""

    @property
    def traceable(self) -> bool:
        """Whether JAX can trace `apply`, to compile it and to differentiate it."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters. Temporal layers, where it has such, are the identity: a video starts as K
        separate images."""

    def apply(
        self,
        params: Params,
        noisy: Float[Array, "B F h w c"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B F h w c"]:
        """The prediction for B assets, float32, each asset independent of the others.

        Args:
            noisy: the noised latents.
            timestep: how the network is told the noise level, in the units of `Schedule.timesteps`.
            conditioning: what the views should show; entries with a mask of 0 have no influence.
        """

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt, for `batch` assets; its shapes say what the model takes."""


@runtime_checkable
class PublicBackbone(Backbone, Protocol):
    """A backbone whose parameters can come from a public checkpoint and go back there (`im3d convert`)."""

    def from_pretrained(self, path: str | Path, params: Params, averaged: bool = False) -> Params:
        """The parameters of a checkpoint, float32; those that it has no tensor for are taken from `params`.

        averaged: whether to take averaged (EMA) weights where the checkpoint holds both.

        Raises UserError that names a tensor which is missing, unknown or of another shape.
        """

    def to_pretrained(self, params: Params) -> dict[str, np.ndarray]:
        """The tensors of the public checkpoint's layout by name, without those that it has no place for."""


@runtime_checkable
class StoredBackbone(Backbone, Protocol):
    """A backbone whose public checkpoints `config.weights` may name as they are.

    For networks that are too large to be converted: nothing is ever in another type or twice in memory.
    """

    def read_stored(self, path: str | Path) -> Params:
        """The parameters of a checkpoint's directory, in the type that each is stored in.

        Raises UserError that names a tensor or a file which is missing, unknown or of another shape.
        """


@runtime_checkable
class NamedBackbone(Backbone, Protocol):
    """A backbone whose parameters have public names, under which LoRAs of its ancestor are published."""

    def public_names(self) -> Mapping[str, SourceOf]:
        """Where each parameter stands in a public layout, by what LoRA files put before that layout's names.

        Such as "transformer" for diffusers' layout and "diffusion_model" for the vendor's own. The first is
        the one in which LoRAs are written.
        """


@runtime_checkable
class RenamedBackbone(Backbone, Protocol):
    """A backbone that also reads weights files in which its parameters have older names."""

    def renew(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a weights file, old or new, by today's names and in today's shapes."""


REGISTRY = Registry(
    key="config.backbone.name",
    attribute="Model",
    ours={name: f"{__name__}.{name}:Model" for name in ("emu_video", "svd", "unet3d", "wan", "torch_hosted")},
)


def build(name: str, kwargs: Mapping[str, Any]) -> Backbone:
    """The model of the backbone `name` with the arguments `kwargs`.

    Raises UserError for a name that stands for nothing, for arguments that the model does not take, and for a
    model that lacks members of `Backbone`.
    """
    return REGISTRY.build(name, kwargs, Backbone)


def small_kwargs(name: str) -> dict[str, Any]:
    """Arguments that make the backbone `name` small enough to be checked anywhere: its module's `SMALL`.

    Empty, which stands for the model's defaults, if the module has none.
    """
    return dict(getattr(REGISTRY.module(name), "SMALL", {}))


def with_remat(model: Backbone, policy: str) -> Backbone:
    """The model with this policy of recomputation, its argument `remat`; the same model if it takes none."""
    if not hasattr(model, "remat"):
        return model
    arguments: Any = model  # a dataclass: the protocol cannot say so
    return dataclasses.replace(arguments, remat=policy)


@partial(jax.jit, static_argnames="model")
def init(model: Backbone, key: PRNGKeyArray) -> Params:
    """The initial parameters of a model, drawn by one compiled program."""
    return model.init(key)


def blank_params(model: Backbone) -> Params:
    """Zeros in the shapes of a model's parameters, which take neither memory nor time to make."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)


def load_weights(model: Backbone, path: str | Path) -> tuple[Params, dict[str, Any]]:
    """(parameters in float32 on the host, metadata) of a weights file of this model.

    Of a directory, the parameters as a `StoredBackbone` reads them.

    Raises UserError that names a missing, extra or wrongly shaped tensor, or says that the file is damaged.
    """
    if isinstance(model, StoredBackbone) and Path(path).is_dir():
        return model.read_stored(path), {}
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    renew = model.renew if isinstance(model, RenamedBackbone) else None
    return checkpoint.load_weights(path, shapes, renew)
