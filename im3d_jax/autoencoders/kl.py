"""A learned autoencoder behind the contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.autoencoders import kl_network
from recon_torch.ranges import Range

ROOT = Path(__file__).parents[2]
"""The shipped autoencoder is named relative to this directory."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AutoencoderKL:
    """Scaled means of the posterior of a variational autoencoder; made by `load`.

    The hash and the comparison leave out the weights. Inside a jitted function that closes over it, or takes
    it as a static argument, the weights become constants of the program: pass it as an ordinary argument.

    Attributes:
        path: where the weights are from.
        frames_per_call: how many frames of each asset go through the networks at a time, 0 for all. Each
            takes 0.9 GiB to decode at the paper's size and 512 pixels (float32, as compiled for a CPU).
            Frames of different calls do not see each other in a temporal decoder.
    """

    params: dict = field(repr=False, compare=False)
    architecture: kl_network.Architecture = field(metadata={"static": True})
    path: str = field(metadata={"static": True})
    frames_per_call: int = field(default=8, metadata={"static": True})

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels."""
        return self.architecture.latent_shape(size)

    @jax.jit
    def encode(
        self, rgb: Float[Array | np.ndarray, "*B F H W 3"], alpha: Float[Array | np.ndarray, "*B F H W 1"]
    ) -> Float[Array, "*B F h w c"]:
        """Images in [0, 1] -> latents, float32. Alpha stays out unless the network is `rgba`."""
        sizes = self.architecture
        images = jnp.concatenate([rgb, alpha], -1) if sizes.rgba else rgb
        mean = self._in_chunks("encode", images * 2 - 1)[..., : sizes.latent_channels]
        return (mean - sizes.shift_factor) * sizes.scaling_factor

    @jax.jit
    def decode(
        self, latents: Float[Array | np.ndarray, "*B F h w c"]
    ) -> tuple[Float[Array, "*B F H W 3"], Float[Array, "*B F H W 1"] | None]:
        """Latents -> (rgb, alpha) in [0, 1]; alpha is None without `rgba`."""
        sizes = self.architecture
        images = self._in_chunks("decode", latents / sizes.scaling_factor + sizes.shift_factor)
        images = jnp.clip(images / 2 + 0.5, 0, 1)
        return images[..., :3], images[..., 3:] if sizes.rgba else None

    def clip(self, latents: Float[Array | np.ndarray, "*B h w c"]) -> Float[Array, "*B h w c"]:
        """The same: these latents have no bounds."""
        return jnp.asarray(latents)

    def _in_chunks(
        self, method: str, images: Float[Array | np.ndarray, "*B F H W C"]
    ) -> Float[Array, "*B F H2 W2 C2"]:
        """Applies a method of the network to `frames_per_call` frames after another.

        A loop inside the program, because one of Python's would be unrolled in a program that this is part
        of. Over frames and not assets, because assets are what a mesh divides among devices.
        """

        def apply(clips):
            return kl_network.Network(self.architecture).apply({"params": self.params}, clips, method=method)

        clips = images.reshape(-1, *images.shape[-4:])
        batch, num_frames = clips.shape[:2]
        size = min(self.frames_per_call or num_frames, num_frames)
        whole = num_frames - num_frames % size
        chunks = clips[:, :whole].reshape(batch, -1, size, *clips.shape[2:]).swapaxes(0, 1)
        done = jax.lax.map(apply, chunks).swapaxes(0, 1)
        done = done.reshape(batch, whole, *done.shape[3:])
        if whole < num_frames:
            done = jnp.concatenate([done, apply(clips[:, whole:])], 1)
        return done.reshape(*images.shape[:-3], *done.shape[2:])


def load(path: str, frames_per_call: Annotated[int, Range(0, 1024)] = 8, **sizes) -> AutoencoderKL:
    """Reads the weights of an autoencoder.

    Args:
        path: a diffusers directory of an AutoencoderKL or AutoencoderKLTemporalDecoder, or of a pipeline
            with one under vae/, or a safetensors file in its layout; "random" for tests and benchmarks.
        frames_per_call: see `AutoencoderKL`.
        sizes: of `kl_network.Architecture`: its dtype and, where no config.json says them, the rest.

    Raises UserError for sizes that do not exist or repeat a config.json, for weights of another
    architecture (naming the tensor) and for a damaged file.
    """
    place = str(ROOT / path) if not Path(path).exists() and (ROOT / path).is_dir() else path
    architecture = kl_network.read_architecture(place, **sizes)
    return AutoencoderKL(kl_network.read_params(place, architecture), architecture, path, frames_per_call)
