"""One step of training: gradients, in as many parts as memory asks for, and the update."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from im3d_jax import sharding
from im3d_jax.tasks import Trainable
from im3d_jax.trainable import WhatTrains
from im3d_jax.training.state import TrainState

Metrics = dict[str, Array]
"""Scalars, and arrays with a number for each noise level."""

LossOf = Callable[[dict[str, Array], tuple[PyTree, PyTree]], tuple[Array, dict[str, Array]]]
"""(loss, sums) of trained parameters and a part: its batch and its draws."""


Step = Callable[..., tuple[TrainState, Metrics]]
"""step(state, frozen, constants, batch, stream) -> (new state, metrics)"""


def make_step(
    task: Trainable,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    trains: WhatTrains,
    where: TrainState,
    rate: optax.Schedule,
    accumulate: int,
    ema_decay: float,
) -> Step:
    """Makes the function that does one step of training, which is compiled once for each stream.

    The state is donated. A step whose loss or gradient is not finite changes nothing but the counters, so
    that what is saved stays sound. The metrics are `loss`, `grad_norm`, `learning_rate`, `is_finite` and what
    the task adds up: sums for names that end in "_by_level", and means over examples for the others.

    Args:
        trains: what trains, which the state and the frozen parameters were divided by.
        where: the sharding of each array of the state, which stays.
        rate: the optimiser's learning rate, by the number of its steps, for the metrics alone.
        accumulate: parts of a batch whose gradients are computed one after another. Each part has examples of
            every device, and what is random of an example does not depend on the part.
        ema_decay: of the average of the trained parameters.
    """

    def step(
        state: TrainState, frozen: dict[str, Array], constants: PyTree, batch: PyTree, stream: Hashable
    ) -> tuple[TrainState, Metrics]:
        num_examples = jax.tree.leaves(batch)[0].shape[0]
        draws = task.draw(jax.random.fold_in(state.key, state.step), num_examples, stream)

        def loss_of(trained: dict[str, Array], part: tuple[PyTree, PyTree]):
            return trains.call(lambda params: task.loss(params, constants, *part, stream), frozen, trained)

        parts = jax.tree.map(lambda array: _in_parts(array, accumulate, mesh), (batch, draws))
        loss, sums, grads = _mean_gradient(loss_of, state.trained, parts, accumulate)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        changed = _update(state, grads, optimizer, ema_decay)
        trained, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old), changed, _changing(state)
        )
        skipped = state.skipped + (1 - is_finite.astype(jnp.int32))
        metrics = {"loss": loss, "grad_norm": grad_norm, "is_finite": is_finite}
        metrics["learning_rate"] = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
        metrics |= {name: _shown(name, total, num_examples) for name, total in sums.items()}
        return TrainState(state.step + 1, state.key, trained, ema, opt_state, skipped), metrics

    # Left to itself, XLA may place the new state elsewhere than the old, and the next step compiles again.
    places = where, sharding.replicated(mesh)
    return jax.jit(step, static_argnames="stream", donate_argnames="state", out_shardings=places)


def _shown(name: str, total: Array, num_examples: int) -> Array:
    return total if name.endswith("_by_level") else total / num_examples


def _in_parts(array: Shaped[Array, "B ..."], count: int, mesh: Mesh) -> Shaped[Array, "{count} _ ..."]:
    """[B, ...] -> [count, B / count, ...], with each part over all devices, so that no example moves."""
    parts = array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
    rest = sharding.along_batch(mesh).spec
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *rest))
    return jax.lax.with_sharding_constraint(parts, where)


def _mean_gradient(
    loss_of: LossOf, trained: dict[str, Array], parts: PyTree, count: int
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Array]]:
    """(mean loss, sums over examples, mean gradients) over `count` parts, one after another."""
    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def one(part: tuple[PyTree, PyTree]):
        (loss, sums), grads = gradient(trained, part)
        return (loss / count, jax.tree.map(lambda g: g / count, grads)), sums

    if count == 1:
        means, sums = one(jax.tree.map(lambda array: array[0], parts))
    else:
        zeros = jax.tree.map(
            lambda each: jnp.zeros(each.shape, each.dtype),
            jax.eval_shape(one, jax.tree.map(lambda array: array[0], parts)),
        )
        (means, sums), _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None), zeros, parts
        )
    loss, grads = means
    return loss, sums, grads


def _changing(state: TrainState) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
    return state.trained, state.ema, state.opt_state


def _update(
    state: TrainState, grads: dict[str, Array], optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
    """The new (trained, ema, opt_state)."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    # Early on the average follows closely, so that short runs are not dominated by their start.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda old, new: old * decay + new * (1 - decay), state.ema, trained)
    return trained, ema, opt_state
