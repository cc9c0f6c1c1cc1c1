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
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from im3d_jax import backbones, config_flags, costs, sharding
from im3d_jax.diffusion.guidance import Guidance
from im3d_jax.training.state import join, make_optimizer, split_params
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import write_json


def main(argv: list[str]) -> None:
    parser = CommandParser("plan", __doc__)
    parser.add_argument("--mesh", default="data=1", help="devices by axis, such as data=10,fsdp=8")
    parser.add_argument("--accelerator", default="h200", help=f"one of {', '.join(costs.ACCELERATORS)}")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of its peak FLOP/s, in (0, 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    flags, config = config_flags.parse(argv, parser)
    # Any backend would do, and this one is free.
    jax.config.update("jax_platforms", "cpu")
    numbers = plan(config, sharding.parse_mesh(flags.mesh), flags.accelerator, flags.utilisation)
    if flags.json:
        write_json(flags.json, numbers)
    print(table(numbers))


def plan(config, mesh: dict[str, int], accelerator: str, utilisation: float = 0.4) -> dict:
    """All numbers of `im3d plan`, as JSON can hold them; bytes, FLOPs and seconds.

    Args:
        mesh: devices along each of `sharding.AXES`.
        accelerator: a key of `costs.ACCELERATORS`.
        utilisation: the share of its peak that is assumed.

    Raises UserError for an unknown accelerator, a share outside (0, 1], a backbone that JAX cannot trace and
    a batch that does not divide over the mesh.
    """
    if accelerator not in costs.ACCELERATORS:
        raise UserError(f"--accelerator {accelerator!r} is unknown; there is {', '.join(costs.ACCELERATORS)}")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation}; give a share in (0, 1]")
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    if not model.traceable:
        raise UserError(
            f"config.backbone: {config.backbone.name} is not a JAX program; there is no plan of it"
        )
    device = costs.ACCELERATORS[accelerator]
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
    temporal, spatial = split_params(params, temporal_pattern)
    counts = {"spatial": _size(spatial), "temporal": _size(temporal)}
    return {"total": sum(counts.values()), **counts}


def plan_generation(config, model, params, device: costs.Accelerator, utilisation: float) -> dict:
    """One asset on one device: the image if the backbone draws it, the first video, the rounds (Sec. 3.4)."""
    image, video, rounds = config.text_to_image, config.video, config.rounds
    guidance = {
        "image": Guidance(image.w_text, image.w_text, image.rescale),
        "video": Guidance(video.w_image, video.w_text, video.rescale),
    }
    frames = {"image": 1, "video": config.num_views}
    passes = len(rounds.at_steps) * rounds.num_runs
    calls = {"image": image.num_steps, "video": video.num_steps + passes * rounds.num_steps}
    weights = _bytes(params)
    numbers = {"weights_bytes": weights, "asset": {"flops": 0, "seconds": 0.0}}
    draws_images = model.empty_conditioning(1).text and not image.pipeline
    for name in ("image", "video") if draws_images else ("video",):
        evaluations = guidance[name].num_evaluations
        program = costs.trace(model.apply, params, *network_inputs(model, evaluations, frames[name]))
        per_call = costs.count_flops(program)
        seconds = max(per_call / (device.flops * utilisation), weights / device.bandwidth)
        numbers[name] = {
            "calls": calls[name],
            "evaluations_per_call": evaluations,
            "flops_per_call": per_call,
            "seconds_per_call": seconds,
        }
        numbers["asset"]["flops"] += calls[name] * per_call
        numbers["asset"]["seconds"] += calls[name] * seconds
    numbers["activation_bytes"] = costs.peak_bytes(program)
    numbers["device_bytes"] = weights + numbers["activation_bytes"]
    return numbers | {"fits": numbers["device_bytes"] <= device.memory}


def plan_training(config, model, params, mesh, device: costs.Accelerator, utilisation: float) -> dict:
    """One step of the stream of `config.train` that costs most, and what each device holds of it."""
    trained, frozen = split_params(params, config.train.trainable)
    stream = max(config.train.streams.values(), key=lambda s: (s.batch_size * s.num_views, s.num_views))
    shares = mesh["data"] * mesh["fsdp"]
    if stream.batch_size % shares:
        number = stream.batch_size
        raise UserError(f"--mesh divides the batch by {shares}, and config.train's {number} does not divide")
    batch = stream.batch_size // shares
    arguments = trained, frozen, *network_inputs(model, batch, stream.num_views)
    program = costs.trace(jax.value_and_grad(partial(_loss, model)), *arguments)
    kept = {
        name: costs.kept_bytes(partial(_loss, variant), *arguments)
        for name, variant in _remat_variants(model)
    }
    opt_state = jax.eval_shape(make_optimizer(config.train).init, trained)
    held = partial(sharding.bytes_per_device, rules=model.partition_rules, sizes=mesh)
    numbers = {
        "weights": held(trained) + held(_as(frozen, config.train.frozen_dtype)),
        "gradients": held(trained),
        "optimizer": held(opt_state),
        "ema": held(trained),
        "activations": costs.peak_bytes(program),
    }
    device_bytes = sum(numbers.values())
    # What is divided along `tensor` divides the arithmetic, too.
    flops = costs.count_flops(program)
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


def _loss(model, trained, frozen, noisy, timestep, given):
    """Of the kind that trains the network; its own arithmetic is nothing beside that of the network."""
    return jnp.mean(jnp.square(model.apply(join(frozen, trained), noisy, timestep, given) - noisy))


def _as(shapes, dtype: str):
    """The same arrays in another precision."""
    return jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, jnp.dtype(dtype)), shapes)


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- Printing ----


def table(numbers: dict) -> str:
    """The numbers of `plan` as text."""
    device, mesh = numbers["accelerator"], numbers["mesh"]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    head = f"{numbers['backbone']} on {device['name']} at {device['utilisation']:.0%} of "
    head += f"{device['flops'] / 1e12:.0f} TFLOP/s, {device['memory'] / costs.GB:.0f} GB ({device['source']})"
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
    return [f"  {name:<28} {count / costs.GB:10.2f} GB" for name, count in numbers.items()]


def _verdict(numbers: dict) -> str:
    verdict = "fits" if numbers["fits"] else "does not fit: divide more (--mesh), or recompute more (remat)"
    return f"  {'in all':<28} {numbers['device_bytes'] / costs.GB:10.2f} GB, {verdict}"


def _si(number: float) -> str:
    """Three digits and a prefix: 4.03 G."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
