"""What generating an asset and a step of training cost: FLOPs, bytes and seconds, from shapes alone.

Nothing is allocated or computed. FLOPs are those of convolutions and matrix products in the traced program,
as `costs` counts them; they leave out the autoencoder, the text encoders and the fit. Seconds assume a share
of the accelerator's peak, and no time for communication.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from im3d_jax import backbones, costs, sharding
from im3d_jax.backbones import Backbone, Params
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.costs import Accelerator
from im3d_jax.params import split_params
from im3d_jax.trainable import WhatTrains
from recon_torch.errors import UserError


class Sampling(NamedTuple):
    """How often the network is called for one asset.

    calls: number of denoising steps.
    evaluations: guidance evaluates the network on so many conditions in each call.
    frames: of latents in one evaluation; 1 for an image.
    """

    calls: int
    evaluations: int
    frames: int


class Training(NamedTuple):
    """One stream of batches of `batch_size` assets of `num_frames` latents, and what trains on it.

    trains: what trains. frozen_dtype: of the parameters that do not.
    accumulate: parts of the batch whose gradients are computed one after another.
    """

    batch_size: int
    num_frames: int
    trains: WhatTrains
    frozen_dtype: str
    accumulate: int = 1


def count_parameters(params: Params, temporal_pattern: str) -> dict[str, int]:
    """Numbers of parameters: in all, temporal (those that Sec. 3.1 trains) and spatial (all others)."""
    temporal, spatial = split_params(params, temporal_pattern) if temporal_pattern else ({}, params)
    counts = {"spatial": _num_values(spatial), "temporal": _num_values(temporal)}
    return {"total": sum(counts.values()), **counts}


def plan_generation(
    model: Backbone,
    params: Params,
    networks: Mapping[str, Sampling],
    device: Accelerator,
    utilisation: float,
) -> dict[str, Any]:
    """One asset on one device (Sec. 3.4).

    A call takes the time of its arithmetic, or the time to read all weights from memory once if that is
    longer.

    Args:
        params: shapes of the parameters.
        networks: what is sampled, by name. The largest comes last: its activations are counted.
        utilisation: the share of the device's peak FLOP/s that is assumed.
    """
    weights = _num_bytes(params)
    numbers: dict[str, Any] = {"weights_bytes": weights, "asset": {"flops": 0, "seconds": 0.0}}
    for name, (calls, evaluations, frames) in networks.items():
        program = costs.trace(model.apply, params, *network_inputs(model, evaluations, frames))
        per_call = costs.count_flops(program)
        seconds = max(per_call / (device.flops * utilisation), weights / device.bandwidth)
        numbers[name] = {
            "calls": calls,
            "evaluations_per_call": evaluations,
            "flops_per_call": per_call,
            "seconds_per_call": seconds,
        }
        numbers["asset"]["flops"] += calls * per_call
        numbers["asset"]["seconds"] += calls * seconds
    numbers["activation_bytes"] = costs.peak_bytes(program)
    numbers["device_bytes"] = weights + numbers["activation_bytes"]
    return numbers | {"fits": numbers["device_bytes"] <= device.memory}


def plan_training(
    model: Backbone,
    params: Params,
    training: Training,
    optimizer: optax.GradientTransformation,
    mesh: Mapping[str, int],
    device: Accelerator,
    utilisation: float,
) -> dict[str, Any]:
    """One step of training, and what each device holds of it.

    Args:
        params: shapes of the parameters.
        mesh: devices along each of `sharding.AXES`.
        utilisation: the share of the device's peak FLOP/s that is assumed.

    Raises UserError if the batch does not divide over the mesh, or if nothing is trainable.
    """
    trains = training.trains
    trained, frozen = jax.eval_shape(trains.split, params, jax.random.key(0))
    shares, parts = mesh["data"] * mesh["fsdp"], training.accumulate
    part, left_over = divmod(training.batch_size, shares * parts)
    if left_over:
        divided = f"{shares}, and config.train.accumulate by {parts}" if parts > 1 else str(shares)
        number = training.batch_size
        raise UserError(f"--mesh divides the batch by {divided}; config.train's {number} does not divide")
    arguments = trained, frozen, *network_inputs(model, part, training.num_frames)
    program = costs.trace(jax.value_and_grad(partial(_loss, model, trains)), *arguments)
    rules = trains.rules(trained, model.partition_rules)
    held = partial(sharding.bytes_per_device, rules=rules, sizes=mesh)
    numbers = {
        "weights": held(trained) + held(_in_dtype(frozen, training.frozen_dtype)),
        # With several parts, their sum and the gradients of the present one.
        "gradients": held(trained) * min(parts, 2),
        "optimizer": held(jax.eval_shape(optimizer.init, trained)),
        "ema": held(trained),
        "activations": costs.peak_bytes(program),
    }
    device_bytes = sum(numbers.values())
    flops = costs.count_flops(program) * parts
    return {
        "batch": training.batch_size,
        "batch_per_device": part * parts,
        "accumulate": parts,
        "trained_parameters": _num_values(trained),
        "flops_per_step": flops * shares,
        # What is divided along `tensor` divides the arithmetic, too.
        "seconds_per_step": flops / mesh["tensor"] / (device.flops * utilisation),
        "bytes_per_device": numbers,
        "bytes_kept_for_backward": _kept_bytes(model, trains, arguments),
        "remat": getattr(model, "remat", ""),
        "device_bytes": device_bytes,
        "fits": device_bytes <= device.memory,
    }


def _kept_bytes(model: Backbone, trains: WhatTrains, arguments: tuple[PyTree, ...]) -> dict[str, int]:
    """Bytes that the forward pass of training keeps for the backward pass, under each policy of remat."""
    variants = _remat_variants(model).items()
    return {
        policy: costs.kept_bytes(partial(_loss, variant, trains), *arguments) for policy, variant in variants
    }


def network_inputs(
    model: Backbone, batch: int, num_frames: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
    """The shapes of (noisy, timestep, conditioning) for `model.apply`."""
    noisy = jax.ShapeDtypeStruct((batch, num_frames, *model.latent_shape), jnp.float32)
    timestep = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return noisy, timestep, jax.eval_shape(partial(model.empty_conditioning, batch))


def _loss(
    model: Backbone,
    trains: WhatTrains,
    trained: dict[str, Array],
    frozen: dict[str, Array],
    noisy: Float[Array, "B K h w c"],
    timestep: Float[Array, " B"],
    conditioning: Conditioning,
) -> Float[Array, ""]:
    """Stands for the loss of training, whose own arithmetic is negligible beside that of the network."""
    prediction = trains.call(
        lambda params: model.apply(params, noisy, timestep, conditioning), frozen, trained
    )
    return jnp.mean(jnp.square(prediction - noisy))


def _remat_variants(model: Backbone) -> dict[str, Backbone]:
    """The model without recomputation, with its own policy of recomputation, and with the most of it."""
    if not hasattr(model, "remat"):
        return {"": model}
    policies = dict.fromkeys(("", model.remat, "nothing_saveable"))
    return {policy: backbones.with_remat(model, policy) for policy in policies}


def _in_dtype(shapes: PyTree, dtype: str) -> PyTree:
    """The same arrays in another precision."""
    return jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, jnp.dtype(dtype)), shapes)


def _num_values(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
