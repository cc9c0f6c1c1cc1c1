"""`im3d train-elevation`: trains the estimator of a video's elevation (Sec. 3.3).

    im3d train-elevation --workdir=runs/elevation

Paper: trained on renders of the 100k assets. Here: on those of a data set, or on procedural objects, with
blur, noise, shifts and colour changes, because at test time the estimator sees generated views, which are
less sharp and less consistent than renders.

The estimator is PyTorch's, so it has a loop of its own. Data, progress, stops and the rules of resumption are
those of `im3d train`.
"""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from im3d_jax import config_flags, config_sections
from im3d_jax.config_kinds import ElevationConfig
from im3d_jax.data import Source, input_pipeline
from im3d_jax.data.sources import ProceduralSource, open_source
from im3d_jax.training import hosts
from im3d_jax.training.elevation import (
    WEIGHTS,
    Kept,
    errors_deg,
    make_learner,
    opened,
    restore,
    save,
    train_step,
)
from im3d_jax.training.watch import Watch, Work
from im3d_jax.training_settings import DataSettings
from recon_torch.elevation import estimator as elevation
from recon_torch.errors import CommandParser

DEFAULT_CONFIG = "configs/elevation_tiny.py"

TEST_VIEWS = 16
"""Views of a test video, as many as generators make."""

HISTOGRAM_DEG = (0, 1, 2, 3, 5, 10, 45)

MAY_CHANGE = ("num_test_objects", "loader", "checkpoint_every", "log_every", "tensorboard", "max_skipped")
"""Keys of the config that may change from one start of a run to the next."""


def train(config: ConfigDict, workdir: Path) -> tuple[elevation.ElevationEstimator, bool]:
    """Minimises the absolute error with AdamW, from where `workdir` stands.

    Returns the estimator and whether all steps are done. Raises UserError for settings that cannot be.
    """
    settings = config_sections.read(config, "config", ElevationConfig)
    learner = make_learner(
        settings.seed,
        settings.dino or None,
        settings.num_steps,
        settings.learning_rate,
        settings.weight_decay,
    )
    step = restore(workdir, learner, depends_on(config))
    source = open_split(settings, settings.data.split, settings.num_objects, settings.num_views)
    examples = open_examples(settings, source, settings.batch_size, start=step, shuffle=True)
    is_stopped = step == settings.num_steps
    with contextlib.closing(examples), hosts.StopSignal() as stop, watch(settings, workdir, step) as shown:
        while not is_stopped:
            asked = monotonic()
            videos = next(examples)
            wait_s = monotonic() - asked
            metrics = train_step(learner, videos, settings.augment, settings.seed, step)
            step += 1
            ids = [each["id"] for each in videos]
            shown.add(step, "elevation", metrics, ids, wait_s, len(examples.skipped))
            is_stopped = stop.at(step) or step == settings.num_steps
            if is_stopped or step % settings.checkpoint_every == 0:
                shown.write()
                save(workdir, step, learner, depends_on(config))
    return learner.estimator.eval(), step == settings.num_steps


def open_split(settings: ElevationConfig, split: str, count: int, num_views: int) -> Source:
    """A split of the data set of `settings.data`, or its first `count` procedural objects."""
    data = DataSettings(settings.data.path, split)
    source = open_source(data, seed=settings.seed, size=settings.size, num_views=num_views)
    return Kept(source, count) if isinstance(source, ProceduralSource) else source


def open_examples(
    settings: ElevationConfig, source: Source, batch_size: int, **order: Any
) -> input_pipeline.Stream:
    """Batches, read ahead. order: `start` and `shuffle` of `input_pipeline.open_stream`."""
    shard = input_pipeline.Shard(0, 1)
    return input_pipeline.open_stream(
        source, seed=settings.seed, batch_size=batch_size, shard=shard, **order, **vars(settings.loader)
    )


def watch(settings: ElevationConfig, workdir: Path, step: int) -> Watch:
    """Makes what shows the run, which stands at `step`."""
    work = Work(settings.batch_size, settings.batch_size * elevation.NUM_FRAMES)
    return Watch(
        workdir,
        step=step,
        num_steps=settings.num_steps,
        log_every=settings.log_every,
        work={"elevation": work},
        max_skipped=settings.max_skipped,
        tensorboard=settings.tensorboard,
    )


def depends_on(config: ConfigDict) -> dict[str, Any]:
    """What a run depends on: it goes on only with the same."""
    return {key: value for key, value in config_flags.as_json(config).items() if key not in MAY_CHANGE}


def errors_on_test_deg(
    estimator: elevation.ElevationEstimator, settings: ElevationConfig, degraded: bool
) -> Float[np.ndarray, " N"]:
    """Absolute errors on 16-view videos of the test split, as rendered or degraded as in training."""
    source = open_split(settings, settings.data.test_split, settings.num_test_objects, TEST_VIEWS)
    with contextlib.closing(open_examples(settings, source, 1, start=0, shuffle=False)) as batches:
        number = min(settings.num_test_objects, len(source))
        videos = (video for (video,) in islice(batches, number))
        amounts = settings.augment if degraded else None
        return errors_deg(estimator, videos, amounts, settings.seed)


def describe(errors_deg: Float[np.ndarray, " N"]) -> str:
    """Median, mean and histogram of the errors."""
    counts, edges = np.histogram(errors_deg, HISTOGRAM_DEG)
    bins = ", ".join(f"{a:g}-{b:g}: {n}" for a, b, n in zip(edges, edges[1:], counts, strict=False))
    return f"median error {np.median(errors_deg):.2f} deg, mean {errors_deg.mean():.2f}; histogram {bins}"


def main(argv: list[str]) -> None:
    parser = CommandParser("train-elevation", __doc__)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="directory for the checkpoint, weights and metrics"
    )
    flags, config = config_flags.parse(argv, parser, DEFAULT_CONFIG, ElevationConfig)
    settings = config_sections.read(config, "config", ElevationConfig)
    with opened(flags.workdir):
        estimator, is_done = train(config, flags.workdir)
        if not is_done:
            raise SystemExit(hosts.EXIT_REQUEUE)
        elevation.save(estimator, flags.workdir / WEIGHTS)
        print(f"wrote {flags.workdir / WEIGHTS}")
    for degraded in (False, True):
        errors = errors_on_test_deg(estimator, settings, degraded)
        print(("degraded " if degraded else "true ") + "views: " + describe(errors))
