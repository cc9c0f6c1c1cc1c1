"""The fit at 512 px on a GPU, beside gsplat's plain recipe, and gsplat beside the CPU engine.

    python benchmarks/gpu_fit.py --json fit.json
    python benchmarks/gpu_fit.py --small                    # at 64 px, with the engine of this device

engines   renders and gradients of the CPU engine against those of gsplat, for the same Gaussians
fit       steps per second of the method's fit (LPIPS, MS-SSIM, mask) over all of its 1200 steps
plain     the same object fitted by gsplat's own recipe in this run: 0.8 L1 + 0.2 (1 - SSIM), the default
          `DefaultStrategy`, no perceptual network, as many steps
many      300 steps of 1, 4 and 16 assets in one batch (`optimization.run_together`), and of 4 assets in
          processes of their own at the same time, because one fit leaves a GPU mostly idle

The targets are true views of procedural objects. The floor of the fit is the arithmetic of its perceptual
network, which runs in float32 on a GPU, at the matrix rate measured for that dtype.
"""

from __future__ import annotations

import dataclasses
import os
import time

import gpu_machine
import jax
import numpy as np
import torch
from gsplat import DefaultStrategy
from torch.utils.flop_counter import FlopCounterMode

from im3d_jax.data import objects, procedural
from recon_torch.fit.optimization import Fit, run_together
from recon_torch.losses.ssim import ssim
from recon_torch.raster.gaussians import Activated, Gaussians
from recon_torch.raster.render import render
from recon_torch.scene.start import init_ball
from recon_torch.settings import Engine, FitSettings
from recon_torch.views.cameras import Cameras, orbit

# JAX renders the targets here, and would otherwise reserve most of the GPU's memory for that.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
NUM_VIEWS, WARM_UP_STEPS, MANY, PROCESSES, STEPS_OF_MANY = 16, 20, (1, 4, 16), 4, 300
# The learning rates of gsplat's example trainer, for the plain recipe, in the order of `Gaussians`' fields.
RATES = {"means": 1.6e-4, "quats": 1e-3, "scales": 5e-3, "opacities": 5e-2, "sh0": 2.5e-3}


class Target:
    """True views of one object of the test split, on the device."""

    def __init__(self, number: int, size: int) -> None:
        index = objects.SPLITS["test"][0] + number
        made = procedural.turntables(0, [index], size=size, num_views=NUM_VIEWS)
        self.cameras: Cameras = orbit(NUM_VIEWS, float(made.elevation_rad[0]), size)
        arrays = made.views.rgb[0], made.views.alpha[0]
        self.views, self.masks = (torch.tensor(np.array(a), device=gpu_machine.device()) for a in arrays)


def compare_engines(size: int, num_gaussians: int) -> dict[str, float]:
    """The largest difference of images of one view, and of gradients as a share of their largest value."""
    start = init_ball(num_gaussians, 0.4, torch.Generator().manual_seed(0), "cpu")
    cameras = orbit(NUM_VIEWS, 0.3, size)[:1]
    weight = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(1))

    def run(device, engine):
        leaves = Activated(*(value.detach().to(device).requires_grad_() for value in _varied(start)))
        rendered = render(leaves, cameras, engine=engine)
        gradients = torch.autograd.grad((rendered.rgb * weight.to(device)).sum(), leaves)
        return [rendered.rgb.detach().cpu(), rendered.alpha.detach().cpu(), *(g.cpu() for g in gradients)]

    names = ("rgb", "alpha", *(f"d {name}" for name in Activated._fields))
    device = gpu_machine.device()
    found = run(device, Engine.GSPLAT if device.type == "cuda" else Engine.TORCH)
    pairs = zip(names, found, run("cpu", Engine.CPU), strict=True)
    return {
        name: ((ours - cpu).abs().max() / (cpu.abs().max() if name.startswith("d ") else 1)).item()
        for name, ours, cpu in pairs
    }


def _varied(start: Gaussians) -> Activated:
    """Gaussians with random colours, rotations and shapes; those of a start are alike, which hides errors."""
    generator = torch.Generator().manual_seed(2)
    colors, quats, longer = (torch.rand(len(start.means), n, generator=generator) for n in (3, 4, 3))
    return Activated(start.means, quats - 0.5, start.scales * (0.5 + longer), start.opacities, colors)


def time_fit(target: Target, settings: FitSettings) -> dict:
    """The method's fit, timed after some steps that warm it up."""
    fit = Fit(target.cameras, settings)
    fit.set_targets(target.views, target.masks)
    fit.run(WARM_UP_STEPS)
    flops = count_step_flops(fit)
    first, seconds = fit.step, _seconds(lambda: fit.run(settings.num_steps))
    steps = settings.num_steps - first
    return {
        "steps_per_second": steps / seconds,
        "seconds": seconds,
        "flops": flops * steps,
        "num_gaussians": fit.num_gaussians,
        "peak_bytes": _peak_bytes(),
        **fit.metrics(),
    }


def count_step_flops(fit: Fit) -> float:
    """FLOPs of a step's convolutions and matrix products, forward and backward, without the rasteriser."""
    counter = FlopCounterMode(display=False)
    with counter:
        fit.run(fit.step + 1)
    return counter.get_total_flops()


def time_plain(target: Target, num_gaussians: int, num_steps: int) -> dict:
    """Fits by gsplat's recipe, over white like the views."""
    device, cameras = target.views.device, target.cameras
    start = init_ball(num_gaussians, 0.5, torch.Generator().manual_seed(0), device)
    params = torch.nn.ParameterDict(dict(zip(RATES, start, strict=True)))
    optimizers = {name: torch.optim.Adam([params[name]], rate, eps=1e-15) for name, rate in RATES.items()}
    strategy = DefaultStrategy()
    state = strategy.initialize_state(scene_scale=1.0)
    white = torch.ones(3, device=device)

    def step(number: int) -> None:
        view = slice(number % NUM_VIEWS, number % NUM_VIEWS + 1)
        gaussians = Gaussians(*(params[name] for name in RATES))
        rgb, *_, info = render(gaussians, cameras[view], background=white)
        strategy.step_pre_backward(params, optimizers, state, number, info)
        truth = target.views[view]
        l1 = (rgb - truth).abs().mean()
        (0.8 * l1 + 0.2 * (1 - ssim(rgb, truth).mean())).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, number, info)

    for number in range(WARM_UP_STEPS):
        step(number)
    steps = range(WARM_UP_STEPS, num_steps)
    seconds = _seconds(lambda: [step(number) for number in steps])
    return {
        "steps_per_second": len(steps) / seconds,
        "seconds": seconds,
        "num_gaussians": len(params["means"]),
        "peak_bytes": _peak_bytes(),
    }


def time_batch(count: int, size: int, settings: FitSettings) -> dict[str, float]:
    """Fits `count` assets in one process, each step of which makes the same calls for all of them."""
    targets = [Target(number, size) for number in range(count)]
    fits = [Fit(target.cameras, settings) for target in targets]
    for fit, target in zip(fits, targets, strict=True):
        fit.set_targets(target.views, target.masks)
    run_together(fits, WARM_UP_STEPS)
    seconds = _seconds(lambda: run_together(fits, settings.num_steps))
    return {
        "seconds": seconds,
        "seconds_per_asset": seconds / count,
        "peak_bytes": _peak_bytes(),
        "psnr": sum(fit.metrics()["psnr"] for fit in fits) / count,
    }


def time_processes(count: int, size: int, settings: FitSettings) -> dict[str, float]:
    """Fits `count` assets in processes of their own; the seconds of the slowest, from when all are ready."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(count), context.SimpleQueue()
    processes = []
    for number in range(count):
        arguments = (number, size, settings, barrier, seconds)
        processes.append(context.Process(target=_fit_in_process, args=arguments))
        processes[-1].start()
    slowest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return {"seconds": slowest, "seconds_per_asset": slowest / count}


def _fit_in_process(number: int, size: int, settings: FitSettings, barrier, seconds) -> None:
    jax.config.update("jax_platforms", "cpu")  # JAX only renders the target
    torch.set_num_threads(1)
    target = Target(number, size)
    fit = Fit(target.cameras, settings)
    fit.set_targets(target.views, target.masks)
    fit.run(WARM_UP_STEPS)
    barrier.wait(300)
    seconds.put(_seconds(lambda: fit.run(settings.num_steps)))


def _seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gpu_machine.synchronize()
    started = time.perf_counter()
    function()
    gpu_machine.synchronize()
    return time.perf_counter() - started


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    flags = gpu_machine.parse(gpu_machine.arguments(__doc__))
    size, num_steps, many = (64, 60, (1, 2)) if flags.small else (512, FitSettings.num_steps, MANY)
    settings = FitSettings(
        num_steps=num_steps,
        num_gaussians=500 if flags.small else 5000,
        lpips_weights="random",
        lpips_stages=5,  # as many as with trained weights
    )
    rates = gpu_machine.measure_rates(flags.small)
    result = gpu_machine.describe() | {"size": size, "rates": rates._asdict()}

    def keep(name: str, value: object) -> None:
        result[name] = value
        print(name, value, flush=True)
        gpu_machine.write(flags.json, result)

    keep("engines", compare_engines(size, settings.num_gaussians))
    target = Target(0, size)
    keep("fit", time_fit(target, settings))
    keep("plain", time_plain(target, settings.num_gaussians, num_steps))
    keep("fit again", time_fit(target, settings))  # how far two runs differ
    keep("fit without LPIPS", time_fit(target, dataclasses.replace(settings, w_lpips=0.0)))
    keep("fit bfloat16", time_fit(target, dataclasses.replace(settings, lpips_dtype="bfloat16")))
    keep("fit 4 views", time_fit(target, dataclasses.replace(settings, views_per_step=4)))
    shorter = dataclasses.replace(settings, num_steps=min(num_steps, STEPS_OF_MANY))
    for count in many:
        keep(f"batch of {count}", time_batch(count, size, shorter))
    keep(f"{PROCESSES} processes", time_processes(PROCESSES, size, shorter))
    kinds = {"fit": "float32", "fit bfloat16": "bfloat16"}
    stages = [
        gpu_machine.Stage(name, result[name]["seconds"], result[name]["flops"], dtype=dtype)
        for name, dtype in kinds.items()
    ]
    keep("stages", [stage.record(rates) for stage in stages])
    print(gpu_machine.table(result["stages"]))
    ratio = result["fit"]["steps_per_second"] / result["plain"]["steps_per_second"]
    print(f"\nsteps a second against gsplat's plain recipe: {ratio:.2f}x")


if __name__ == "__main__":
    main()
