"""Wan (Wan Team 2025, arXiv 2503.20314): video transformers over latents that are compressed in time.

Every token attends to every other one, over space and time alike, so no parameter is temporal by itself and
the paper's "temporal layers only" (Sec. 3.1) has nothing to train: `config.train.lora` stands for it, or all
parameters. They predict the velocity of flow matching (`config.schedule.kind = "flow"`). Their latents are
those of `autoencoders.wan`, whose clips have 4n + 1 pictures: see `config.clip`.

    weights       sizes       first_frame   autoencoder
    2.1 T2V       t2v_*       clean         z_dim 16     fine-tuned, as it knows no pictures
    2.1 I2V       i2v_14b     channels      z_dim 16     config.image_encoder: CLIP
    2.2 I2V       i2v_a14b    channels      z_dim 16     experts=True
    2.2 TI2V      ti2v_5b     clean         z_dim 48
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax.backbones import Params, wan_checkpoints, wan_network, wan_sizes
from im3d_jax.backbones.unet import WHAT, LatentShape
from im3d_jax.backbones.wan_sizes import Architecture
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.pretrained import SourceOf
from im3d_jax.sharding import PartitionRules
from recon_torch.errors import UserError, choice
from recon_torch.ranges import Range, Share
from recon_torch.settings import plain

SMALL = dict(latent_shape=(4, 4, 48), num_text_tokens=6) | plain(wan_sizes.SMALL["ti2v"])
"""Arguments of a model that checks and benchmarks can run anywhere."""

TIMESTEP_UNIT = 1000
"""What the network is told is the noise level times this."""

MASK_CHANNELS = 4
"""Channels that say which frames are given: one for each picture of a frame."""


class FirstFrame(enum.StrEnum):
    """How the network is told the picture."""

    CLEAN = "clean"
    """Frame 0 is the picture's latent, without noise and at noise level 0."""
    CHANNELS = "channels"
    """The latents of the picture and grey pictures after it, and which are given, are on further channels."""


@dataclass(frozen=True, kw_only=True)
class Model(Architecture):
    """A denoiser under the backbone contract; see `Architecture` for arguments not listed.

    Args:
        latent_shape: (h, w, c) of a frame of latents; h and w are multiples of the patches.
        first_frame: the `FirstFrame`.
        num_text_tokens: to which text is filled up with zeros, which are attended to: 512 in training. 0 for
            a network that takes no text.
        experts: whether there are two networks, of which the second takes noise levels below `boundary`
            (2.2 A14B). Their parameters are "high" and "low".
        boundary: a noise level in [0, 1].
    """

    latent_shape: LatentShape
    first_frame: FirstFrame | str = FirstFrame.CLEAN
    num_text_tokens: Annotated[int, Range(0, 65_536)] = 512
    experts: bool = False
    boundary: Share = 0.9

    prediction_type: ClassVar[str] = "flow"
    num_views: ClassVar[int | None] = None
    temporal_pattern: ClassVar[str] = ""
    partition_rules: ClassVar[PartitionRules] = wan_network.PARTITION_RULES
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))
        kind = choice(FirstFrame, self.first_frame, f"{WHAT}.first_frame")
        object.__setattr__(self, "first_frame", kind)
        if len(self.latent_shape) != 3:
            raise UserError(f"{WHAT}: latent_shape {self.latent_shape} is not (height, width, channels)")
        channels = self.latent_shape[-1]
        if self.out_channels != channels:
            raise UserError(
                f"{WHAT}: out_channels is {self.out_channels}, and latents have {channels} channels; match"
                " them"
            )
        taken = 2 * channels + MASK_CHANNELS if kind == FirstFrame.CHANNELS else channels
        if self.in_channels != taken:
            raise UserError(
                f"{WHAT}: in_channels is {self.in_channels}, and first_frame {kind.value!r} with latents of"
                f" {channels} channels makes {taken}; are these the sizes of another model?"
            )
        self.grid(1, *self.latent_shape[:2])

    @property
    def network(self) -> Architecture:
        """The sizes of a network alone."""
        return Architecture(**{each.name: getattr(self, each.name) for each in fields(Architecture)})

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters of the network, or of both experts."""
        if not self.experts:
            return wan_network.init(self.network, key)
        high, low = (wan_network.init(self.network, each) for each in jax.random.split(key))
        return {"high": high, "low": low}

    def read_stored(self, path: str | Path) -> Params:
        """See `StoredBackbone`: a directory of diffusers or of Wan, with two networks for `experts`."""
        if not self.experts:
            return wan_checkpoints.from_pretrained(path, self.network)
        found = wan_checkpoints.read_experts(path, self.network)
        if found.boundary != self.boundary:
            raise UserError(
                f"{path} has its boundary at {found.boundary:g}, {WHAT}.boundary is"
                f" {self.boundary:g}; make them agree"
            )
        return {"high": found.high_noise, "low": found.low_noise}

    def from_pretrained(self, path: str | Path, params: Params) -> Params:
        """See `PublicBackbone`. All parameters have a tensor, so none is taken from `params`."""
        return jax.tree.map(lambda x: x.astype(jnp.float32), self.read_stored(path))

    def to_pretrained(self, params: Params) -> dict[str, np.ndarray]:
        """The parameters as tensors of a WanTransformer3DModel. Raises UserError for two experts."""
        return wan_checkpoints.to_pretrained(self._alone(params))

    def to_wans(self, params: Params) -> dict[str, np.ndarray]:
        """The parameters as tensors of Wan's own layout. Raises UserError for two experts."""
        return wan_checkpoints.to_wans(self._alone(params))

    def public_names(self) -> Mapping[str, SourceOf]:
        """See `NamedBackbone`: the layouts of diffusers and of Wan. None for two experts."""
        if self.experts:
            return {}
        return {
            "transformer": wan_checkpoints.diffusers_source,
            "diffusion_model": wan_checkpoints.wans_source,
        }

    def _alone(self, params: Params) -> Params:
        if self.experts:
            raise UserError(f"two experts are two checkpoints; write each with {WHAT}.experts=False")
        return params

    def apply(
        self,
        params: Params,
        noisy: Float[Array, "B F h w c"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B F h w c"]:
        """See `Backbone.apply`."""
        if not self.experts:
            return self._predict(params, noisy, timestep, conditioning)
        is_high = timestep >= self.boundary * TIMESTEP_UNIT

        def expert(name: str) -> Float[Array, "B F h w c"]:
            return self._predict(params[name], noisy, timestep, conditioning)

        def both() -> Float[Array, "B F h w c"]:
            return jnp.where(is_high[:, None, None, None, None], expert("high"), expert("low"))

        # A sampler's batch is at one noise level, so that one of the experts is enough.
        which = jnp.where(is_high.all(), 0, jnp.where(is_high.any(), 2, 1))
        return jax.lax.switch(which, (lambda: expert("high"), lambda: expert("low"), both))

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        image, words = jnp.zeros((batch, *self.latent_shape)), (batch, self.num_text_tokens)
        return Conditioning(
            image,
            jnp.zeros(batch),
            (jnp.zeros((*words, self.text_dim)),) if self.num_text_tokens else (),
            (jnp.zeros(words),) if self.num_text_tokens else (),
            jnp.zeros((batch, 1, self.image_dim)) if self.image_dim else None,
            clip=image[:, None] if self.first_frame == FirstFrame.CHANNELS else None,
        )

    def _predict(
        self,
        params: Params,
        noisy: Float[Array, "B F h w c"],
        timestep: Float[Array, " B"],
        given: Conditioning,
    ) -> Float[Array, "B F h w c"]:
        """The prediction of one network."""
        text, tokens = self._text(given), given.image_tokens
        if tokens is not None:
            tokens = tokens * given.image_mask[:, None, None]

        def net(seen: Float[Array, "B F h w _"], levels: Float[Array, "..."]) -> Float[Array, "B F h w _"]:
            network = wan_network.Transformer(self.network)
            return cast(Array, network.apply({"params": params}, seen, levels, text, tokens))

        if self.first_frame == FirstFrame.CHANNELS:
            seen = jnp.concatenate([noisy, *_channels(given, noisy.shape[1])], -1)
            return net(seen, timestep)
        has_image = given.image_mask[:, None, None, None]
        seen = noisy.at[:, 0].set(jnp.where(has_image > 0, given.image, noisy[:, 0]))
        levels = jnp.broadcast_to(timestep[:, None], noisy.shape[:2])
        levels = levels.at[:, 0].multiply(1 - given.image_mask)
        prediction = net(seen, levels)
        # The velocity of frame 0 follows from the picture. The network was not shown its noise.
        sigma = jnp.maximum(timestep / TIMESTEP_UNIT, 1e-6)[:, None, None, None]
        known = (noisy[:, 0] - given.image) / sigma
        return prediction.at[:, 0].set(jnp.where(has_image > 0, known, prediction[:, 0]))

    def _text(self, given: Conditioning) -> Float[Array, "B L d"]:
        """The tokens of the text, zeros from its end on."""
        if not self.num_text_tokens:
            return jnp.zeros((len(given.image), 1, self.text_dim))
        text = given.text[0] * given.text_mask[0][..., None]
        if text.shape[1] > self.num_text_tokens:
            raise UserError(
                f"the text has {text.shape[1]} tokens, {WHAT}.num_text_tokens is {self.num_text_tokens};"
                " match config.text"
            )
        return jnp.pad(text, ((0, 0), (0, self.num_text_tokens - text.shape[1]), (0, 0)))


def _channels(given: Conditioning, num_frames: int) -> Sequence[Float[Array, "B F h w _"]]:
    """Which frames are given, and the latents of the picture with grey pictures after it."""
    assert given.clip is not None, "a network with these channels is given the clip"
    clip = given.clip * given.image_mask[:, None, None, None, None]
    # Empty conditions have one frame.
    clip = jnp.pad(clip, ((0, 0), (0, num_frames - clip.shape[1]), (0, 0), (0, 0), (0, 0)))
    mask = jnp.zeros((*clip.shape[:-1], MASK_CHANNELS))
    return mask.at[:, 0].set(given.image_mask[:, None, None, None]), clip
