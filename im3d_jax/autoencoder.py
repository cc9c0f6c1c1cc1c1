"""Frames <-> latents, one frame at a time.

The tiny model's `Patches` moves each patch of pixels into channels, which loses nothing and has no
parameters; full size models use the learned `AutoencoderKL` behind the same methods. Both are pytrees whose
leaves are their weights, so that a jitted function takes one as an ordinary argument, and both are hashable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax import autoencoder_kl
from recon_torch.errors import UserError

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patches:
    """RGBA patches of `patch` x `patch` pixels as channels, in [-1, 1].

    The colours are over white. Alpha is denoised with them, which gives the fit its masks (Sec. 3.3).
    """

    patch: int = field(default=4, metadata=STATIC)

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
    architecture: autoencoder_kl.Architecture = field(metadata=STATIC)
    path: str = field(metadata=STATIC)
    frames_per_call: int = field(default=8, metadata=STATIC)

    @classmethod
    def load(cls, path: str, frames_per_call: int = 8, **sizes) -> AutoencoderKL:
        """Reads the weights.

        Args:
            path: a diffusers directory of an AutoencoderKL or AutoencoderKLTemporalDecoder, or of a pipeline
                with one under vae/, or a safetensors file in its layout; "random" for tests and benchmarks.
            sizes: of `autoencoder_kl.Architecture`: its dtype and, where no config.json says them, the rest.

        Raises UserError for sizes that do not exist or repeat a config.json, for weights of another
        architecture (naming the tensor) and for a damaged file.
        """
        architecture = autoencoder_kl.read_architecture(path, **sizes)
        return cls(autoencoder_kl.read_params(path, architecture), architecture, path, frames_per_call)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels."""
        return self.architecture.latent_shape(size)

    @jax.jit
    def encode(
        self, rgb: Float[Array, "*B F H W 3"], alpha: Float[Array, "*B F H W 1"]
    ) -> Float[Array, "*B F h w c"]:
        """Images in [0, 1] -> latents, float32. Alpha stays out: the colours are over white."""
        sizes = self.architecture
        mean = self._in_chunks("encode", rgb * 2 - 1)[..., : sizes.latent_channels]
        return (mean - sizes.shift_factor) * sizes.scaling_factor

    @jax.jit
    def decode(self, latents: Float[Array, "*B F h w c"]) -> tuple[Float[Array, "*B F H W 3"], None]:
        """Latents -> (rgb in [0, 1], no alpha)."""
        sizes = self.architecture
        images = self._in_chunks("decode", latents / sizes.scaling_factor + sizes.shift_factor)
        return jnp.clip(images / 2 + 0.5, 0, 1), None

    def clip(self, latents: Float[Array, "*B h w c"]) -> Float[Array, "*B h w c"]:
        """The same: these latents have no bounds."""
        return latents

    def _in_chunks(self, method: str, images: Float[Array, "*B F H W C"]) -> Float[Array, "*B F H2 W2 C2"]:
        """Applies a method of the network to `frames_per_call` frames after another.

        A loop inside the program, because one of Python's would be unrolled in a program that this is part
        of. Over frames and not assets, because assets are what a mesh divides among devices.
        """

        def apply(clips):
            return autoencoder_kl.Network(self.architecture).apply(
                {"params": self.params}, clips, method=method
            )

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


AUTOENCODERS = {"patches": Patches, "autoencoder_kl": AutoencoderKL.load}


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
