"""Patches of pixels as channels: an autoencoder without parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from recon_torch.errors import UserError
from recon_torch.ranges import Range


def to_patches(images: Float[Array, "*B H W C"], size: int) -> Float[Array, "*B h w c"]:
    """Squares of `size` x `size` pixels as channels: row, column and channel of a pixel, in this order."""
    *batch, height, width, channels = images.shape
    x = images.reshape(*batch, height // size, size, width // size, size, channels).swapaxes(-4, -3)
    return x.reshape(*batch, height // size, width // size, size * size * channels)


def from_patches(patches: Float[Array, "*B h w c"], size: int) -> Float[Array, "*B H W C"]:
    """The inverse of `to_patches`."""
    *batch, height, width, channels = patches.shape
    x = patches.reshape(*batch, height, width, size, size, channels // size**2).swapaxes(-4, -3)
    return x.reshape(*batch, height * size, width * size, -1)


def num_latents(num_pictures: int, frames: int = 1, **_: object) -> int:
    """Frames of latents of a clip, each of `frames` pictures but for the first. Raises UserError."""
    whole, rest = divmod(num_pictures - 1, frames)
    if rest:
        raise UserError(f"patches of {frames} frames take {frames}n + 1 pictures, not {num_pictures}")
    return whole + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patches:
    """RGBA patches of `patch` x `patch` pixels as channels, in [-1, 1].

    The colours are over white. Alpha is denoised with them, which gives the fit its masks (Sec. 3.3).

    Attributes:
        patch: pixels along a side.
        frames: pictures whose patches are the channels of a frame of latents. Above 1, a clip has `frames` n
            + 1 pictures, of which the first one fills frame 0 alone, in as many copies: the layout of
            autoencoders that compress time, without their losses.
    """

    patch: Annotated[int, Range(1, 256)] = field(default=4, metadata={"static": True})
    frames: Annotated[int, Range(1, 64)] = field(default=1, metadata={"static": True})

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels. Raises UserError if it has none."""
        if size % self.patch:
            raise UserError(f"config.size is {size}; patches take multiples of {self.patch}")
        return size // self.patch, size // self.patch, self.patch**2 * 4 * self.frames

    def num_latents(self, num_pictures: int) -> int:
        """See `num_latents`."""
        return num_latents(num_pictures, self.frames)

    def encode(
        self, rgb: Float[Array | np.ndarray, "... H W 3"], alpha: Float[Array | np.ndarray, "... H W 1"]
    ) -> Float[Array, "... h w c"]:
        """Images in [0, 1] -> latents. H and W are multiples of `patch`."""
        x = to_patches(jnp.concatenate([rgb, alpha], -1) * 2 - 1, self.patch)
        if self.frames == 1:
            return x
        copies = jnp.repeat(x[..., :1, :, :, :], self.frames, -4)
        x = jnp.concatenate([copies, x[..., 1:, :, :, :]], -4)
        count = self.num_latents(rgb.shape[-4])
        x = jnp.moveaxis(x.reshape(*x.shape[:-4], count, self.frames, *x.shape[-3:]), -4, -2)
        return x.reshape(*x.shape[:-2], -1)

    def decode(
        self, latents: Float[Array | np.ndarray, "... h w c"]
    ) -> tuple[Float[Array, "*P H W 3"], Float[Array, "*P H W 1"]]:
        """Latents -> (rgb, alpha) in [0, 1]."""
        x = jnp.asarray(latents)
        if self.frames > 1:
            x = jnp.moveaxis(x.reshape(*x.shape[:-1], self.frames, -1), -2, -4)
            first, rest = x[..., 0, :, :, :, :].mean(-4, keepdims=True), x[..., 1:, :, :, :, :]
            rest = rest.reshape(*rest.shape[:-5], -1, *rest.shape[-3:])
            x = jnp.concatenate([first, rest], -4)
        x = jnp.clip(from_patches(x, self.patch) / 2 + 0.5, 0, 1)
        return x[..., :3], x[..., 3:]

    def clip(self, latents: Float[Array | np.ndarray, "*B h w c"]) -> Float[Array, "*B h w c"]:
        """The nearest latents of an image: pixels have bounds, and samplers overshoot them."""
        return jnp.clip(latents, -1, 1)
