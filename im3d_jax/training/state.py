"""What training changes, and what it leaves alone: parameters divided in two, the optimiser, the average.

Only what trains costs: a frozen parameter has no gradient, no moments and no average, and may be bfloat16
(Sec. 3.1: the temporal layers train, the spatial ones stay).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from im3d_jax import sharding
from recon_torch.errors import UserError


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds. `trained` and `ema` are float32, by path.

    skipped: steps whose loss or gradient was not finite, so that they changed nothing else.
    """

    step: jax.Array
    key: jax.Array
    trained: dict[str, jax.Array]
    ema: dict[str, jax.Array]
    opt_state: Any
    skipped: jax.Array


def join(frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
    """The parameters as the network takes them."""
    return traverse_util.unflatten_dict({**frozen, **trained}, sep="/")


def split_params(params, pattern: str) -> tuple[dict, dict]:
    """(trained, frozen) parameters by path, divided by a regex. Raises UserError if it matches none."""
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {path: value for path, value in flat.items() if re.search(pattern, path)}
    if not trained:
        raise UserError(f"config.train.trainable: {pattern!r} matches none of the {len(flat)} parameters")
    return trained, {path: value for path, value in flat.items() if path not in trained}


def learning_rate(settings) -> optax.Schedule:
    """Warm-up, constant rate, and a linear decay over the last `decay_steps`."""
    warmup, decay = settings.warmup_steps, settings.decay_steps
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, decay),
        ],
        [warmup, max(warmup, settings.num_steps - decay)],
    )


def make_optimizer(settings) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(learning_rate(settings), b1=0.9, b2=0.99, weight_decay=settings.weight_decay),
    )


def create(
    init: Callable,
    loaded: Mapping | None,
    rules: sharding.PartitionRules,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str,
    frozen_dtype: str,
    key: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state, frozen parameters), each array made where it lives: no device ever holds the whole.

    Args:
        init: of the backbone, key -> parameters. loaded: parameters on the host to start from instead.
        rules: the backbone's `partition_rules`. trainable: regex of the paths that train.
        frozen_dtype: of those that do not. key: the root of all that is random, also of `init`.

    Raises UserError if `trainable` matches nothing.
    """
    shapes = split_params(jax.eval_shape(init, key), trainable)
    places = sharding.of_tree(shapes, rules, mesh)
    dtypes = jnp.float32, jnp.dtype(frozen_dtype)
    if loaded is None:

        def make(key):
            return _cast(split_params(init(key), trainable), dtypes)

        trained, frozen = jax.jit(make, out_shardings=places)(key)
    else:
        trained, frozen = (
            {path: sharding.place(np.asarray(value), where[path], dtype) for path, value in part.items()}
            for part, where, dtype in zip(split_params(loaded, trainable), places, dtypes, strict=True)
        )
    start = partial(_start, optimizer=optimizer)
    where = sharding.of_tree(jax.eval_shape(start, trained, key), rules, mesh)
    return jax.jit(start, out_shardings=where)(trained, key), frozen


def _start(trained, key, *, optimizer) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, trained)
    return TrainState(zero, key, trained, ema, optimizer.init(trained), zero)


def _cast(parts, dtypes):
    return tuple(
        {path: value.astype(dtype) for path, value in part.items()}
        for part, dtype in zip(parts, dtypes, strict=True)
    )
