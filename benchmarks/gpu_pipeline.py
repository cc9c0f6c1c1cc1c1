"""The whole method at the paper's size, from a prompt to fitted Gaussians: where its time goes, and a floor.

    python benchmarks/gpu_pipeline.py --json pipeline.json
    python benchmarks/gpu_pipeline.py --small                   # the same code on a CPU

It makes assets of 16 views of 512 px by configs/paper_512.py in bfloat16 with its autoencoder: 80 calls of 3
evaluations, and 1200 steps of fit in the worker's process on the same GPU. The weights, the text embeddings
and the network of LPIPS are random. Speed does not depend on their values, except that the fit has to fit
noise, for which it takes as many Gaussians as it may. The first asset compiles all programs; the second is
timed. Paper: 3 minutes (Table 1).

The seconds of a stage leave out the stages within it. The floor of a stage is the larger of two times: that
of its arithmetic at the measured matrix rate, and that of the bytes it must move at the measured bandwidth.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# Leaves room for the worker. JAX reads this when it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import gpu_machine
import gpu_paper
import jax
import jax.numpy as jnp
import torch
from ml_collections import ConfigDict
from torch.utils.flop_counter import FlopCounterMode

from im3d_jax import backbones, bridge, costs, generator, method, pipeline, stages
from im3d_jax.diffusion.guidance import Guidance
from im3d_jax.generator import Generator
from im3d_jax.plan import network_inputs
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process.client import ReconClient
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras, orbit

ELEVATION_RAD = 0.35  # not estimated: the views are noise


class Stages:
    """Seconds and calls of watched functions. Time in one that is called by another counts once."""

    def __init__(self):
        self.seconds, self.calls, self._inner = Counter(), Counter(), []

    def watch(self, owner: object, name: str, stage: str) -> None:
        """Times `owner.name` as `stage`, and waits for what it starts on the device."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments, **options):
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return jax.block_until_ready(function(*arguments, **options))
            finally:
                gpu_machine.synchronize()
                elapsed = time.perf_counter() - started
                self.seconds[stage] += elapsed - self._inner.pop()
                self.calls[stage] += 1
                if self._inner:
                    self._inner[-1] += elapsed

        setattr(owner, name, watched)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def watch_all(watched: Stages, codec: type, client: ReconClient) -> None:
    """Watches the arrows of Figure 2, each under its name."""
    of_generator = {
        "text to image, 40 calls": "text_to_image",
        "condition": "condition",
        "first video, denoise": "turntable",
        "rounds, denoise": "refine",
        "masks": "decode",
    }
    of_codec = {"autoencoder, decode": "decode", "autoencoder, encode": "encode"}
    of_bridge = {"views to the worker": "write", "renders to JAX, no copy": "as_jax"}
    of_client = {"targets": "set_targets", "fit": "fit", "render": "render"}
    owners = (Generator, of_generator), (codec, of_codec), (bridge, of_bridge), (client, of_client)
    for owner, arrows in owners:
        for stage, name in arrows.items():
            watched.watch(owner, name, stage)


def make_asset(
    generator: Generator, client: ReconClient, key: jax.Array, cameras: Cameras, until_steps: tuple[int, ...]
) -> float:
    """Makes an asset from the prompt, without its files, which are a CPU's work. Returns the seconds."""
    started = time.perf_counter()
    client.reset(cameras)
    asset_stages = stages.Stages()
    rgb, alpha = method.draw(generator, gpu_paper.PROMPT, key, asset_stages)
    given = generator.condition([gpu_paper.PROMPT], rgb, alpha, ELEVATION_RAD)
    video = method.sample_video(generator, given, key, asset_stages)
    fitting = generator, client, given, video, ELEVATION_RAD, key, until_steps, asset_stages
    rounds = list(method.fit_and_refine(*fitting))
    assert len(rounds) == len(until_steps)
    return time.perf_counter() - started


def floors(generator: Generator, settings: FitSettings) -> dict[str, dict[str, float]]:
    """The least work of each stage of one asset: FLOPs, bytes, and the precision of the arithmetic."""
    model, codec, rounds = generator.model, generator.codec, generator.rounds
    size, num_views, passes = generator.size, generator.num_views, 1 + len(rounds.at_steps)
    video, image = generator.video, generator.image
    guided = {
        "video": Guidance.of_video(video).evaluations([0.5])[0],
        "image": Guidance.of_image(image).evaluations([0.5])[0],
    }
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.params))

    def call(batch: int, num_frames: int) -> float:
        inputs = network_inputs(model, batch, num_frames)
        return costs.count_flops(costs.trace(model.apply, generator.params, *inputs))

    def frames(*shape):
        return jax.ShapeDtypeStruct((1, num_views, *shape), jnp.float32)

    pictures = frames(size, size, 3), frames(size, size, 1)
    once = costs.count_flops(costs.trace(type(codec).decode.__wrapped__, codec, frames(*model.latent_shape)))
    back = costs.count_flops(costs.trace(type(codec).encode.__wrapped__, codec, *pictures))
    of_video, steps = call(guided["video"], num_views), len(rounds.at_steps) * rounds.num_runs
    steps *= rounds.num_steps
    view_bytes = num_views * size * size * 4 * 4  # rgb and mask, float32
    return {
        "text to image, 40 calls": _work(
            image.num_steps * call(guided["image"], 1), image.num_steps * weights
        ),
        "first video, denoise": _work(video.num_steps * of_video, video.num_steps * weights),
        "rounds, denoise": _work(steps * of_video, steps * weights),
        "autoencoder, decode": _work(passes * once),
        "autoencoder, encode": _work(passes * back),
        "views to the worker": _work(0, passes * 2 * view_bytes),
        "targets": _work(0, passes * 2 * view_bytes),
        "fit": _work(settings.num_steps * fit_step_flops(size, settings), dtype="float32"),
    }


def _work(flops: float, moved: float = 0.0, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"flops": float(flops), "bytes": float(moved), "dtype": dtype}


def fit_step_flops(size: int, settings: FitSettings) -> float:
    """FLOPs of LPIPS on one render, forward and backward, which are nearly all of a step's arithmetic."""
    perceptual = PerceptualDistance(settings.lpips_net).rounded(torch.float32, settings.lpips_stages)
    side = min(size, 128)  # FLOPs are proportional to the number of pixels
    image = torch.rand(1, side, side, 3, requires_grad=True)
    with torch.no_grad():
        target = perceptual.features(torch.rand(1, side, side, 3))
    counter = FlopCounterMode(display=False)
    with counter:
        perceptual.distance(image, target).sum().backward()
    return counter.get_total_flops() * (size / side) ** 2


def main() -> None:
    flags = gpu_machine.parse(gpu_machine.arguments(__doc__))
    rates = gpu_machine.measure_rates(flags.small)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as directory:
        config = gpu_paper.load_config(Path(directory), flags.small)
        result = gpu_machine.describe() | {"rates": rates._asdict()}
        result |= measure(config, rates)
    gpu_machine.write(flags.json, result)
    print(gpu_machine.table(result["stages"]))
    print({name: value for name, value in result.items() if name not in ("stages", "versions")})


def measure(config: ConfigDict, rates: gpu_machine.Rates) -> dict[str, Any]:
    """Makes two assets with one generator and one worker; see the module's docstring."""
    settings, cameras = FitSettings(**config.fit), orbit(config.num_views, ELEVATION_RAD, config.size)
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    watched, loading = Stages(), time.perf_counter()
    with gpu_machine.PeakMemory() as memory, ReconClient(cameras, settings) as client:
        loaded = generator.load(config, params=gpu_paper.random_params(model))
        loading = time.perf_counter() - loading
        watch_all(watched, type(loaded.codec), client)
        until_steps = pipeline.read_settings(config).until_steps
        seconds = []
        for number in range(2):
            watched.clear()
            loaded = loaded.counting()
            seconds.append(make_asset(loaded, client, jax.random.key(number), cameras, until_steps))
            print(f"asset {number}: {seconds[-1]:.2f} s", flush=True)
        peak = dict(memory.peak_bytes)
        processes = {"diffusion": peak.get(os.getpid(), 0), "worker": peak.get(client.pid, 0)}
        num_gaussians = client.num_gaussians
    work = floors(loaded, settings)
    rows = [
        gpu_machine.Stage(name, each, **work.get(name, {})).record(rates) | {"calls": watched.calls[name]}
        for name, each in watched.seconds.items()
    ]
    rest = seconds[1] - sum(watched.seconds.values())
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "stages": [*rows, gpu_machine.Stage("host, everything else", rest).record(rates)],
        "seconds_first": seconds[0],
        "seconds_second": seconds[1],
        "seconds_paper_method": seconds[1] - watched.seconds["text to image, 40 calls"],
        "seconds_loading": loading,
        "floor_seconds": sum(row["floor_seconds"] for row in rows),
        "network_calls": loaded.count.calls - config.text_to_image.num_steps,
        "copies_to_worker": watched.calls["views to the worker"],
        "reads_without_copy": watched.calls["renders to JAX, no copy"],
        "num_gaussians": num_gaussians,
        "reserved_bytes_by_process": processes,
        "jax_peak_bytes": statistics.get("peak_bytes_in_use", 0),
    }


if __name__ == "__main__":
    main()
