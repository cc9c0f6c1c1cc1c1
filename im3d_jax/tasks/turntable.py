"""The task of Sec. 3.1: a backbone learns to denoise the K views of a turntable, given view 0 and a caption.

With K = 1 and no image it is text to image, which keeps or teaches a backbone's first half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from im3d_jax import backbones, checkpoint, costs, generator, sharding
from im3d_jax.conditions import conditioning
from im3d_jax.conditions import pictures as pictures_module
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.data import Example, pipeline
from im3d_jax.diffusion import objective, schedules
from im3d_jax.settings import PictureSettings
from im3d_jax.training.state import join, split_params
from recon_torch.errors import UserError

NUM_LEVELS = 10
"""Equal parts of the schedule, from clean to noisy, whose losses are told apart."""


class Stream(NamedTuple):
    """How the assets of one stream are trained on.

    keep_image, keep_text: probabilities that an asset keeps its conditions. Below 1, the network also learns
        to do without, which guidance needs.
    timestep_shift: see `diffusion.sample_timesteps`.
    """

    keep_image: float
    keep_text: float
    timestep_shift: float


class Draws(NamedTuple):
    """What is random of each of B assets: its noise level, its noise, and which conditions it keeps."""

    number: Array
    noise_key: Array
    keep_image: Array
    keep_text: Array


class TurntableTask:
    """The task, see `im3d_jax.tasks`."""

    def __init__(self, config, mesh: Mesh):
        self.generator = generator.load(config, params={}, place=sharding.replicated(mesh))
        self.settings, self.picture = config.train, PictureSettings(**config.image)
        self.model, self.schedule = self.generator.model, self.generator.schedule
        self.partition_rules = self.model.partition_rules
        empty = conditioning.no_conditions(self.model.empty_conditioning(1), self.generator.text)
        self.asks = self.model.empty_conditioning(1)
        self.constants = self.generator.codec, jax.device_put(empty, self.generator.place)

    def init(self, key: Array) -> dict:
        return self.model.init(key)

    def load(self, path: str) -> dict:
        """Parameters of a file of `checkpoint.save_weights`, on the host. UserError if they do not fit."""
        return backbones.load_weights(self.model, path)[0]

    def stream(self, name: str) -> Stream:
        settings = self.settings.streams[name]
        return Stream(*(settings[field] for field in Stream._fields))

    def collate(self, examples: Sequence[Example]) -> dict:
        """Arrays of a batch: latents [B,K,h,w,c], or rgb and alpha in [0, 1]; text; what else is asked for.

        What records have cached is taken as it is; the rest is encoded here. Raises UserError if what is
        cached is not what the backbone takes.
        """
        if "latents" in examples[0]:
            stacked = {"latents": np.stack([each["latents"] for each in examples])}
            self._check("latents", stacked["latents"].shape[2:], tuple(self.model.latent_shape))
        else:
            stacked = dict(zip(("rgb", "alpha"), pipeline.stack_views(examples), strict=True))
        if "text" in examples[0]:
            text, text_mask = (
                tuple(
                    np.stack(each).astype(np.float32)
                    for each in zip(*(e[name] for e in examples), strict=True)
                )
                for name in ("text", "text_mask")
            )
        else:
            text, text_mask = self.generator.text.encode([each["caption"] for each in examples])
        for number, (made, taken) in enumerate(zip(text, self.asks.text, strict=False)):
            self._check(f"text_{number}", made.shape[2:], taken.shape[2:])
        batch = {**stacked, "text": tuple(text), "text_mask": tuple(text_mask)}
        if self.asks.elevation_rad is not None:
            batch["elevation_rad"] = np.array([each["elevation_rad"] for each in examples], np.float32)
        if self.asks.image_tokens is not None:
            batch["image_tokens"] = self._image_tokens(examples, stacked)
        return batch

    @staticmethod
    def _check(what: str, made: tuple[int, ...], taken: tuple[int, ...]) -> None:
        if made != taken:
            raise UserError(
                f"the data set's {what} have shape {made}, the backbone takes {taken}: build it with this"
                " config"
            )

    def _image_tokens(self, examples: Sequence[Example], stacked: dict) -> Float[np.ndarray, "B L d"]:
        if "image_tokens" in examples[0]:
            return np.stack([each["image_tokens"] for each in examples]).astype(np.float32)
        if self.generator.image_encoder is None:
            raise UserError(
                "the backbone attends to an image encoder: set config.image_encoder.path, or build the data"
                " set with image tokens"
            )
        return self.generator.image_encoder.encode(np.asarray(stacked["rgb"][:, 0]))

    def draw(self, key: Array, num_assets: int, stream: Stream) -> Draws:
        """One step's draws, of which each asset's depend on its row and not on how the batch is divided."""
        keys = jax.random.split(key, 4)
        levels = self.schedule.num_timesteps
        return Draws(
            schedules.sample_timesteps(keys[0], num_assets, levels, shift=stream.timestep_shift),
            jax.random.split(keys[1], num_assets),
            jax.random.bernoulli(keys[2], stream.keep_image, (num_assets,)),
            jax.random.bernoulli(keys[3], stream.keep_text, (num_assets,)),
        )

    def loss(self, params, constants, batch: dict, draws: Draws, stream: Stream):
        """The loss of Sec. 3.1 and, for each noise level, its sum over assets and their number."""
        codec, empty = constants
        latents = self._latents(codec, batch)
        given = conditioning.drop(self._given(latents, batch), empty, draws.keep_image, draws.keep_text)
        alpha, sigma = schedules.level(self.schedule, draws.number)
        timestep = jnp.asarray(self.schedule.timesteps, jnp.float32)[draws.number]
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(draws.noise_key)
        prediction_type = self.model.prediction_type
        target = objective.target(prediction_type, latents, noise, alpha, sigma)
        weight = objective.loss_weight(self.settings.loss_weight, prediction_type, alpha, sigma)
        noisy = objective.add_noise(latents, noise, alpha, sigma)
        losses = objective.loss(self.model.apply(params, noisy, timestep, given), target, weight)
        level = draws.number * NUM_LEVELS // self.schedule.num_timesteps
        of_level = jax.nn.one_hot(level, NUM_LEVELS)
        sums = {"loss_by_level": losses @ of_level, "count_by_level": of_level.sum(0)}
        return losses.mean(), sums

    @staticmethod
    def _latents(codec, batch: dict) -> Float[Array, "B K h w c"]:
        # Whatever is to be computed for the views is not differentiated: nothing before the noise trains.
        if "latents" in batch:
            return jnp.asarray(batch["latents"], jnp.float32)
        return jax.lax.stop_gradient(codec.encode(batch["rgb"], batch["alpha"]))

    @staticmethod
    def _given(latents: Float[Array, "B K h w c"], batch: dict) -> Conditioning:
        return Conditioning(
            latents[:, 0],
            jnp.ones(latents.shape[0]),
            batch["text"],
            batch["text_mask"],
            batch.get("image_tokens"),
            batch.get("elevation_rad"),
        )

    def flops(self, trainable: str, stream_name: str) -> float:
        """FLOPs of the network in a step, forward and backward, without what `remat` computes again."""
        settings = self.settings.streams[stream_name]
        model = dataclasses.replace(self.model, remat="") if hasattr(self.model, "remat") else self.model
        trained, frozen = split_params(jax.eval_shape(model.init, jax.random.key(0)), trainable)
        noisy = jax.ShapeDtypeStruct((1, settings.num_views, *model.latent_shape), jnp.float32)
        timestep = jax.ShapeDtypeStruct((1,), jnp.float32)

        def loss(trained, frozen, *inputs):
            return model.apply(join(frozen, trained), *inputs).sum()

        program = costs.trace(jax.grad(loss), trained, frozen, noisy, timestep, self.asks)
        return float(costs.count_flops(program) * settings.batch_size)

    def sample(self, params, key: Array) -> dict[str, Float[np.ndarray, "K H W 3"]]:
        """Turntables of the prompts and pictures of `config.train.sample`, by name, in [0, 1]."""
        settings, made = self.settings.sample, self.generator.with_params(params)
        how = dataclasses.asdict(self.picture)
        pictures = [pictures_module.load_image(path, made.size, **how) for path in settings.images]
        prompts = list(settings.prompts)
        if prompts:
            drawn = made.text_to_image(prompts, jax.random.fold_in(key, 0))
            pictures += list(zip(*map(sharding.to_host, drawn), strict=True))
        prompts = [""] * len(settings.images) + prompts
        if not prompts:
            return {}
        rgb, alpha = (np.stack(each) for each in zip(*pictures, strict=True))
        given = made.condition(prompts, rgb, alpha, float(np.deg2rad(settings.elevation_deg)))
        latents = made.turntable(given, jax.random.fold_in(key, 1))
        views = sharding.to_host(made.decode(latents)[0])
        return {f"{number:02d}": each for number, each in enumerate(views)}

    def save(self, directory: Path, params, metadata: dict) -> Path:
        """Writes `directory`/weights.safetensors, for `config.weights`."""
        path = directory / "weights.safetensors"
        checkpoint.save_weights(path, params, metadata | {"words": list(self.generator.text.words)})
        return path


def build(config, mesh: Mesh) -> TurntableTask:
    """The task of a config."""
    return TurntableTask(config, mesh)
