"""The paper's denoiser on a GPU: a guided call, training steps, and diffusers' nearest network beside it.

    python benchmarks/gpu_backbone.py --only call --json backbone_call.json      # or: temporal, full, peer
    python benchmarks/gpu_backbone.py --small                                    # the same code on a CPU

call      one denoising step of 16 views as `im3d generate` makes it: a batch of 3 for guidance, bfloat16
temporal  a step of `im3d train` on one asset of 16 views, temporal layers alone, as in the paper
full      the same with everything trained
peer      diffusers' UNet3DConditionModel, widened to as many parameters, on the same 3 x 16 latents, in torch
          as it comes and compiled by torch.compile. It is the public network whose layers are nearest, but
          not the same: beside each time stands its own arithmetic, and what compares is the rate.

Weights are random: speed does not depend on their values. Without `--only`, all parts run, each in a process
of its own, because each takes most of the memory. The arithmetic of a training step is the network's own:
what `remat` computes again does not count, so that its rate over the measured matrix rate is the MFU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_machine
import gpu_paper
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from im3d_jax import costs, generator, sharding, tasks
from im3d_jax.diffusion.guidance import Guidance
from im3d_jax.trainable import Part
from im3d_jax.training.feed import over_mesh
from im3d_jax.training.state import OptimizerSettings, create, learning_rate, make_optimizer
from im3d_jax.training.step import make_step
from recon_torch import hosting

PEER = dict(block_out_channels=(576, 1152, 2176, 2176), cross_attention_dim=2048, attention_head_dim=64)
SMALL_PEER = dict(
    block_out_channels=(32, 64, 64, 64),
    cross_attention_dim=24,
    attention_head_dim=16,
    layers_per_block=1,
    norm_num_groups=8,
)


def measure_call(config, small: bool) -> dict:
    """The program that `Generator` runs 80 times."""
    shapes = generator.load(config, params={})
    model, settings = shapes.model, shapes.video
    params = gpu_paper.random_params(model)
    weights = Guidance.of_video(settings).weights(0.8)
    given, empty = shapes.condition([gpu_paper.PROMPT]), shapes.condition([""])
    noisy = jax.random.normal(jax.random.key(1), (1, config.num_views, *model.latent_shape))
    levels = [jnp.full(1, each, jnp.float32) for each in (500.0, 0.6, 0.8)]
    arguments = (params, shapes.codec, noisy, *levels, given, empty, weights)
    started = time.perf_counter()
    options = model, settings.rescale, settings.tie_first_view
    call = generator.compiled_denoise_guided.lower(*arguments, *options).compile()
    compile_seconds = time.perf_counter() - started
    copies = len(weights)
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * copies), (noisy, levels[0], given))
    return {
        "seconds": gpu_machine.median_seconds(lambda: jax.block_until_ready(call(*arguments))),
        "compile_seconds": compile_seconds,
        "parameters": _size(params),
        "flops": costs.count_flops(costs.trace(model.apply, params, *batch)),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "temporary_bytes": call.memory_analysis().temp_size_in_bytes,
    }


def measure_training(config, trainable: str) -> dict:
    """`make_step` of the turntable task on one asset: random latents and text."""
    config.train.update(trainable=trainable)
    trains = Part(trainable)
    config.train.streams.turntable.batch_size = 1
    mesh = sharding.make_mesh()
    task, optimizer = tasks.build(config, mesh), make_optimizer(OptimizerSettings.of(config.train))
    state, frozen = create(
        task.init,
        None,
        task.partition_rules,
        mesh,
        optimizer,
        trains=trains,
        frozen_dtype="bfloat16",
        key=jax.random.key(0, impl="rbg"),
    )
    where = jax.tree.map(lambda array: array.sharding, state)
    rate = learning_rate(OptimizerSettings.of(config.train))
    how = dict(where=where, rate=rate, accumulate=1, ema_decay=0.9999)
    step = make_step(task, optimizer, mesh, trains=trains, **how)
    shape = (config.num_views, *task.model.latent_shape)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    batch = over_mesh(task.collate([{"latents": latents, "caption": gpu_paper.PROMPT}]), mesh)
    arguments = (frozen, task.constants, batch)
    started = time.perf_counter()
    compiled = step.lower(state, *arguments, task.stream("turntable")).compile()
    compile_seconds = time.perf_counter() - started

    def run():
        nonlocal state
        state, metrics = compiled(state, *arguments)
        jax.block_until_ready(metrics)

    return {
        "seconds": gpu_machine.median_seconds(run),
        "compile_seconds": compile_seconds,
        "trained_parameters": _size(state.trained),
        "flops": task.flops(trains, num_examples=1, num_views=config.num_views),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def measure_peer(config, small: bool) -> dict:
    """diffusers' network: as it comes, and compiled."""
    hosting.declare()
    from diffusers import UNet3DConditionModel

    device, dtype = gpu_machine.device(), torch.float32 if small else torch.bfloat16
    height, width, channels = config.backbone.kwargs.latent_shape
    sizes = SMALL_PEER if small else PEER
    with torch.device(device):
        torch.set_default_dtype(dtype)
        module = (
            UNet3DConditionModel(height, 2 * channels + 1, channels, **sizes).eval().requires_grad_(False)
        )
        noisy = torch.randn(3, 2 * channels + 1, config.num_views, height, width)
        text = torch.randn(3, config.backbone.kwargs.max_words, sizes["cross_attention_dim"])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(noisy, 500, text)
    shared = {"parameters": sum(p.numel() for p in module.parameters()), "flops": counter.get_total_flops()}

    def timed(network) -> float:
        with torch.no_grad():
            return gpu_machine.median_seconds(lambda: network(noisy, 500, text, return_dict=False))

    rows = {"peer, eager": shared | {"seconds": timed(module)}}
    print(rows, flush=True)  # compiling may outlast the time that there is
    started = time.perf_counter()
    compiled = torch.compile(module)
    seconds = timed(compiled)
    rows["peer, torch.compile"] = shared | {
        "seconds": seconds,
        "compile_seconds": time.perf_counter() - started,
    }
    return rows


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


PARTS = {
    "call": lambda config, small: {"guided call": measure_call(config, small)},
    "temporal": lambda config, _: {"training step, temporal": measure_training(config, "temporal")},
    "full": lambda config, _: {"training step, everything": measure_training(config, ".*")},
    "peer": measure_peer,
}


def main() -> None:
    parser = gpu_machine.arguments(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    flags = gpu_machine.parse(parser)
    if not flags.only:
        for part in PARTS:
            subprocess.run([sys.executable, *sys.argv, "--only", part], check=True)
        return
    rates = gpu_machine.measure_rates(flags.small)
    torch.cuda.empty_cache()  # for JAX
    with tempfile.TemporaryDirectory() as directory:
        rows = PARTS[flags.only](gpu_paper.load_config(Path(directory), flags.small), flags.small)
    stages = [
        gpu_machine.Stage(name, row["seconds"], row["flops"], row.get("bytes", 0)).record(rates)
        for name, row in rows.items()
    ]
    for row in rows.values():
        row["utilisation"] = row["flops"] / row["seconds"] / rates.bfloat16
        print({name: f"{value:.4g}" for name, value in row.items()})
    print(gpu_machine.table(stages))
    path = flags.json and flags.json.with_stem(f"{flags.json.stem}_{flags.only}")
    gpu_machine.write(
        path, gpu_machine.describe() | {"rates": rates._asdict(), "stages": stages, "rows": rows}
    )


if __name__ == "__main__":
    main()
