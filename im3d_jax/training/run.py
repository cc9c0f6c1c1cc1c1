"""What a run of `im3d train` depends on, what it prints at its start, and the weights that it leaves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from im3d_jax import checkpoint, sharding
from im3d_jax.lora import files as lora_files
from im3d_jax.lora.adapters import Adapters
from im3d_jax.tasks import Task
from im3d_jax.trainable import WhatTrains
from im3d_jax.training import hosts
from im3d_jax.training.state import TrainState
from im3d_jax.training_settings import TrainSettings
from recon_torch import outputs
from recon_torch.outputs import Kind

RUN = Kind(
    "train",
    (
        "checkpoints/",
        r"metrics\.jsonl",
        r"weights\.safetensors",
        "autoencoder/",
        "samples/",
        "tensorboard/",
        "profile/",
    ),
    grows=True,
)
"""What a run writes into its --workdir."""

TRAINED_BY = ("seed", "size", "clip", "backbone", "autoencoder", "text", "schedule", "train")
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
    "weights_dtype",
)
"""Keys of `config.train` that may change from one start of a run to the next."""


@contextmanager
def opened(workdir: Path, init_from: str) -> Iterator[Path]:
    """Holds the --workdir of a run, see `outputs.opened`. A run is also known by its checkpoints.

    Removes a checkpoint that was cut off.

    init_from: the weights that it starts from, if any, which it must not replace.
    """
    if any((workdir / "checkpoints").glob("*/meta")):
        outputs.claim(workdir, RUN)
    with outputs.opened(workdir, RUN, [init_from] if init_from else []):
        for half in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            print(f"im3d: removed {half}, which a run has left that was killed", file=sys.stderr)
            shutil.rmtree(half)
        yield workdir


def depends_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run depends on, by dotted key: a checkpoint is resumed only with the same.

    config: the whole config as JSON, see `config_flags.as_json`.
    """
    sections = {name: config[name] for name in TRAINED_BY if name in config}  # older ones have no clip
    sections["train"] = {key: value for key, value in config["train"].items() if key not in MAY_CHANGE}
    if config["train"]["init_from"]:
        sections["train"]["init_from"] = checkpoint.fingerprint(config["train"]["init_from"])
    return traverse_util.flatten_dict(sections, sep=".")


def describe(state: TrainState, frozen: dict[str, Array], mesh: Mesh) -> str:
    """The parameters in a table, and what this process's first device holds of them."""
    trees = {"trained": state.trained, "average": state.ema, "moments": state.opt_state, "frozen": frozen}
    held = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in trees.items()
    }
    every = traverse_util.unflatten_dict({**frozen, **state.trained}, sep="/")
    overview = parameter_overview.get_parameter_overview(every, include_stats=False, max_lines=12)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in held.items())
    return f"{overview}\nmesh {axes}; a device holds: {sizes}"


def save_weights(
    task: Task,
    settings: TrainSettings,
    workdir: Path,
    trains: WhatTrains,
    frozen: dict[str, Array],
    average: dict[str, Array],
    metadata: dict[str, Any],
) -> None:
    """Gathers what is saved on the host, one array after another, and process 0 writes it.

    That is the whole network as the task saves it, or adapters alone.
    """
    if isinstance(trains, Adapters):
        average = jax.tree.map(sharding.to_host, average)
        path = workdir / "weights.safetensors"
        if hosts.is_main():
            base, dtype = Path(settings.init_from), settings.weights_dtype
            lora_files.save(path, average, trains, base, metadata, dtype)
    else:
        params = jax.tree.map(sharding.to_host, trains.join(frozen, average))
        if hosts.is_main():
            path = task.save(workdir, params, metadata)
    if hosts.is_main():
        print(f"wrote {path}", flush=True)
    if jax.process_count() > 1:  # a process that ended first would wait for the rest only for a while
        multihost_utils.sync_global_devices("weights")
