"""`im3d train`: one loop for all that is trained in JAX (Sec. 3.1, A.1).

    im3d train --config=configs/tiny_text_to_image.py --workdir=runs/t2i
    im3d train --config=configs/tiny_turntable.py --workdir=runs/turntable --config.train.trainable=temporal
    im3d train --config=configs/tiny_turntable.py --workdir=runs/lora --config.train.lora.rank=8
    im3d train --config=configs/finetune_turntable_512.py --workdir=runs/512 --cluster slurm

A task (`im3d_jax.tasks`) says what is trained; the parts of the loop are in `im3d_jax.training`. Given the
same --workdir, a run goes on as if it had never stopped. SIGTERM, SIGUSR1 and Ctrl-C save and end it with
exit code 75.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray
from ml_collections import ConfigDict

from im3d_jax import checkpoint, config_flags, config_sections, sharding, tasks, threads, trainable
from im3d_jax.data import workers
from im3d_jax.tasks import Task
from im3d_jax.trainable import WhatTrains
from im3d_jax.training import feed, hosts, run
from im3d_jax.training.state import OptimizerSettings, TrainState, create, learning_rate, make_optimizer
from im3d_jax.training.step import Step, make_step
from im3d_jax.training.streams import check, is_due, open_stream, stream_of
from im3d_jax.training.watch import Watch, Work, peak_flops
from im3d_jax.training_settings import TrainSettings
from recon_torch.errors import CommandParser, UserError


def train(config: ConfigDict, workdir: Path) -> tuple[TrainState, bool]:
    """Trains until `config.train.num_steps`, or until asked to stop, from where `workdir` stands.

    Returns the state and whether all steps are done.
    """
    settings = config_sections.settings(config, "train", TrainSettings)
    streams = settings.streams

    mesh = sharding.make_mesh(sharding.parse_mesh(settings.mesh, jax.device_count()))
    check(streams, settings.accumulate, mesh)
    task, trains = tasks.build(config, mesh), trainable.chosen(settings)
    state, frozen, train_step = begin(settings, trains, task, mesh, jax.random.key(config.seed))
    if hosts.is_main():
        print(run.describe(state, frozen, mesh))

    kept = settings.checkpoint
    with (
        checkpoint.Checkpoints(workdir, kept.keep, kept.keep_every) as checkpoints,
        hosts.StopSignal() as stop,
        hosts.Watchdog(settings.hang_timeout_s) as watchdog,
        workers.Workers(settings.num_workers, ignored=hosts.STOP_SIGNALS) as processes,
        contextlib.ExitStack() as opened,
    ):
        # ---- Where the run stands ----
        depends_on = run.depends_on(config_flags.as_json(config))
        restored = checkpoints.restore(state, depends_on)
        state, meta = restored or (state, {"batches": dict.fromkeys(streams, 0), "skipped": []})
        step, batches, skipped = int(state.step), meta["batches"], meta["skipped"]

        # ---- Data ----
        reading = dict(seed=config.seed, size=config.size, run=processes.run, **vars(settings.loader))
        readers = {
            name: opened.enter_context(
                contextlib.closing(open_stream(stream, mesh, start=batches[name], **reading))
            )
            for name, stream in streams.items()
        }

        def read(name: str) -> feed.Batch:
            examples = next(readers[name])
            arrays = feed.over_mesh(task.collate(examples), mesh)
            met = skipped + [record for each in readers.values() for record in each.skipped]
            return feed.Batch(name, arrays, [example["id"] for example in examples], list(dict.fromkeys(met)))

        # ---- Steps ----
        order = (stream_of(streams, s) for s in range(step, settings.num_steps))
        is_stopped = step >= settings.num_steps
        with feed.Feed(order, read) as ready, watch(settings, trains, workdir, task, state, mesh) as shown:
            while not is_stopped:
                batch, wait_s = next(ready)
                stream = task.stream(batch.stream)
                state, metrics = train_step(state, frozen, task.constants, batch.arrays, stream)
                step += 1
                batches[batch.stream] += 1
                shown.add(step, batch.stream, metrics, batch.ids, wait_s, len(batch.skipped))
                watchdog.beat(step)
                is_done = step == settings.num_steps
                is_stopped = stop.at(step) or is_done

                # ---- What is kept and looked at ----
                if is_stopped or step % kept.every == 0:
                    shown.write()  # waits for the step, and raises if it is not finite
                    # A copy of the counts, because the checkpoint is written while the loop goes on.
                    meta = {"settings": depends_on, "batches": dict(batches), "skipped": batch.skipped}
                    checkpoints.save(step, state, meta | {"config": config_flags.as_json(config)})
                if is_due(settings.sample.every, step):
                    params = trains.join(frozen, state.ema)
                    for name, frames in task.sample(params, jax.random.key(config.seed + 1)).items():
                        shown.video(step, name, frames)
                if is_done or is_due(kept.weights_every, step):
                    metadata = {"step": step, "config_digest": config_flags.config_digest(config)}
                    run.save_weights(task, settings, workdir, trains, frozen, state.ema, metadata)
                watchdog.beat(step)
    return state, step == settings.num_steps


def begin(
    settings: TrainSettings, trains: WhatTrains, task: Task, mesh: Mesh, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array], Step]:
    """The state before the first step, the frozen parameters, and the step.

    key: the root of all that is random.
    """
    rates = OptimizerSettings.of(settings)
    optimizer = make_optimizer(rates)
    state, frozen = create(
        task.init,
        task.load(settings.init_from) if settings.init_from else None,
        task.partition_rules,
        mesh,
        optimizer,
        trains=trains,
        frozen_dtype=settings.frozen_dtype,
        key=key,
    )
    train_step = make_step(
        task,
        optimizer,
        mesh,
        trains=trains,
        where=jax.tree.map(lambda array: array.sharding, state),
        rate=learning_rate(rates),
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
    )
    return state, frozen, train_step


def watch(
    settings: TrainSettings, trains: WhatTrains, workdir: Path, task: Task, state: TrainState, mesh: Mesh
) -> Watch:
    """Makes what shows the run, which stands at `state`."""
    peak = peak_flops(jax.devices()[0].device_kind)
    work = {
        name: Work(
            examples=stream.batch_size,
            frames=stream.batch_size * stream.num_views,
            flops=task.flops(trains, stream.batch_size, stream.num_views) if peak else 0.0,
        )
        for name, stream in settings.streams.items()
    }
    return Watch(
        workdir,
        step=int(state.step),
        num_steps=settings.num_steps,
        log_every=settings.log_every,
        work=work,
        max_skipped=settings.max_skipped,
        skipped_steps=int(state.skipped),
        tensorboard=settings.tensorboard,
        peak_flops=peak and peak * mesh.size,
        profile=(settings.profile.at_step, settings.profile.num_steps),
        is_main=hosts.is_main(),
    )


def main(argv: list[str]) -> None:
    parser = CommandParser("train", __doc__)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="directory for checkpoints, weights and metrics"
    )
    hosts.add_flags(parser)
    flags, config = config_flags.parse(argv, parser)
    if "train" not in config:
        raise UserError(f"{flags.config} has no `train` section; give configs/tiny_text_to_image.py")
    if config.get("lora"):
        raise UserError(
            "config.lora adapts weights to generate with, and training would pass over it; merge it into the"
            " weights (im3d convert --merge-lora), and name those in config.train.init_from"
        )
    threads.limit(config.get("num_threads", 0))
    hosts.initialize(flags)
    hosts.agree({**config_flags.facts(config), **hosts.versions()})
    with hosts.on_main(partial(run.opened, flags.workdir, config.train.init_from)):
        _, is_done = train(config, flags.workdir)
    if not is_done:
        raise SystemExit(hosts.EXIT_REQUEUE)
