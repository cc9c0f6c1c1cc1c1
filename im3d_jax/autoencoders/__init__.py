"""Autoencoders: the pictures of a clip to frames of latents and back.

`Patches`, which the tiny model uses, moves each patch of pixels into channels: it loses nothing and has no
parameters. `AutoencoderKL` is the learned one that full-size models use, and `AutoencoderKLWan` one that
compresses time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

from im3d_jax.registry import Registry
from recon_torch.errors import UserError


@runtime_checkable
class Autoencoder(Protocol):
    """The contract of an autoencoder, which is also a pytree and hashable.

    Its leaves are its weights, so a jitted function takes an autoencoder as an ordinary argument. The hash
    leaves the weights out, so that it is cheap.
    """

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels. Raises UserError if it has none."""

    def encode(
        self, rgb: Float[Array | np.ndarray, "*B P H W 3"], alpha: Float[Array | np.ndarray, "*B P H W 1"]
    ) -> Float[Array, "*B F h w c"]:
        """Images in [0, 1], whose colours are over white -> latents with a standard deviation of about 1."""

    def decode(
        self, latents: Float[Array | np.ndarray, "*B F h w c"]
    ) -> tuple[Float[Array, "*B P H W 3"], Float[Array, "*B P H W 1"] | None]:
        """Latents -> (rgb, alpha) in [0, 1]; alpha is None where the autoencoder does not know it."""

    def clip(self, latents: Float[Array | np.ndarray, "*B F h w c"]) -> Float[Array, "*B F h w c"]:
        """The nearest latents that an image can have, for samplers that overshoot them."""


@runtime_checkable
class ClipAutoencoder(Autoencoder, Protocol):
    """An autoencoder that may compress time: P pictures of a clip become F frames of latents.

    Others make a frame of each picture.
    """

    def num_latents(self, num_pictures: int) -> int:
        """F. The first frame is the latent of the first picture alone.

        Raises UserError for a number of pictures that it does not take.
        """


AUTOENCODERS = Registry(
    key="config.autoencoder.name",
    attribute="Autoencoder",
    ours={
        "patches": "im3d_jax.autoencoders.patches:Patches",
        "autoencoder_kl": "im3d_jax.autoencoders.kl:load",
        "wan": "im3d_jax.autoencoders.wan:load",
    },
)


def num_latents(name: str, kwargs: Mapping[str, Any], num_pictures: int) -> int:
    """F, as `ClipAutoencoder.num_latents` of the autoencoder `name` says it, without its weights.

    It asks the function `num_latents` of the autoencoder's module. A module that has none makes a latent of
    each picture.
    """
    count = getattr(AUTOENCODERS.module(name), "num_latents", None)
    return num_pictures if count is None else count(num_pictures, **kwargs)


def build(name: str, kwargs: Mapping[str, Any], size: int, latent_shape: Sequence[int]) -> Autoencoder:
    """The autoencoder that a config names, which makes `latent_shape` of images of `size` pixels.

    Raises UserError as `Registry.build` does, and for sizes that do not go together.
    """
    codec = AUTOENCODERS.build(name, kwargs, Autoencoder)
    made, taken = tuple(codec.latent_shape(size)), tuple(latent_shape)
    if made != taken:
        raise UserError(f"config.size {size} makes latents {made}, config.backbone takes {taken}; match them")
    return codec
