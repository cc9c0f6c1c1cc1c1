"""What training costs: steps with and without frozen layers, meshes, waiting for data, saves and restarts.

    python benchmarks/training.py                 # all parts, in some minutes on a CPU
    python benchmarks/training.py --parts steps   # one part: steps, loop or mesh

steps  seconds of a compiled step of the tiny model's turntable stage, where everything trains, temporal
       layers alone, or a LoRA: as it is computed here, and with its adapters merged within the step
loop   `im3d train` itself: steps and frames per second, the share of time that waits for data, how long a
       save holds the loop up, and how long a restart takes until its first step
mesh   FLOPs, and bytes of arguments and of temporary memory, on each device of a mesh of 1, 2, 4 and 8
       virtual devices, from the compiled program. Their time means nothing on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # JAX is imported late: its number of devices is fixed when it starts
    from jax.stages import Compiled

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs/tiny_turntable.py")
WEIGHTS = str(ROOT / "im3d_jax/weights/tiny.safetensors")
KINDS = ("everything", "temporal only", "LoRA, factored", "LoRA, merged")


def what_trains(kind: str) -> Any:
    """What a row of the table trains. LoRAs are of rank 16, of attention and feed-forward layers."""
    from im3d_jax.lora.adapters import Adapters
    from im3d_jax.trainable import Part
    from im3d_jax.training_settings import LoraSettings

    class Merged(Adapters):
        """The adapters, whose products are added to the kernels within the step."""

        def call(self, function, frozen, trained):
            return function(self.join(frozen, trained))

    adapters = (16, 16.0, LoraSettings().targets)
    made = Part(".*"), Part("temporal"), Adapters(*adapters), Merged(*adapters)
    return dict(zip(KINDS, made, strict=True))[kind]


def prepared(
    kind: str, mesh_text: str, batch_size: int
) -> tuple[Compiled, list[Any], float, dict[str, float]]:
    """A compiled step, its arguments, the seconds that it took to compile, and MB of its arrays by name."""
    import jax
    import numpy as np

    from im3d_jax import config_flags, config_sections, sharding, tasks
    from im3d_jax.training.feed import over_mesh
    from im3d_jax.training.state import OptimizerSettings, create, learning_rate, make_optimizer
    from im3d_jax.training.step import make_step
    from im3d_jax.training.streams import open_stream
    from im3d_jax.training_settings import TrainSettings

    config = config_flags.load(CONFIG)
    config.train.streams.turntable.batch_size = batch_size
    settings = config_sections.settings(config, "train", TrainSettings)
    mesh = sharding.make_mesh(sharding.parse_mesh(mesh_text, jax.device_count()))
    task, rates = tasks.build(config, mesh), OptimizerSettings.of(settings)
    optimizer, trains = make_optimizer(rates), what_trains(kind)
    state, frozen = create(
        task.init,
        task.load(WEIGHTS),
        task.partition_rules,
        mesh,
        optimizer,
        trains=trains,
        frozen_dtype="float32",
        key=jax.random.key(0),
    )
    examples = next(
        open_stream(
            settings.streams["turntable"],
            mesh,
            seed=config.seed,
            size=config.size,
            **vars(settings.loader),
        )
    )
    batch = over_mesh(task.collate(examples), mesh)
    where = jax.tree.map(lambda array: array.sharding, state)
    step = make_step(
        task,
        optimizer,
        mesh,
        trains=trains,
        where=where,
        rate=learning_rate(rates),
        accumulate=1,
        ema_decay=0.99,
    )
    arguments = [state, frozen, task.constants, batch]
    started = time.perf_counter()
    compiled = step.lower(*arguments, task.stream("turntable")).compile()
    seconds = time.perf_counter() - started
    held = {name: sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6
            for name, tree in zip(("state", "frozen"), (state, frozen), strict=True)}  # fmt: skip
    return compiled, arguments, seconds, held


def measure_steps(repeats: int, batch_size: int) -> None:
    """Times all kinds of step in turns, so that what else the machine does slows all down alike."""
    import jax

    kinds = {kind: prepared(kind, "data=1", batch_size) for kind in KINDS}
    seconds = {name: [] for name in kinds}
    for _ in range(repeats + 1):
        for name, (compiled, arguments, *_) in kinds.items():
            started = time.perf_counter()
            arguments[0], metrics = compiled(*arguments)
            jax.block_until_ready((arguments[0], metrics))
            seconds[name].append(time.perf_counter() - started)
    print(f"\none step, {batch_size} turntables of 16 views, {os.cpu_count()} cores (median of {repeats})")
    print(f"{'trains':<15} {'s':>7} {'frames/s':>9} {'GFLOP':>8} {'state, MB':>10} {'compile, s':>11}")
    medians = {}
    for name, (compiled, _, compile_s, held) in kinds.items():
        median = medians[name] = sorted(seconds[name][1:])[repeats // 2]
        flops = compiled.cost_analysis()["flops"] / 1e9
        rate = 16 * batch_size / median
        print(f"{name:<15} {median:7.3f} {rate:9.1f} {flops:8.1f} {held['state']:10.1f} {compile_s:11.1f}")
    print(
        f"temporal only against everything: {medians['everything'] / medians['temporal only']:.2f}x as fast"
    )


def measure_loop(num_steps: int) -> None:
    """Runs `im3d train` twice, each time in a process of its own: from the start, and as a restart.

    The restart finds its programs in JAX's compilation cache.
    """
    with tempfile.TemporaryDirectory() as workdir:
        flags = [
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            f"--config.train.init_from={WEIGHTS}",
            f"--config.train.checkpoint.every={num_steps // 2}",
            "--config.train.log_every=1",
            "--config.train.streams.image.every=100000",
        ]
        for count in (num_steps, num_steps + 2):
            command = [sys.executable, "-m", "im3d_jax", "train", *flags, f"--config.train.num_steps={count}"]
            started = time.perf_counter()
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{workdir}/compiled"}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            for line in process.stdout:
                if line.startswith("step "):
                    first = time.perf_counter() - started
                    break
            process.stdout.read()
            assert process.wait() == 0
            print(
                f"{'start' if count == num_steps else 'restart'}: {first:.1f} s until the first step is done"
            )
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    seconds = {line["step"]: line["step_seconds"] for line in lines}
    plain = sorted(seconds[s] for s in range(4, num_steps) if s != num_steps // 2 + 1)
    median = plain[len(plain) // 2]
    waits = [line["data_wait_share"] for line in lines[3:num_steps]]
    print(f"step {median:.3f} s, {64 / median:.1f} frames/s; waiting for data {sum(waits) / len(waits):.1%}")
    stall = seconds[num_steps // 2 + 1] - median
    print(f"a save holds the loop up for {stall:.2f} s ({stall / median:.1f} steps)")


def measure_mesh(batch_size: int) -> None:
    """Measures each mesh in a process of its own, because the number of devices is fixed when JAX starts."""
    print(f"\none step of {batch_size} turntables, temporal layers only, on each device of a mesh")
    print(f"{'mesh':<22} {'GFLOP':>8} {'arguments, MB':>14} {'temporary, MB':>14}")
    for count, mesh in ((1, "data=1"), (2, "data=2"), (4, "data=4"), (8, "data=8"), (8, "data=2,fsdp=4"),
                        (8, "data=2,fsdp=2,tensor=2")):  # fmt: skip
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command = [sys.executable, __file__, "--one-mesh", mesh, "--batch-size", str(batch_size)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        print(done.stdout.splitlines()[-1], flush=True)


def print_mesh(mesh: str, batch_size: int) -> None:
    compiled, *_ = prepared("temporal only", mesh, batch_size)
    memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
    sizes = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    print(f"{mesh:<22} {flops / 1e9:8.2f} {sizes[0]:14.1f} {sizes[1]:14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=("steps", "loop", "mesh"), choices=("steps", "loop", "mesh")
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--one-mesh", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one_mesh:
        print_mesh(flags.one_mesh, flags.batch_size)
        return
    if "steps" in flags.parts:
        measure_steps(flags.repeats, 4)
    if "loop" in flags.parts:
        measure_loop(12)
    if "mesh" in flags.parts:
        measure_mesh(flags.batch_size)


if __name__ == "__main__":
    main()
