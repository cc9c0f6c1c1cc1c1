"""Wan's autoencoders behind the contract: clips of 4n + 1 pictures to n + 1 latent frames and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.autoencoders import wan_checkpoints, wan_network
from im3d_jax.autoencoders.wan_network import Clips
from im3d_jax.autoencoders.wan_sizes import PUBLISHED, Architecture
from recon_torch.errors import UserError
from recon_torch.ranges import Range


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AutoencoderKLWan:
    """Normalised means of the posterior of a variational autoencoder; made by `load`.

    The hash and the comparison leave out the weights; see `kl.AutoencoderKL` for what that means.

    Attributes:
        path: where the weights are from.
        frames_per_call: how many latent frames go through the networks at a time, after the first, which goes
            alone; 0 for the whole clip at once. Chunks see the frames before them, so that nothing but memory
            and rounding depends on it.
    """

    params: dict = field(repr=False, compare=False)
    architecture: Architecture = field(metadata={"static": True})
    path: str = field(metadata={"static": True})
    frames_per_call: int = field(default=1, metadata={"static": True})

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a square image of `size` pixels. Raises UserError if it has none."""
        sizes = self.architecture
        if size % sizes.side_factor:
            raise UserError(f"config.size is {size}; this autoencoder takes multiples of {sizes.side_factor}")
        return size // sizes.side_factor, size // sizes.side_factor, sizes.z_dim

    def num_latents(self, num_pictures: int) -> int:
        """n + 1 for 4n + 1 pictures. Raises UserError, which names the next numbers that fit, for others."""
        return self.architecture.num_latents(num_pictures)

    @jax.jit
    def encode(
        self, rgb: Float[Array | np.ndarray, "*B P H W 3"], alpha: Float[Array | np.ndarray, "*B P H W 1"]
    ) -> Float[Array, "*B F h w c"]:
        """Clips of pictures in [0, 1] -> latents, float32. Alpha stays out.

        Raises UserError for other numbers of pictures than 4n + 1, and for sides that latents do not fill.
        """
        sizes = self.architecture
        sizes.check_sides(*rgb.shape[-3:-1])
        sizes.num_latents(rgb.shape[-4])
        latents = self._in_chunks("encode", rgb * 2 - 1, sizes.frame_factor)
        mean, deviation = self._normal(latents.ndim)
        return (latents - mean) / deviation

    @jax.jit
    def decode(
        self, latents: Float[Array | np.ndarray, "*B F h w c"]
    ) -> tuple[Float[Array, "*B P H W 3"], None]:
        """Latents -> (pictures in [0, 1], None): it does not know alpha."""
        mean, deviation = self._normal(latents.ndim)
        images = self._in_chunks("decode", latents * deviation + mean, 1)
        return jnp.clip(images / 2 + 0.5, 0, 1), None

    def clip(self, latents: Float[Array | np.ndarray, "*B F h w c"]) -> Float[Array, "*B F h w c"]:
        """The same: these latents have no bounds."""
        return jnp.asarray(latents)

    def _normal(self, rank: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The mean and the standard deviation of the network's latents, along the last of `rank` axes."""
        sizes = self.architecture
        mean, deviation = sizes.latents_mean or (0.0,), sizes.latents_std or (1.0,)
        ones = (1,) * (rank - 1)
        return jnp.array(mean).reshape(*ones, -1), jnp.array(deviation).reshape(*ones, -1)

    def _in_chunks(
        self, method: str, frames: Float[Array | np.ndarray, "*B F H W C"], for_latent: int
    ) -> Float[Array, "*B F2 H2 W2 C2"]:
        """Applies a method of the network to a clip, `for_latent` of whose frames stand for a latent one."""
        clips = jnp.asarray(frames.reshape(-1, *frames.shape[-4:]))
        step = partial(chunk, self.params, self.architecture, method)
        done = in_chunks(step, clips, self.frames_per_call * for_latent)
        return done.reshape(*frames.shape[:-4], *done.shape[1:])


Past = dict[str, Any]
"""The frames that each layer keeps for the chunk that follows."""

Step = Callable[[Clips, Past | None], tuple[Clips, Past]]
"""A chunk and what layers have kept, None before the first chunk -> its result and what they keep then."""


def chunk(
    params: dict[str, Any], architecture: Architecture, method: str, frames: Clips, past: Past | None
) -> tuple[Clips, Past]:
    """Encodes or decodes a chunk of a clip.

    Args:
        method: "encode" or "decode", of `wan_network.Network`.
        frames: pictures, of which the first chunk has 4n + 1 and others have 4n; or latent frames.
        past: what the chunk before returned; None for the first of a clip.
    """
    variables = {"params": params} if past is None else {"params": params, "past": past}
    network = wan_network.Network(architecture)
    done, kept = network.apply(variables, frames, past is None, mutable=["past"], method=method)
    return done, kept["past"]


def in_chunks(step: Step, clips: Clips, size: int) -> Clips:
    """The first frame by itself, then `size` frames at a time (0: all in one), then the rest.

    A loop inside the program, because one of Python's would be unrolled in a program that this is part of.
    """
    if not size:
        return step(clips, None)[0]
    first, past = step(clips[:, :1], None)
    rest = clips[:, 1:]
    whole = rest.shape[1] // size
    parts = [first]
    if whole:
        chunks = rest[:, : whole * size].reshape(len(rest), whole, size, *rest.shape[2:]).swapaxes(0, 1)

        def body(past: Past, frames: Clips) -> tuple[Past, Clips]:
            done, kept = step(frames, past)
            return kept, done

        past, done = jax.lax.scan(body, past, chunks)
        done = done.swapaxes(0, 1)
        parts.append(done.reshape(len(rest), -1, *done.shape[3:]))
    if rest.shape[1] % size:
        parts.append(step(rest[:, whole * size :], past)[0])
    return jnp.concatenate(parts, 1)


def num_latents(num_pictures: int, **_: Any) -> int:
    """The frames of latents of so many pictures, in both published families, without their weights."""
    return PUBLISHED["wan2.1"].num_latents(num_pictures)


def load(path: str, frames_per_call: Annotated[int, Range(0, 1024)] = 1, **sizes: Any) -> AutoencoderKLWan:
    """Reads the weights of one of Wan's autoencoders.

    Args:
        path: a diffusers directory of an AutoencoderKLWan, or of a pipeline with one under vae/, or a
            safetensors file in its layout or in Wan's own; "random" for tests and benchmarks.
        frames_per_call: see `AutoencoderKLWan`.
        sizes: of `wan_sizes.Architecture`: its dtype and, where no config.json says them, the rest; or
            `published`, which names those of `wan_sizes.PUBLISHED`.

    Raises UserError for sizes that do not exist or repeat a config.json, for weights of another
    architecture (naming the tensor) and for a damaged file.
    """
    architecture = wan_checkpoints.read_architecture(path, **sizes)
    return AutoencoderKLWan(
        wan_checkpoints.read_params(path, architecture), architecture, path, frames_per_call
    )
