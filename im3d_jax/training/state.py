"""The state of training: the parameters that train, their optimiser and their average; the frozen ones apart.

A frozen parameter costs neither a gradient nor moments nor an average, and may be bfloat16 (Sec. 3.1: the
temporal layers train, the spatial ones stay). With a LoRA all parameters are frozen, and its adapters train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from im3d_jax import sharding
from im3d_jax.params import cast
from im3d_jax.trainable import WhatTrains


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds.

    Attributes:
        step: how many steps are done.
        key: the root of all that is random in training.
        trained: the parameters that train, float32, by path.
        ema: their exponential moving average.
        opt_state: of the optimiser.
        skipped: how many steps were not finite, so that they changed nothing else.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    trained: dict[str, Float[Array, "..."]]
    ema: dict[str, Float[Array, "..."]]
    opt_state: PyTree
    skipped: Int[Array, ""]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate over a run.

    Attributes:
        learning_rate: the constant rate between warm-up and decay.
        num_steps: of the run.
        warmup_steps: steps over which the rate rises from 0.
        decay_steps: last steps, over which the rate falls to 0.
        weight_decay: of AdamW.
        clip_norm: gradients of a larger global norm are scaled down to it.
    """

    learning_rate: float
    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    @classmethod
    def of(cls, section: Any) -> OptimizerSettings:
        """Takes them out of a config's section `train`, or its `TrainSettings`, which have more."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """The rate at each step: a linear warm-up, the constant rate, and a linear decay to 0."""
    warmup, decay = settings.warmup_steps, settings.decay_steps
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, decay),
        ],
        [warmup, max(warmup, settings.num_steps - decay)],
    )


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(learning_rate(settings), b1=0.9, b2=0.99, weight_decay=settings.weight_decay),
    )


def create(
    init: Callable[[PRNGKeyArray], dict],
    loaded: Mapping[str, Any] | None,
    rules: sharding.PartitionRules,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    *,
    trains: WhatTrains,
    frozen_dtype: str,
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """(state, frozen parameters), each array made where it lives: no device ever holds the whole.

    Args:
        init: of the task.
        loaded: parameters on the host to start from; None starts from those of `init`.
        rules: the task's `partition_rules`.
        trains: what trains.
        frozen_dtype: of the parameters that do not.
        key: the root of all that is random, also of `init`.

    Raises UserError if nothing trains, and for a loaded parameter that its type does not hold.
    """
    shapes = jax.eval_shape(lambda key: trains.split(init(key), key), key)
    rules = trains.rules(shapes[0], rules)
    places = sharding.of_tree(shapes, rules, mesh)
    dtypes = jnp.float32, jnp.dtype(frozen_dtype)
    if loaded is None:

        def make(key: PRNGKeyArray):
            return _cast(trains.split(init(key), key), dtypes)

        trained, frozen = jax.jit(make, out_shardings=places)(key)
    else:
        trained, frozen = (
            {
                path: sharding.place(cast(value, dtype, f"parameter {path}"), where[path], dtype)
                for path, value in part.items()
            }
            for part, where, dtype in zip(trains.split(loaded, key), places, dtypes, strict=True)
        )
    start = partial(_start, optimizer=optimizer)
    where = sharding.of_tree(jax.eval_shape(start, trained, key), rules, mesh)
    return jax.jit(start, out_shardings=where)(trained, key), frozen


def _start(
    trained: dict[str, Array], key: PRNGKeyArray, *, optimizer: optax.GradientTransformation
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, trained)
    return TrainState(zero, key, trained, ema, optimizer.init(trained), zero)


def _cast(parts: tuple[dict[str, Array], ...], dtypes: tuple) -> tuple[dict[str, Array], ...]:
    return tuple(
        {path: value.astype(dtype) for path, value in part.items()}
        for part, dtype in zip(parts, dtypes, strict=True)
    )
