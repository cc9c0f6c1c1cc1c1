"""Where the time of a fit goes: milliseconds of a step and share of the fit, stage by stage.

    python benchmarks/fit_profile.py                                    # 128 px, 1200 steps, all threads
    python benchmarks/fit_profile.py --size 64 --threads 1 --num-steps 300 --set lpips_weights=random

Fits the first test object. A stage's time is its own, without the stages that it calls; "rest" is Python and
autograd between them. wall is what passed, cpu what the process used over all its threads: on a machine that
does other things, trust cpu with one thread: there, two threads mostly wait for each other.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from im3d_jax.data import objects, procedural
from recon_torch.fit import loss
from recon_torch.fit.optimization import Fit
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.raster import composite_cpu, project_cpu
from recon_torch.scene import splats
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

NUM_VIEWS = 16


class Stopwatch:
    """Gives every moment to the one stage that runs then."""

    def __init__(self):
        self.seconds = collections.defaultdict(lambda: np.zeros(2))  # wall, cpu
        self.stage = "rest"
        self._now = self._read()

    def _read(self) -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def switch(self, stage: str) -> str:
        """Starts a stage; returns the one that it interrupts."""
        before, now, interrupted = self._now, self._read(), self.stage
        self.seconds[interrupted] += now - before
        self._now, self.stage = now, stage
        return interrupted

    def watch(self, owner, name: str, stage: str, backward_stage: str | None = None) -> None:
        """Times the function owner.name, and the way back from what it returned to its arguments."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            interrupted = self.switch(stage)
            result = function(*args, **kwargs)
            if backward_stage and result.requires_grad:
                result.register_hook(lambda _: self.switch(backward_stage) and None)
                for tensor in args:
                    if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda _: self.switch("rest") and None)
            self.switch(interrupted)
            return result

        setattr(owner, name, timed)


def watch_stages(watch: Callable) -> None:
    """Has `watch` time the stages of a step on a CPU."""
    projection, blending = project_cpu.Project, composite_cpu.Composite
    watch(projection, "forward", "projection forward")
    watch(projection, "backward", "projection backward")
    watch(composite_cpu, "_bin", "sort and bin")
    watch(blending, "forward", "blend forward")
    watch(blending, "backward", "blend backward")
    watch(PerceptualDistance, "distance", "LPIPS forward", "LPIPS backward")
    watch(loss, "ms_ssim", "MS-SSIM forward", "MS-SSIM backward")
    watch(loss, "mask_loss", "mask forward", "mask backward")
    watch(torch.optim.Adam, "step", "Adam")
    watch(splats.CappedStrategy, "step_post_backward", "densify and prune")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="side of the views in pixels")
    parser.add_argument("--num-steps", type=int, default=FitSettings.num_steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of FitSettings"
    )
    flags = parser.parse_args()

    torch.set_num_threads(flags.threads)
    fields = dict(field.split("=", 1) for field in flags.set)
    settings = {name: _read(value) for name, value in fields.items()}
    fit = prepare(flags.size, FitSettings(num_steps=flags.num_steps, **settings))
    fit.run(1)  # compiles the rasteriser and computes the targets' features
    stopwatch = Stopwatch()
    watch_stages(stopwatch.watch)
    stopwatch.switch("rest")
    stopwatch.seconds.clear()
    fit.run(flags.num_steps)
    stopwatch.switch("rest")

    total = sum(stopwatch.seconds.values())
    print(f"{flags.size} px, {flags.threads} thread(s), {fit.num_gaussians} Gaussians in the end")
    print(f"{'stage':20s} {'wall ms/step':>12} {'share':>6} {'cpu ms/step':>12} {'share':>6}")
    for stage, seconds in [*stopwatch.seconds.items(), ("fit", total)]:
        wall, cpu = 1e3 * seconds / (flags.num_steps - 1)
        print(
            f"{stage:20s} {wall:12.3f} {seconds[0] / total[0]:6.1%} {cpu:12.3f} {seconds[1] / total[1]:6.1%}"
        )
    print(f"wall {total[0]:.1f} s, cpu {total[1]:.1f} s, psnr {fit.metrics()['psnr']:.2f} dB")


def _read(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text  # a name


def prepare(size: int, settings: FitSettings) -> Fit:
    """A fit of the first test object's turntable."""
    truth = procedural.turntables(0, [objects.SPLITS["test"][0]], size=size)
    fit = Fit(orbit(NUM_VIEWS, truth.elevation_rad[0], size), settings)
    rgb, alpha = (torch.from_numpy(np.array(array[0])) for array in truth.views[:2])
    fit.set_targets(rgb, alpha)
    return fit


if __name__ == "__main__":
    main()
