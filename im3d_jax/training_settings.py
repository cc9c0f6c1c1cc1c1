"""The settings of training, with their ranges: a class for each section of `config.train`, without JAX or
torch.

`configs/base.py` takes its values from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Annotated

from recon_torch.errors import UserError, quoted
from recon_torch.ranges import Count, ElevationDeg, Every, NumViews, Range, Share, Weight, settings

Seconds = Annotated[float, Range(0, 1e7)]
Workers = Annotated[int, Range(0, 4096)]
FirstObject = Annotated[int, Range(0, 2**31 - 1)]

EVERYTHING = ".*"
"""The pattern of all parameters."""


def _check_pattern(name: str, pattern: str) -> None:
    if not pattern:
        raise UserError(f"{name} is '', which is found everywhere; {EVERYTHING!r} says so, or give a pattern")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name} is {quoted(pattern)}, which is no regular expression: {error}") from None


class LossWeight(StrEnum):
    """w_t of the loss, which is unspecified in the paper.

    UNIFORM is 1 in the prediction's own space; the others are defined on the squared error in x0.
    """

    UNIFORM = "uniform"
    MIN_SNR_5 = "min_snr_5"  # min(SNR, 5)  (Hang et al. 2023, https://arxiv.org/abs/2303.09556)
    TRUNCATED_SNR = "truncated_snr"  # max(SNR, 1)  (Salimans & Ho 2022)


class TimestepDraw(StrEnum):
    """How the share u of the noise schedule is distributed at which an asset is trained on."""

    UNIFORM = "uniform"
    LOGIT_NORMAL = "logit_normal"  # most in the middle (Esser et al. 2024, https://arxiv.org/abs/2403.03206)


class FrozenDtype(StrEnum):
    """What parameters that do not train are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class WeightsDtype(StrEnum):
    """What weights are written in: types with the range of the training, which float16 has not."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@settings
class LoaderSettings:
    """How examples are read (`config.train.loader`).

    Attributes:
        num_threads: threads that read and decode; 0 reads only when asked.
        buffer: batches that are read ahead.
        max_corrupt: so many corrupt records may be skipped.
    """

    num_threads: Workers = 2
    buffer: Annotated[int, Range(1, 4096)] = 2
    max_corrupt: Count = 0


@settings
class CheckpointSettings:
    """Which states of a run are kept (`config.train.checkpoint`), in steps. 0 stands for none.

    Attributes:
        every: between checkpoints.
        keep: how many of the newest checkpoints are kept.
        keep_every: one checkpoint in so many steps is kept for good.
        weights_every: between files for `config.weights`, of which the last step always writes one.
    """

    every: Every = 1000
    keep: Annotated[int, Range(1, 100_000)] = 2
    keep_every: Count = 0
    weights_every: Count = 0


@settings
class SamplesSettings:
    """The turntables that are drawn to look at (`config.train.sample`).

    Attributes:
        every: steps between them; 0: never.
        prompts, images: what they show: a turntable of each prompt, and of the picture in each file.
        elevation_deg: of the cameras, for a backbone that is told it.
    """

    every: Count = 0
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    elevation_deg: ElevationDeg = 20.0


@settings
class ProfileSettings:
    """A profile of `num_steps` steps that follow step `at_step` (`config.train.profile`); 0: none."""

    at_step: Count = 0
    num_steps: Annotated[int, Range(0, 10_000)] = 0


@settings
class AutoencoderLossSettings:
    """The weights of the terms of an autoencoder's loss (`config.train.autoencoder`).

    w_chroma: of hues. Brightness varies more than hue in most data, and a small autoencoder of many colours
        learns all hues late without it: it paints what is green brown.
    """

    w_l1: Weight = 1.0
    w_chroma: Weight = 0.0
    w_ssim: Weight = 0.2
    w_kl: Weight = 5e-7


@settings
class PartSettings:
    """A part of a mixture. weight: its share of the examples, in proportion to the other weights."""

    weight: Annotated[float, Range(above=0, most=1e9)]
    path: str = ""
    split: str = "train"
    first_object: FirstObject = 0


@settings
class DataSettings:
    """Where the examples of a stream come from, see `data.sources.open_source`.

    Attributes:
        path: the directory of a data set of `im3d dataset`; "" stands for procedural objects.
        split: one of the data set's splits, or one of `data.objects.Split`.
        first_object: number of the first procedural object, counted from the start of its split.
        mix: the parts of a mixture by name, which take the place of the other three.
    """

    path: str = ""
    split: str = "train"
    first_object: FirstObject = 0
    mix: Mapping[str, PartSettings] | None = None


@settings
class StreamSettings:
    """One stream of batches (`config.train.streams`).

    Attributes:
        every: the stream's turn comes every so many steps.
        batch_size: over all processes.
        num_views: of each object.
        keep_image, keep_text, timestep_shift, random_start: see `tasks.turntable.Stream`.
        timestep_draw, logit_mean, logit_std: see `diffusion.schedules.sample_timesteps`.
    """

    batch_size: Annotated[int, Range(1, 1_000_000)]
    every: Every = 1
    num_views: NumViews = 16
    keep_image: Share = 0.9
    keep_text: Share = 0.9
    timestep_shift: Annotated[float, Range(above=0, most=1000)] = 1.0
    timestep_draw: TimestepDraw | str = TimestepDraw.UNIFORM
    logit_mean: Annotated[float, Range(-20, 20)] = 0.0
    logit_std: Annotated[float, Range(above=0, most=20)] = 1.0
    random_start: Share = 0.0
    data: DataSettings = DataSettings()


@settings
class LoraSettings:
    """Low-rank adapters that train in place of parameters (`config.train.lora`), see `im3d_jax.lora`.

    Attributes:
        rank: of the adapters; 0: none, and `trainable` says what trains.
        alpha: adapters are scaled by alpha / rank; 0 stands for the rank, so that the scale is 1.
        targets: a regular expression found in the paths of the kernels that get an adapter. By default those
            of attention and of feed-forward layers, under diffusers' names.
    """

    rank: Annotated[int, Range(0, 8192)] = 0
    alpha: Annotated[float, Range(0, 1e6)] = 0.0
    targets: str = r"attn\d*/|/ff(n|_in|_out)?/"

    def __post_init__(self) -> None:
        _check_pattern("targets", self.targets)


@settings
class TrainSettings:
    """A run of training (`config.train`).

    Attributes:
        task: what is trained; see `im3d_jax.tasks`.
        init_from: the weights to start from; "" starts from random ones.
        trainable: a regular expression found in the paths of the parameters that train.
        lora: adapters that train in their place.
        frozen_dtype: of parameters that do not train; bfloat16 halves their memory.
        mesh: devices along data, fsdp and tensor; -1 stands for all that are left.
        accumulate: a batch is divided into so many parts, whose gradients are computed in turn.
        num_steps, warmup_steps, decay_steps: of the run; the first ones, in which the rate rises from zero;
            the last ones, in which it falls to zero, linearly.
        learning_rate, weight_decay, clip_norm: see `training.state.OptimizerSettings`.
        ema_decay: of the average of the parameters.
        loss_weight: see `diffusion.objective.loss_weight`.
        max_skipped: so many steps may have a loss or gradient that is not finite.
        hang_timeout_s: a process that makes no step for so long ends itself; 0: never.
        num_workers: processes that make procedural objects; 0: the loader's threads make them.
        weights_dtype: of the files for `config.weights`, and of an autoencoder's; bfloat16 halves them.
        log_every: steps between lines of metrics.
        autoencoder: of the task of that name alone.
    """

    task: str = "turntable"
    init_from: str = ""
    trainable: str = EVERYTHING
    lora: LoraSettings = LoraSettings()
    frozen_dtype: FrozenDtype | str = FrozenDtype.FLOAT32
    mesh: str = "data=-1"
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    num_steps: Every = 1000
    warmup_steps: Count = 100
    decay_steps: Count = 0
    learning_rate: Annotated[float, Range(0, 10)] = 1e-4
    weight_decay: Annotated[float, Range(0, 10)] = 0.0
    clip_norm: Annotated[float, Range(above=0, most=1e12)] = 1.0
    ema_decay: Share = 0.999
    loss_weight: LossWeight | str = LossWeight.UNIFORM
    max_skipped: Count = 0
    hang_timeout_s: Seconds = 0.0
    num_workers: Workers = 0
    loader: LoaderSettings = LoaderSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    weights_dtype: WeightsDtype | str = WeightsDtype.FLOAT32
    log_every: Every = 10
    tensorboard: bool = False
    sample: SamplesSettings = SamplesSettings()
    profile: ProfileSettings = ProfileSettings()
    streams: Mapping[str, StreamSettings] = field(default_factory=dict)
    autoencoder: AutoencoderLossSettings | None = None

    def __post_init__(self) -> None:
        _check_pattern("trainable", self.trainable)
        if self.lora.rank and self.trainable != EVERYTHING:
            raise UserError(
                f"lora.rank is {self.lora.rank} and trainable is {quoted(self.trainable)}, but a LoRA trains"
                f" adapters alone; set trainable to {EVERYTHING!r}, or lora.rank to 0"
            )
        if self.lora.rank and not self.init_from:
            raise UserError(
                "lora.rank is set and init_from is '', but a LoRA adapts weights; name a file of them"
            )
