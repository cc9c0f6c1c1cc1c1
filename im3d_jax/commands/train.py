"""`im3d train`: one loop for all that is trained in JAX (Sec. 3.1, A.1). Reads downwards.

    im3d train --config=configs/tiny_text_to_image.py --workdir=runs/t2i
    im3d train --config=configs/tiny_turntable.py --workdir=runs/turntable --config.train.trainable=temporal
    im3d train --config=configs/finetune_turntable_512.py --workdir=runs/512 --cluster slurm

What is trained is a task (`im3d_jax.tasks`), the parts of the loop are `im3d_jax.training`. A run goes on in
its --workdir as if it had never stopped. SIGTERM, SIGUSR1 and Ctrl-C save and end it with exit code 75.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax
from clu import parameter_overview
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from im3d_jax import checkpoint, config_flags, sharding, tasks
from im3d_jax.data import pipeline, sources, workers
from im3d_jax.training import feed, hosts
from im3d_jax.training.state import TrainState, create, join, learning_rate, make_optimizer
from im3d_jax.training.step import make_step
from im3d_jax.training.watch import Watch, Work, peak_flops
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory

TRAINED_BY = ("seed", "size", "backbone", "autoencoder", "text", "schedule", "train")
"""Sections of the config that a run depends on: it cannot go on with others."""

MAY_CHANGE = (
    "num_steps",
    "decay_steps",
    "mesh",
    "accumulate",
    "max_skipped",
    "hang_timeout_s",
    "loader",
    "num_workers",
    "checkpoint",
    "log_every",
    "tensorboard",
    "sample",
    "profile",
)
"""Keys of `config.train` that may change from one start of a run to the next."""


def train(config, workdir: Path) -> tuple[TrainState, bool]:
    """Trains until `config.train.num_steps`, or until asked to stop; goes on where `workdir` stands.

    Returns the state and whether all steps are done.
    """
    settings = config.train

    # ---- Task and mesh ----
    mesh = sharding.make_mesh(sharding.parse_mesh(settings.mesh, jax.device_count()))
    check_streams(settings, mesh)
    task = tasks.build(config, mesh)

    # ---- State ----
    optimizer = make_optimizer(settings)
    state, frozen = create(
        task.init,
        task.load(settings.init_from) if settings.init_from else None,
        task.partition_rules,
        mesh,
        optimizer,
        trainable=settings.trainable,
        frozen_dtype=settings.frozen_dtype,
        key=jax.random.key(config.seed),
    )
    if hosts.is_main():
        print(describe(state, frozen, mesh))
    train_step = make_step(
        task,
        optimizer,
        mesh,
        where=jax.tree.map(lambda array: array.sharding, state),
        rate=learning_rate(settings),
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
    )

    with (
        checkpoint.Checkpoints(
            workdir, settings.checkpoint.keep, settings.checkpoint.keep_every
        ) as checkpoints,
        hosts.StopSignal() as stop,
        hosts.Watchdog(settings.hang_timeout_s) as watchdog,
        workers.Workers(settings.num_workers, ignored=hosts.STOP_SIGNALS) as processes,
        contextlib.ExitStack() as opened,
    ):
        # ---- Where the run stands ----
        depends_on = run_settings(config)
        restored = checkpoints.restore(state, depends_on)
        state, meta = restored or (state, {"batches": dict.fromkeys(settings.streams, 0), "skipped": []})
        step, batches, skipped = int(state.step), meta["batches"], meta["skipped"]

        # ---- Data ----
        streams = {
            name: open_stream(config, name, mesh, batches[name], processes.run) for name in settings.streams
        }
        for stream in streams.values():
            opened.callback(stream.close)

        def read(name: str) -> feed.Batch:
            examples = next(streams[name])
            arrays = feed.over_mesh(task.collate(examples), mesh)
            met = skipped + [record for each in streams.values() for record in each.skipped]
            return feed.Batch(name, arrays, [example["id"] for example in examples], list(dict.fromkeys(met)))

        # ---- Steps ----
        order = (stream_of(settings.streams, s) for s in range(step, settings.num_steps))
        is_stopped = step >= settings.num_steps
        with feed.Feed(order, read) as ready, watch(config, workdir, task, state, mesh) as shown:
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
                if is_stopped or step % settings.checkpoint.every == 0:
                    shown.write()  # waits for the step, and raises if it is not finite
                    # A copy of what goes on counting: the checkpoint is written while the loop runs.
                    meta = {"settings": depends_on, "batches": dict(batches), "skipped": batch.skipped}
                    checkpoints.save(step, state, meta | {"config": config_flags.as_json(config)})
                if is_due(settings.sample.every, step):
                    params = join(frozen, state.ema)
                    for name, frames in task.sample(params, jax.random.key(config.seed + 1)).items():
                        shown.video(step, name, frames)
                if is_done or is_due(settings.checkpoint.weights_every, step):
                    metadata = {"step": step, "config_digest": config_flags.config_digest(config)}
                    save_weights(task, workdir, join(frozen, state.ema), metadata)
                watchdog.beat(step)
    return state, step == settings.num_steps


def watch(config, workdir: Path, task, state: TrainState, mesh: Mesh) -> Watch:
    """What shows a run that stands at `state`."""
    settings = config.train
    peak = peak_flops(jax.devices()[0].device_kind)
    work = {
        name: Work(
            examples=stream.batch_size,
            frames=stream.batch_size * stream.num_views,
            flops=task.flops(settings.trainable, name) if peak else 0.0,
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


def open_stream(
    config, name: str, mesh: Mesh, start: int, run: workers.Run = workers.run_here
) -> pipeline.Stream:
    """This process's part of a stream's batches, from batch `start` on. run: see `workers`."""
    stream = config.train.streams[name]
    source = sources.open_source(
        **stream.data, seed=config.seed, size=config.size, num_views=stream.num_views, run=run
    )
    return pipeline.open_stream(
        source,
        seed=config.seed,
        batch_size=stream.batch_size,
        shard=pipeline.Shard(*sharding.rows_of_process(mesh)),
        start=start,
        shuffle=bool(stream.data.path),
        **config.train.loader,
    )


def save_weights(task, workdir: Path, params, metadata: dict) -> None:
    """Gathers the parameters on the host, one after another, and process 0 writes them."""
    params = jax.tree.map(sharding.to_host, params)
    if hosts.is_main():
        print(f"wrote {task.save(workdir, params, metadata)}", flush=True)
    if jax.process_count() > 1:  # who ended first would wait for the rest only for a while
        multihost_utils.sync_global_devices("weights")


def describe(state: TrainState, frozen, mesh: Mesh) -> str:
    """The parameters, and what this process's first device holds of them."""
    trees = {"trained": state.trained, "average": state.ema, "moments": state.opt_state, "frozen": frozen}
    held = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in trees.items()
    }
    overview = parameter_overview.get_parameter_overview(
        join(frozen, state.trained), include_stats=False, max_lines=12
    )
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in held.items())
    return f"{overview}\nmesh {axes}; a device holds: {sizes}"


def run_settings(config) -> dict:
    """What a run depends on, by dotted key: a checkpoint is only resumed with the same."""
    config = config_flags.as_json(config)
    sections = {name: config[name] for name in TRAINED_BY}
    sections["train"] = {key: value for key, value in config["train"].items() if key not in MAY_CHANGE}
    if config["train"]["init_from"]:
        sections["train"]["init_from"] = checkpoint.fingerprint(config["train"]["init_from"])
    return traverse_util.flatten_dict(sections, sep=".")


def check_streams(settings, mesh: Mesh) -> None:
    """Raises UserError for batches that do not divide, and where a step would have none."""
    streams, shares = settings.streams, sharding.batch_shares(mesh) * settings.accumulate
    for name, stream in streams.items():
        if stream.batch_size % shares:
            key = f"config.train.streams.{name}.batch_size"
            parts = f"{sharding.batch_shares(mesh)} devices x {settings.accumulate} accumulated"
            raise UserError(f"{key} is {stream.batch_size}; give a multiple of {parts} parts")
    if all(stream.every > 1 for stream in streams.values()):
        raise UserError("config.train.streams: some steps have no stream; set `every` of one to 1")


def stream_of(streams, step: int) -> str:
    """The stream of a step: of those whose turn it is, the one that comes round least often."""
    due = [name for name, stream in streams.items() if step % stream.every == stream.every - 1]
    return max(due, key=lambda name: streams[name].every)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens each `every` steps, 0 for never, does after `step`."""
    return every > 0 and step % every == 0


def main(argv: list[str]) -> None:
    parser = CommandParser("train", __doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of checkpoints, weights and metrics")
    hosts.add_flags(parser)
    flags, config = config_flags.parse(argv, parser)
    if "train" not in config:
        raise UserError(f"{flags.config} has no `train` section; give configs/tiny_text_to_image.py")
    hosts.initialize(flags)
    hosts.agree({"config": config_flags.config_digest(config), **hosts.versions()})
    make_directory(flags.workdir)
    _, is_done = train(config, flags.workdir)
    if not is_done:
        raise SystemExit(hosts.EXIT_REQUEUE)
