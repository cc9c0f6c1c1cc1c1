"""Patches of pixels as channels: an autoencoder without parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patches:
    """RGBA patches of `patch` x `patch` pixels as channels, in [-1, 1].

    The colours are over white. Alpha is denoised with them, which gives the fit its masks (Sec. 3.3).
    """

    patch: int = field(default=4, metadata={"static": True})

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels."""
        return size // self.patch, size // self.patch, self.patch**2 * 4

    def encode(
        self, rgb: Float[Array | np.ndarray, "*B H W 3"], alpha: Float[Array | np.ndarray, "*B H W 1"]
    ) -> Float[Array, "*B h w c"]:
        """Images in [0, 1] -> latents. H and W are multiples of `patch`."""
        *batch, height, width, _ = rgb.shape
        p = self.patch
        x = jnp.concatenate([rgb, alpha], -1) * 2 - 1
        x = x.reshape(*batch, height // p, p, width // p, p, 4).swapaxes(-4, -3)
        return x.reshape(*batch, height // p, width // p, p * p * 4)

    def decode(
        self, latents: Float[Array | np.ndarray, "*B h w c"]
    ) -> tuple[Float[Array, "*B H W 3"], Float[Array, "*B H W 1"]]:
        """Latents -> (rgb, alpha) in [0, 1]."""
        *batch, height, width, _ = latents.shape
        p = self.patch
        x = latents.reshape(*batch, height, width, p, p, 4).swapaxes(-4, -3)
        x = jnp.clip(x.reshape(*batch, height * p, width * p, 4) / 2 + 0.5, 0, 1)
        return x[..., :3], x[..., 3:]

    def clip(self, latents: Float[Array | np.ndarray, "*B h w c"]) -> Float[Array, "*B h w c"]:
        """The nearest latents of an image: pixels have bounds, and samplers overshoot them."""
        return jnp.clip(latents, -1, 1)
