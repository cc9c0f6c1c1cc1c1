"""Frames <-> latents, one frame at a time.

The tiny model's `Patches` moves each patch of pixels into channels, which loses nothing and has no
parameters; full size models use a learned autoencoder behind the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from recon_torch.errors import UserError


@dataclass(frozen=True)
class Patches:
    """RGBA patches of `patch` x `patch` pixels as channels, in [-1, 1].

    The colours are over white. Alpha is denoised with them, which gives the fit its masks (Sec. 3.3).
    """

    patch: int = 4

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels."""
        return size // self.patch, size // self.patch, self.patch**2 * 4

    def encode(
        self, rgb: Float[Array, "*B H W 3"], alpha: Float[Array, "*B H W 1"]
    ) -> Float[Array, "*B h w c"]:
        """Images in [0, 1] -> latents. H and W are multiples of `patch`."""
        *batch, height, width, _ = rgb.shape
        p = self.patch
        x = jnp.concatenate([rgb, alpha], -1) * 2 - 1
        x = x.reshape(*batch, height // p, p, width // p, p, 4).swapaxes(-4, -3)
        return x.reshape(*batch, height // p, width // p, p * p * 4)

    def decode(
        self, latents: Float[Array, "*B h w c"]
    ) -> tuple[Float[Array, "*B H W 3"], Float[Array, "*B H W 1"]]:
        """Latents -> (rgb, alpha) in [0, 1]."""
        *batch, height, width, _ = latents.shape
        p = self.patch
        x = latents.reshape(*batch, height, width, p, p, 4).swapaxes(-4, -3)
        x = jnp.clip(x.reshape(*batch, height * p, width * p, 4) / 2 + 0.5, 0, 1)
        return x[..., :3], x[..., 3:]

    def clip(self, latents: Float[Array, "*B h w c"]) -> Float[Array, "*B h w c"]:
        """The nearest latents of an image: pixels have bounds, and samplers overshoot them."""
        return jnp.clip(latents, -1, 1)


AUTOENCODERS = {"patches": Patches}


def build(name: str, kwargs: dict, size: int, latent_shape: Sequence[int]):
    """The autoencoder that a config names, which makes `latent_shape` of images of `size` pixels.

    Raises UserError for an unknown name and for sizes that do not go together.
    """
    if name not in AUTOENCODERS:
        raise UserError(f"config.autoencoder.name: no {name!r}; there is {', '.join(AUTOENCODERS)}")
    codec = AUTOENCODERS[name](**kwargs)
    made, taken = codec.latent_shape(size), tuple(latent_shape)
    if made != taken:
        raise UserError(f"config.size {size} makes latents {made}, config.backbone takes {taken}; match them")
    return codec
