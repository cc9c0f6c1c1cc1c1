"""`im3d plan`: what a config costs, without running it: parameters, FLOPs, bytes per device, seconds.

    im3d plan --config=configs/paper_512.py --mesh data=80 --accelerator a100
    im3d plan --config=configs/paper_512.py --mesh data=8,fsdp=8 --accelerator h200 --json plan.json

Everything is traced with shapes alone. FLOPs are those of convolutions and matrix products in the traced
program, 2 for each multiplication, whatever a compiler makes of it. XLA's own count of the lowered program
also has the elementwise arithmetic, and counts the body of a loop once. The autoencoder, the text encoders
and the fit are left out. Seconds assume a share of the accelerator's peak, or that all weights are read once
from memory if that takes longer, and no time for communication.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from im3d_jax import autoencoders, backbones, config_flags, config_sections, costs, sharding, trainable
from im3d_jax.backbones import Backbone
from im3d_jax.clips import Clip
from im3d_jax.diffusion import sampler, schedules
from im3d_jax.diffusion.guidance import Guidance
from im3d_jax.generator import clip_settings
from im3d_jax.plan import Sampling, Training, count_parameters, plan_generation, plan_training
from im3d_jax.settings import RoundSettings, TextToImageSettings, VideoSettings
from im3d_jax.training.state import OptimizerSettings, make_optimizer
from im3d_jax.training_settings import TrainSettings
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import write_json
from recon_torch.ranges import real


def main(argv: list[str]) -> None:
    parser = CommandParser("plan", __doc__)
    parser.add_argument("--mesh", default="data=1", help="devices by axis, such as data=10,fsdp=8")
    parser.add_argument("--accelerator", default="h200", help=f"one of {', '.join(costs.ACCELERATORS)}")
    parser.add_argument(
        "--utilisation",
        type=real(above=0, most=1),
        default=0.4,
        help="the share of its peak FLOP/s to assume (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    flags, config = config_flags.parse(argv, parser)
    # Only shapes are traced, so the backend does not matter, and the CPU is always there.
    jax.config.update("jax_platforms", "cpu")
    numbers = plan(config, sharding.parse_mesh(flags.mesh), flags.accelerator, flags.utilisation)
    if flags.json:
        outputs.check_file(flags.json, "plan", partial(has_keys, keys=numbers.keys()))
        write_json(flags.json, numbers)
    print(table(numbers))


def has_keys(path: Path, keys: Collection[str]) -> bool:
    """Whether a file is a JSON object with these keys, as an earlier plan is."""
    try:
        return set(json.loads(path.read_text())) == set(keys)
    except (OSError, ValueError, TypeError):
        return False


def plan(
    config: ConfigDict, mesh: Mapping[str, int], accelerator: str, utilisation: float = 0.4
) -> dict[str, Any]:
    """All numbers of `im3d plan`, as JSON can hold them. Units are bytes, FLOPs and seconds.

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
    model = backbones.build(*config_sections.named(config, "backbone"))
    if not model.traceable:
        raise UserError(
            f"config.backbone: {config.backbone.name} is not a JAX program; there is no plan of it"
        )
    device = costs.ACCELERATORS[accelerator]
    params = jax.eval_shape(model.init, jax.random.key(0))
    numbers = {
        "backbone": config.backbone.name,
        "mesh": dict(mesh),
        "accelerator": {"name": accelerator, **device._asdict(), "utilisation": utilisation},
        "parameters": count_parameters(params, model.temporal_pattern),
        "generate": plan_generation(model, params, samplings(config, model), device, utilisation),
    }
    if "published" in config:
        numbers["published"] = config.published.to_dict()
    if "train" in config:
        optimizer = make_optimizer(OptimizerSettings.of(config.train))
        numbers["train"] = plan_training(
            model, params, costliest_stream(config), optimizer, mesh, device, utilisation
        )
    return numbers


def samplings(config: ConfigDict, model: Backbone) -> dict[str, Sampling]:
    """How often an asset calls the network: for the image if the backbone draws it, and for all videos."""
    image = config_sections.settings(config, "text_to_image", TextToImageSettings)
    video = config_sections.settings(config, "video", VideoSettings)
    rounds = config_sections.settings(config, "rounds", RoundSettings)
    passes = len(rounds.at_steps) * rounds.num_runs
    clip = Clip.of(clip_settings(config), config.num_views)
    schedule = schedules.make_schedule(**config.schedule)
    whole = sampler.make_steps(schedule, video.num_steps, video.spacing).sigmas[:-1]
    restart = sampler.make_steps(schedule, rounds.num_steps, video.spacing, rounds.start_level).sigmas[:-1]
    sigmas = np.concatenate([whole, *[restart] * passes])
    found = _by_evaluations("video", Guidance.of_video(video), sigmas, frames_of(config, clip))
    if model.empty_conditioning(1).text and not image.pipeline:
        sigmas = sampler.make_steps(schedule, image.num_steps, image.spacing).sigmas[:-1]
        found = _by_evaluations("image", Guidance.of_image(image), sigmas, 1) | found
    return found


def frames_of(config: ConfigDict, clip: Clip) -> int:
    """The frames of latents that the config's autoencoder makes of a clip, which it tells without weights."""
    name, kwargs = config_sections.named(config, "autoencoder")
    return autoencoders.num_latents(name, kwargs, clip.num_pictures)


def _by_evaluations(
    name: str, guidance: Guidance, sigmas: Float[np.ndarray, " T"], num_frames: int
) -> dict[str, Sampling]:
    """The calls that have the same number of evaluations, the costliest last and under the plain name.

    The others, where guidance is left out or has fewer terms, have their number in the name: "video_1".
    """
    counts = sorted(Counter(guidance.evaluations(sigmas)).items())
    *fewer, most = [(each, Sampling(calls, each, num_frames)) for each, calls in counts]
    return {f"{name}_{each}": sampling for each, sampling in fewer} | {name: most[1]}


def costliest_stream(config: ConfigDict) -> Training:
    """The stream of `config.train` whose steps cost most."""
    settings = config_sections.settings(config, "train", TrainSettings)
    streams = settings.streams.values()
    stream = max(streams, key=lambda each: (each.batch_size * each.num_views, each.num_views))
    clip = Clip.of(clip_settings(config), config.num_views).of_orbit(stream.num_views)
    trained = trainable.chosen(settings), settings.frozen_dtype, settings.accumulate
    return Training(stream.batch_size, frames_of(config, clip), *trained)


# ---- Printing ----


def table(numbers: Mapping[str, Any]) -> str:
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


def _parameter_lines(counts: Mapping[str, int], published: Mapping[str, Any] | None) -> list[str]:
    lines, differs = ["", "parameters"], False
    for name, count in counts.items():
        line = f"  {name:<28} {_si(count):>10}"
        if published:
            difference = count / published[name] - 1
            differs |= abs(difference) > 0.05
            line += f"    published {_si(published[name])}, {difference:+.1%}"
        lines.append(line)
    note = textwrap.wrap(published["note"], 100) if published and differs else []
    return lines + [f"  {line}" for line in note]


def _generation_lines(numbers: Mapping[str, Any]) -> list[str]:
    lines = ["", "one asset, on one device"]
    for name in sorted(name for name in numbers if name.partition("_")[0] in ("image", "video")):
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


def _training_lines(numbers: Mapping[str, Any], axes: str) -> list[str]:
    batch = f"{numbers['batch']} assets, {numbers['batch_per_device']} for each device"
    if numbers["accumulate"] > 1:
        batch += f", in {numbers['accumulate']} parts one after another"
    cost = f"{_si(numbers['flops_per_step'])}FLOP, {numbers['seconds_per_step']:.3g} s"
    lines = ["", f"one training step, on {axes}", f"  {'batch':<28} {batch}", f"  {'step':<28} {cost}"]
    lines.append(f"  {'trained parameters':<28} {_si(numbers['trained_parameters']):>10}")
    lines += [*_byte_lines(numbers["bytes_per_device"]), _verdict(numbers)]
    lines.append(f"  kept from the forward pass for the backward pass, remat now {numbers['remat']!r}")
    kept = numbers["bytes_kept_for_backward"]
    return lines + _byte_lines({name or "without remat": count for name, count in kept.items()})


def _byte_lines(numbers: Mapping[str, int]) -> list[str]:
    return [f"  {name:<28} {count / costs.GB:10.2f} GB" for name, count in numbers.items()]


def _verdict(numbers: Mapping[str, Any]) -> str:
    verdict = "fits" if numbers["fits"] else "does not fit: divide more (--mesh), or recompute more (remat)"
    return f"  {'in all':<28} {numbers['device_bytes'] / costs.GB:10.2f} GB, {verdict}"


def _si(number: float | int) -> str:
    """A number with three digits and a prefix, such as 4.03 G."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
