"""`im3d plan`: what a config costs, without allocating it: parameters, FLOPs, bytes per device, seconds.

    im3d plan --config=configs/paper_512.py --mesh data=80 --accelerator a100
    im3d plan --config=configs/paper_512.py --mesh data=8,fsdp=8 --accelerator h200 --json plan.json

Everything is traced with shapes alone. FLOPs are those of convolutions and matrix products in the traced
program, 2 for each multiplication, whatever a compiler makes of it; XLA's own count of the lowered program
has the elementwise arithmetic as well, and counts the body of a loop once. They leave out the autoencoder,
the text encoders and the fit. Seconds assume a share of the accelerator's peak, or that all weights are read
once from memory if that takes longer, and no time for communication.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from im3d_jax import backbones, config_flags, sampler, sharding, train
from recon_torch import export
from recon_torch.errors import CommandParser, UserError

GB = 1e9


class Accelerator(NamedTuple):
    """One device: dense bfloat16 FLOP/s, bytes/s and bytes of its memory, and who says so."""

    flops: float
    bandwidth: float
    memory: float
    source: str


ACCELERATORS = {
    "a100": Accelerator(312e12, 2.039e12, 80 * GB, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Accelerator(989e12, 3.35e12, 80 * GB, "NVIDIA H100 SXM datasheet, without sparsity"),
    "h200": Accelerator(989e12, 4.8e12, 141 * GB, "NVIDIA H200 SXM datasheet, without sparsity"),
    "b200": Accelerator(2250e12, 7.7e12, 180 * GB, "NVIDIA HGX B200 datasheet, without sparsity"),
    "tpu_v4": Accelerator(275e12, 1.2e12, 32 * GB, "cloud.google.com/tpu/docs/v4"),
    "tpu_v5e": Accelerator(197e12, 0.819e12, 16 * GB, "cloud.google.com/tpu/docs/v5e"),
    "tpu_v5p": Accelerator(459e12, 2.765e12, 95 * GB, "cloud.google.com/tpu/docs/v5p"),
    "tpu_v6e": Accelerator(918e12, 1.64e12, 32 * GB, "cloud.google.com/tpu/docs/v6e"),
}


def main(argv: list[str]) -> None:
    parser = CommandParser("plan", __doc__)
    parser.add_argument("--mesh", default="data=1", help="devices by axis, such as data=10,fsdp=8")
    parser.add_argument("--accelerator", default="h200", help=f"one of {', '.join(ACCELERATORS)}")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of its peak FLOP/s, in (0, 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    flags, config = config_flags.parse(argv, parser)
    # Any backend would do, and this one is free.
    jax.config.update("jax_platforms", "cpu")
    numbers = plan(config, sharding.parse_mesh(flags.mesh), flags.accelerator, flags.utilisation)
    if flags.json:
        export.write_json(flags.json, numbers)
    print(table(numbers))


def plan(config, mesh: dict[str, int], accelerator: str, utilisation: float = 0.4) -> dict:
    """All numbers of `im3d plan`, as JSON can hold them; bytes, FLOPs and seconds.

    Args:
        mesh: devices along each of `sharding.AXES`.
        accelerator: a key of `ACCELERATORS`.
        utilisation: the share of its peak that is assumed.

    Raises UserError for an unknown accelerator, a share outside (0, 1], a backbone that JAX cannot trace and
    a batch that does not divide over the mesh.
    """
    if accelerator not in ACCELERATORS:
        raise UserError(f"--accelerator {accelerator!r} is unknown; there is {', '.join(ACCELERATORS)}")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation}; give a share in (0, 1]")
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    if not model.traceable:
        raise UserError(
            f"config.backbone: {config.backbone.name} is not a JAX program; there is no plan of it"
        )
    device = ACCELERATORS[accelerator]
    params = jax.eval_shape(model.init, jax.random.key(0))
    numbers = {
        "backbone": config.backbone.name,
        "mesh": mesh,
        "accelerator": {"name": accelerator, **device._asdict(), "utilisation": utilisation},
        "parameters": count_parameters(params, model.temporal_pattern),
        "generate": plan_generation(config, model, params, device, utilisation),
    }
    if "published" in config:
        numbers["published"] = config.published.to_dict()
    if "train" in config:
        numbers["train"] = plan_training(config, model, params, mesh, device, utilisation)
    return numbers


def count_parameters(params, temporal_pattern: str) -> dict[str, int]:
    """Numbers of parameters: total, temporal (those that Sec. 3.1 trains) and spatial (the rest)."""
    temporal, spatial = train.split_params(params, temporal_pattern)
    counts = {"spatial": _size(spatial), "temporal": _size(temporal)}
    return {"total": sum(counts.values()), **counts}


def plan_generation(config, model, params, device: Accelerator, utilisation: float) -> dict:
    """One asset on one device: the image if the backbone draws it, the first video, the rounds (Sec. 3.4)."""
    image, video, rounds = config.text_to_image, config.video, config.rounds
    guidance = {
        "image": sampler.Guidance(image.w_text, image.w_text, image.rescale),
        "video": sampler.Guidance(video.w_image, video.w_text, video.rescale),
    }
    frames = {"image": 1, "video": config.num_views}
    passes = len(rounds.at_steps) * rounds.num_runs
    calls = {"image": image.num_steps, "video": video.num_steps + passes * rounds.num_steps}
    weights = _bytes(params)
    numbers = {"weights_bytes": weights, "asset": {"flops": 0, "seconds": 0.0}}
    draws_images = model.empty_conditioning(1).text and not image.pipeline
    for name in ("image", "video") if draws_images else ("video",):
        evaluations = guidance[name].num_evaluations
        program = trace(model.apply, params, *network_inputs(model, evaluations, frames[name]))
        per_call = count_flops(program)
        seconds = max(per_call / (device.flops * utilisation), weights / device.bandwidth)
        numbers[name] = {
            "calls": calls[name],
            "evaluations_per_call": evaluations,
            "flops_per_call": per_call,
            "seconds_per_call": seconds,
        }
        numbers["asset"]["flops"] += calls[name] * per_call
        numbers["asset"]["seconds"] += calls[name] * seconds
    numbers["activation_bytes"] = peak_bytes(program)
    numbers["device_bytes"] = weights + numbers["activation_bytes"]
    return numbers | {"fits": numbers["device_bytes"] <= device.memory}


def plan_training(config, model, params, mesh, device: Accelerator, utilisation: float) -> dict:
    """One step of the stream of `config.train` that costs most, and what each device holds of it."""
    trained, frozen = train.split_params(params, config.train.trainable)
    stream = max(config.train.streams.values(), key=lambda s: (s.batch_size * s.num_views, s.num_views))
    shares = mesh["data"] * mesh["fsdp"]
    if stream.batch_size % shares:
        number = stream.batch_size
        raise UserError(f"--mesh divides the batch by {shares}, and config.train's {number} does not divide")
    batch = stream.batch_size // shares
    arguments = trained, frozen, *network_inputs(model, batch, stream.num_views)
    program = trace(jax.value_and_grad(partial(_loss, model)), *arguments)
    kept = {name: kept_bytes(partial(_loss, variant), *arguments) for name, variant in _remat_variants(model)}
    opt_state = jax.eval_shape(train.make_optimizer(config.train).init, trained)
    held = partial(sharding.bytes_per_device, rules=model.partition_rules, sizes=mesh)
    numbers = {
        "weights": held(params),
        "gradients": held(trained),
        "optimizer": held(opt_state),
        "ema": held(trained),
        "activations": peak_bytes(program),
    }
    device_bytes = sum(numbers.values())
    # What is divided along `tensor` divides the arithmetic, too.
    flops = count_flops(program)
    return {
        "batch": stream.batch_size,
        "batch_per_device": batch,
        "trained_parameters": _size(trained),
        "flops_per_step": flops * shares,
        "seconds_per_step": flops / mesh["tensor"] / (device.flops * utilisation),
        "bytes_per_device": numbers,
        "bytes_kept_for_backward": kept,
        "remat": getattr(model, "remat", ""),
        "device_bytes": device_bytes,
        "fits": device_bytes <= device.memory,
    }


def _remat_variants(model) -> list[tuple[str, Any]]:
    """(policy, model) without recomputation, with the model's policy, and with the thriftiest."""
    if not hasattr(model, "remat"):
        return [("", model)]
    policies = dict.fromkeys(("", model.remat, "nothing_saveable"))
    return [(policy, dataclasses.replace(model, remat=policy)) for policy in policies]


# ---- Measuring ----


def network_inputs(model, batch: int, num_frames: int) -> tuple:
    """Shapes of (noisy, timestep, conditioning) for `model.apply`."""
    noisy = jax.ShapeDtypeStruct((batch, num_frames, *model.latent_shape), jnp.float32)
    timestep = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return noisy, timestep, jax.eval_shape(partial(model.empty_conditioning, batch))


def trace(function: Callable, *shapes) -> Jaxpr:
    """The program of one call; nothing is computed."""
    return jax.make_jaxpr(function)(*shapes).jaxpr


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a program's convolutions and matrix products."""
    total = 0
    for equation in jaxpr.eqns:
        shapes, params = [var.aval.shape for var in equation.invars], equation.params
        outputs = sum(var.aval.size for var in equation.outvars)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            output_axis = params["dimension_numbers"].rhs_spec[0]
            each = math.prod(shapes[1]) // shapes[1][output_axis]
            # The gradient of a stride spreads its input out with zeros, which cost nothing that must be.
            total += 2 * outputs * each // math.prod(params["lhs_dilation"])
        else:
            inner = sum(map(count_flops, jaxprs_in_params(params)))
            total += inner * (params["length"] if equation.primitive.name == "scan" else 1)
    return total


def kept_bytes(loss: Callable, trained, *rest) -> int:
    """Bytes of what the forward pass keeps for the backward pass, other than the arguments of `loss`."""

    def residuals(trained, *rest):
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, *rest), trained)[1])

    jaxpr = trace(residuals, trained, *rest)
    arguments = set(jaxpr.invars)
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)} - arguments
    return sum(_var_bytes(var) for var in kept)


def peak_bytes(jaxpr: Jaxpr) -> int:
    """Most bytes that are alive at a time besides arguments and results, all operations in the order traced.

    An estimate of what XLA needs, which fuses operations and chooses another order: for the tiny model on a
    CPU it took 1.2 times as much in a call, the same in a training step, and with remat 2.1 times as much
    (4.4 times under its default scheduler, which goes for concurrency).
    """
    variables = [{var for var in each.invars if not isinstance(var, Literal)} for each in jaxpr.eqns]
    last_use = {var: number for number, used in enumerate(variables) for var in used}
    results = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    others = {*jaxpr.constvars, *jaxpr.invars, *results}
    alive = peak = 0
    for number, (equation, used) in enumerate(zip(jaxpr.eqns, variables, strict=True)):
        made = {var for var in equation.outvars if var not in results}
        inner = max(map(peak_bytes, jaxprs_in_params(equation.params)), default=0)
        peak = max(peak, alive + sum(map(_var_bytes, made)) + inner)
        alive += sum(_var_bytes(var) for var in made if var in last_use)
        alive -= sum(_var_bytes(var) for var in used if last_use[var] == number and var not in others)
    return peak


def _loss(model, trained, frozen, noisy, timestep, given):
    """Of the kind that trains the network; its own arithmetic is nothing beside that of the network."""
    params = traverse_util.unflatten_dict({**frozen, **trained}, sep="/")
    return jnp.mean(jnp.square(model.apply(params, noisy, timestep, given) - noisy))


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _var_bytes(var) -> int:
    return var.aval.size * var.aval.dtype.itemsize


# ---- Printing ----


def table(numbers: dict) -> str:
    """The numbers of `plan` as text."""
    device, mesh = numbers["accelerator"], numbers["mesh"]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    head = f"{numbers['backbone']} on {device['name']} at {device['utilisation']:.0%} of "
    head += f"{device['flops'] / 1e12:.0f} TFLOP/s, {device['memory'] / GB:.0f} GB ({device['source']})"
    lines = [head, *_parameter_lines(numbers["parameters"], numbers.get("published"))]
    lines += _generation_lines(numbers["generate"])
    if "train" in numbers:
        lines += _training_lines(numbers["train"], axes)
    return "\n".join(lines)


def _parameter_lines(counts: dict, published: dict | None) -> list[str]:
    lines, differs = ["", "parameters"], False
    for name, count in counts.items():
        line = f"  {name:<28} {_si(count):>10}"
        if published:
            difference = count / published[name] - 1
            differs |= abs(difference) > 0.05
            line += f"    published {_si(published[name])}, {difference:+.1%}"
        lines.append(line)
    note = textwrap.wrap(published["note"], 100) if differs else []
    return lines + [f"  {line}" for line in note]


def _generation_lines(numbers: dict) -> list[str]:
    lines = ["", "one asset, on one device"]
    for name in sorted(numbers.keys() & {"image", "video"}):
        part = numbers[name]
        count = f"{part['calls']} calls x {part['evaluations_per_call']} evaluations"
        cost = f"{_si(part['flops_per_call'])}FLOP and {part['seconds_per_call']:.3g} s a call"
        lines.append(f"  {name:<28} {count}, {cost}")
    asset = numbers["asset"]
    lines += [
        f"  {'asset':<28} {_si(asset['flops'])}FLOP, {asset['seconds']:.3g} s",
        *_byte_lines({"weights": numbers["weights_bytes"], "activations": numbers["activation_bytes"]}),
    ]
    return lines + [_verdict(numbers)]


def _training_lines(numbers: dict, axes: str) -> list[str]:
    batch = f"{numbers['batch']} assets, {numbers['batch_per_device']} for each device"
    cost = f"{_si(numbers['flops_per_step'])}FLOP, {numbers['seconds_per_step']:.3g} s"
    lines = ["", f"one training step, on {axes}", f"  {'batch':<28} {batch}", f"  {'step':<28} {cost}"]
    lines += [*_byte_lines(numbers["bytes_per_device"]), _verdict(numbers)]
    lines.append(f"  kept from the forward pass for the backward pass, remat now {numbers['remat']!r}")
    kept = numbers["bytes_kept_for_backward"]
    return lines + _byte_lines({name or "without remat": count for name, count in kept.items()})


def _byte_lines(numbers: dict) -> list[str]:
    return [f"  {name:<28} {count / GB:10.2f} GB" for name, count in numbers.items()]


def _verdict(numbers: dict) -> str:
    verdict = "fits" if numbers["fits"] else "does not fit: divide more (--mesh), or recompute more (remat)"
    return f"  {'in all':<28} {numbers['device_bytes'] / GB:10.2f} GB, {verdict}"


def _si(number: float) -> str:
    """Three digits and a prefix: 4.03 G."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
