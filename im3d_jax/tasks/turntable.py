"""The task of Sec. 3.1: a backbone learns to denoise the K views of a turntable, given view 0 and a caption.

With K = 1 and no image it is text to image, which keeps or teaches a backbone's first half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from im3d_jax import backbones, checkpoint, config_sections, costs, generator, sharding
from im3d_jax.autoencoders import Autoencoder
from im3d_jax.clips import num_latents, padded_clip
from im3d_jax.conditions import conditioning, pictures
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.data import Example, input_pipeline
from im3d_jax.diffusion import objective, schedules
from im3d_jax.generator import Generator
from im3d_jax.settings import PictureSettings
from im3d_jax.trainable import WhatTrains
from im3d_jax.training_settings import LossWeight, TimestepDraw, TrainSettings, WeightsDtype
from recon_torch.errors import UserError

NUM_LEVELS = 10
"""Equal parts of the schedule, from clean to noisy, whose losses are told apart."""


class Stream(NamedTuple):
    """How the assets of one stream are trained on.

    Attributes:
        keep_image, keep_text: probabilities that an asset keeps its conditions. Below 1, the network also
            learns to do without them, which guidance needs.
        timestep_shift, timestep_draw, logit_mean, logit_std: see `schedules.sample_timesteps`.
        random_start: probability that a turntable starts at a random one of its views, which is then the
            given image. The views are evenly spaced on a circle, so this is the object with another yaw.
    """

    keep_image: float
    keep_text: float
    timestep_shift: float
    random_start: float = 0.0
    timestep_draw: TimestepDraw = TimestepDraw.UNIFORM
    logit_mean: float = 0.0
    logit_std: float = 1.0


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """The turntables that are made to look at (`config.train.sample`).

    Attributes:
        prompts: a turntable is made of each.
        images: paths of pictures; a turntable is made of each.
        elevation_rad: of the cameras, for a backbone that is told it.
        picture: how a picture becomes view 0.
    """

    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    elevation_rad: float = 0.0
    picture: PictureSettings = PictureSettings()


class Draws(NamedTuple):
    """What is random of each of B assets.

    Attributes:
        number: of its timestep in the schedule.
        noise_key: of its noise.
        keep_image, keep_text: whether it keeps these conditions.
        start: in [0, 1): the share of its turntable that lies before the view with which it starts.
    """

    number: Int[Array, " B"]
    noise_key: Key[Array, " B"]
    keep_image: Bool[Array, " B"]
    keep_text: Bool[Array, " B"]
    start: Float[Array, " B"]


class TurntableTask:
    """The task, see `im3d_jax.tasks.Task`."""

    def __init__(
        self,
        generator: Generator,
        streams: Mapping[str, Stream],
        loss_weight: LossWeight = LossWeight.UNIFORM,
        samples: SampleSettings = SampleSettings(),  # noqa: B008 - it is frozen
        weights_dtype: WeightsDtype = WeightsDtype.FLOAT32,
    ):
        """generator: the backbone and its conditions, without parameters. weights_dtype: of what is saved."""
        self.generator, self.streams, self.samples = generator, streams, samples
        self.weights_dtype = weights_dtype
        self.loss_weight = loss_weight
        self.model, self.schedule = generator.model, generator.schedule
        self.partition_rules = self.model.partition_rules
        self.asks = self.model.empty_conditioning(1)
        self.clip = generator.clip
        _check_draws(streams)
        if self.asks.image_tokens is not None and any(each.random_start for each in streams.values()):
            raise UserError(
                "config.train.streams: random_start does not go with a backbone that attends to an image"
                " encoder, whose tokens are those of view 0; set it to 0"
            )
        self.latents_are_views = generator.latents_are_views
        empty = conditioning.no_conditions(self.asks, generator.text)
        self.constants = generator.codec, jax.device_put(empty, generator.place)

    def init(self, key: PRNGKeyArray) -> PyTree:
        """The backbone's random parameters."""
        return self.model.init(key)

    def load(self, path: str) -> dict:
        """The parameters of a file of `checkpoint.save_weights`, on the host.

        Raises UserError if they do not fit.
        """
        return backbones.load_weights(self.model, path)[0]

    def stream(self, name: str) -> Stream:
        """How the assets of a stream are trained on."""
        return self.streams[name]

    # ---- Batches ----

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The arrays of a batch by the names of `Example`: latents, or rgb and alpha; the text; and what else
        the backbone asks for.

        What records have cached is taken as it is, and the rest is encoded here. Raises UserError if what is
        cached is not what the backbone takes.
        """
        input_pipeline.check_alike(examples)
        if "latents" in examples[0]:
            batch: dict[str, Any] = {"latents": np.stack([each["latents"] for each in examples])}
            self._check_latents(batch["latents"].shape[1:])
        else:
            batch = dict(zip(("rgb", "alpha"), input_pipeline.stack_views(examples), strict=True))
        batch["text"], batch["text_mask"] = self._text(examples)
        if self.asks.elevation_rad is not None:
            batch["elevation_rad"] = np.array([each["elevation_rad"] for each in examples], np.float32)
        if self.asks.image_tokens is not None:
            batch["image_tokens"] = self._image_tokens(examples, batch)
        return batch

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for latents of a data set, [F, h, w, c], that this task cannot train on."""
        _check("latents", shape[1:], tuple(self.model.latent_shape))
        if self.latents_are_views:
            return
        if shape[0] not in (1, self.generator.num_frames):
            raise UserError(
                f"the data set's latents have {shape[0]} frames, config.clip makes"
                f" {self.generator.num_frames} of {self.clip.num_pictures} pictures: build it with this"
                " config"
            )
        needs = "the picture's clip" if self.asks.clip is not None else ""
        needs = needs or ("random_start" if any(each.random_start for each in self.streams.values()) else "")
        if needs:
            raise UserError(
                f"{needs} needs pictures, and the data set holds latents of compressed clips; build it"
                " without --latents"
            )

    def _text(self, examples: Sequence[Example]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """The text and its masks, of each text encoder."""
        if "text" in examples[0]:
            text, mask = (
                tuple(
                    np.stack(each).astype(np.float32)
                    for each in zip(*(example[name] for example in examples), strict=True)
                )
                for name in ("text", "text_mask")
            )
        else:
            text, mask = self.generator.text.encode([each["caption"] for each in examples])
        for number, (made, taken) in enumerate(zip(text, self.asks.text, strict=False)):
            _check(f"text_{number}", made.shape[2:], taken.shape[2:])
        return tuple(text), tuple(mask)

    def _image_tokens(
        self, examples: Sequence[Example], batch: Mapping[str, Any]
    ) -> Float[np.ndarray, "B L d"]:
        if "image_tokens" in examples[0]:
            return np.stack([each["image_tokens"] for each in examples]).astype(np.float32)
        if self.generator.image_encoder is None:
            raise UserError(
                "the backbone attends to an image encoder: set config.image_encoder.path, or build the data"
                " set with image tokens"
            )
        return self.generator.image_encoder.encode(np.asarray(batch["rgb"][:, 0]))

    # ---- Loss ----

    def draw(self, key: PRNGKeyArray, num_examples: int, stream: Stream) -> Draws:
        """One step's draws. Those of an asset depend on its row and not on how the batch is divided."""
        keys = jax.random.split(key, 4)
        start_keys = jax.random.split(jax.random.fold_in(key, 4))
        is_turned = jax.random.bernoulli(start_keys[0], stream.random_start, (num_examples,))
        number = schedules.sample_timesteps(
            keys[0],
            num_examples,
            self.schedule.num_timesteps,
            shift=stream.timestep_shift,
            draw=stream.timestep_draw,
            logit_mean=stream.logit_mean,
            logit_std=stream.logit_std,
        )
        return Draws(
            number,
            jax.random.split(keys[1], num_examples),
            jax.random.bernoulli(keys[2], stream.keep_image, (num_examples,)),
            jax.random.bernoulli(keys[3], stream.keep_text, (num_examples,)),
            jnp.where(is_turned, jax.random.uniform(start_keys[1], (num_examples,)), 0.0),
        )

    def loss(
        self,
        params: PyTree,
        constants: tuple[Autoencoder, Conditioning],
        batch: Mapping[str, Any],
        draws: Draws,
        stream: Stream,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, " levels"]]]:
        """The loss of Sec. 3.1 and, for each noise level, its sum over assets and their number."""
        codec, empty = constants
        latents = self._latents(codec, batch, draws.start)
        given = self._given(codec, latents, batch, draws.start)
        given = conditioning.drop(given, empty, draws.keep_image, draws.keep_text)
        alpha, sigma = schedules.level(self.schedule, draws.number)
        timestep = jnp.asarray(self.schedule.timesteps, jnp.float32)[draws.number]
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(draws.noise_key)
        prediction_type = self.model.prediction_type
        target = objective.target(prediction_type, latents, noise, alpha, sigma)
        weight = objective.loss_weight(self.loss_weight, prediction_type, alpha, sigma)
        noisy = objective.add_noise(latents, noise, alpha, sigma)
        losses = objective.loss(self.model.apply(params, noisy, timestep, given), target, weight)
        level = draws.number * NUM_LEVELS // self.schedule.num_timesteps
        of_level = jax.nn.one_hot(level, NUM_LEVELS)
        sums = {"loss_by_level": losses @ of_level, "count_by_level": of_level.sum(0)}
        return losses.mean(), sums

    def _latents(
        self, codec: Autoencoder, batch: Mapping[str, Any], start: Float[Array, " B"]
    ) -> Float[Array, "B F h w c"]:
        """The latents of the turntables, each begun after the share `start` of its views."""
        if "latents" in batch:
            latents = jnp.asarray(batch["latents"], jnp.float32)
            return _started(latents, start) if self.latents_are_views else latents
        if self.latents_are_views:  # which costs less to turn than pictures do
            rgb, alpha = (jnp.asarray(batch[name]) for name in ("rgb", "alpha"))
            return _started(_encoded(codec, rgb, alpha), start)
        orbit = (_started(jnp.asarray(batch[name]), start) for name in ("rgb", "alpha"))
        clip = self.clip.of_orbit(batch["rgb"].shape[1])
        return _encoded(codec, *map(clip.pictures, orbit))

    def _given(
        self,
        codec: Autoencoder,
        latents: Float[Array, "B F h w c"],
        batch: Mapping[str, Any],
        start: Float[Array, " B"],
    ) -> Conditioning:
        """The conditions of a batch before any are dropped."""
        padded = None
        if self.asks.clip is not None:
            first = (_started(jnp.asarray(batch[name]), start)[:, 0] for name in ("rgb", "alpha"))
            count = self.clip.of_orbit(batch["rgb"].shape[1]).num_pictures
            padded = _encoded(codec, *(padded_clip(each, count) for each in first))
        return Conditioning(
            latents[:, 0],
            jnp.ones(latents.shape[0]),
            batch["text"],
            batch["text_mask"],
            batch.get("image_tokens"),
            batch.get("elevation_rad"),
            padded,
        )

    def flops(self, trains: WhatTrains, num_examples: int, num_views: int) -> float:
        """FLOPs of the network in a step, forward and backward, without what `remat` computes again."""
        model = backbones.with_remat(self.model, "")
        key = jax.random.key(0)
        trained, frozen = jax.eval_shape(lambda key: trains.split(model.init(key), key), key)
        num_frames = num_latents(self.clip.of_orbit(num_views), self.generator.codec)
        noisy = jax.ShapeDtypeStruct((1, num_frames, *model.latent_shape), jnp.float32)
        timestep = jax.ShapeDtypeStruct((1,), jnp.float32)

        def loss(trained, frozen, *inputs):
            return trains.call(lambda params: model.apply(params, *inputs).sum(), frozen, trained)

        program = costs.trace(jax.grad(loss), trained, frozen, noisy, timestep, self.asks)
        return float(costs.count_flops(program) * num_examples)

    # ---- Results ----

    def sample(self, params: PyTree, key: PRNGKeyArray) -> dict[str, Float[np.ndarray, "K H W 3"]]:
        """Turntables of the pictures and prompts of `SampleSettings`, by number, in [0, 1]."""
        wanted, trained = self.samples, self.generator.with_params(params)
        prompts = [""] * len(wanted.images) + list(wanted.prompts)
        if not prompts:
            return {}
        placing = wanted.picture.placing
        found = [pictures.load_image(path, trained.size, **placing)[:2] for path in wanted.images]
        if wanted.prompts:
            drawn = trained.text_to_image(list(wanted.prompts), jax.random.fold_in(key, 0))
            found += list(zip(*map(sharding.to_host, drawn), strict=True))
        rgb, alpha = (np.stack(each) for each in zip(*found, strict=True))
        given = trained.condition(prompts, rgb, alpha, wanted.elevation_rad)
        latents = trained.turntable(given, jax.random.fold_in(key, 1))
        views = sharding.to_host(trained.decode(latents)[0])
        return {f"{number:02d}": each for number, each in enumerate(views)}

    def save(self, directory: Path, params: PyTree, metadata: dict[str, Any]) -> Path:
        """Writes `directory`/weights.safetensors, for `config.weights`."""
        path = directory / "weights.safetensors"
        metadata = metadata | {"words": list(self.generator.text.words)}
        checkpoint.save_weights(path, params, metadata, self.weights_dtype)
        return path


def _check(what: str, made: tuple[int, ...], taken: tuple[int, ...]) -> None:
    if made != taken:
        raise UserError(
            f"the data set's {what} have shape {made}, the backbone takes {taken}: build it with this config"
        )


def _check_draws(streams: Mapping[str, Stream]) -> None:
    """Raises UserError for numbers of a distribution that a stream does not draw from."""
    for name, each in streams.items():
        if each.timestep_draw == TimestepDraw.UNIFORM and (each.logit_mean, each.logit_std) != (0, 1):
            raise UserError(
                f"config.train.streams.{name}: logit_mean {each.logit_mean:g} and logit_std"
                f" {each.logit_std:g} change nothing in a timestep_draw of 'uniform'; make it 'logit_normal',"
                " or leave them at 0 and 1"
            )


def _encoded(
    codec: Autoencoder, rgb: Float[Array, "B P H W 3"], alpha: Float[Array, "B P H W 1"]
) -> Float[Array, "B F h w c"]:
    """Latents. Nothing before the noise trains, so it is not differentiated."""
    return jax.lax.stop_gradient(codec.encode(rgb, alpha))


def _started(views: Float[Array, "B K *rest"], start: Float[Array, " B"]) -> Float[Array, "B K *rest"]:
    """The turntables, each from the view that comes after the share `start` of its views."""
    number = jnp.floor(start * views.shape[1]).astype(jnp.int32)
    return jax.vmap(lambda views, first: jnp.roll(views, -first, axis=0))(views, number)


def build(config: ConfigDict, mesh: Mesh) -> TurntableTask:
    """The task that a config describes, whose constants are on every device of the mesh."""
    settings = config_sections.settings(config, "train", TrainSettings)
    streams = {
        name: Stream(*(getattr(stream, field) for field in Stream._fields))
        for name, stream in settings.streams.items()
    }
    samples = SampleSettings(
        prompts=settings.sample.prompts,
        images=settings.sample.images,
        elevation_rad=float(np.deg2rad(settings.sample.elevation_deg)),
        picture=config_sections.settings(config, "image", PictureSettings),
    )
    return TurntableTask(
        generator.load(config, params={}, place=sharding.replicated(mesh)),
        streams,
        LossWeight(settings.loss_weight),
        samples,
        WeightsDtype(settings.weights_dtype),
    )
