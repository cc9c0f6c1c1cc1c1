"""Describes a GPU machine and measures its ceilings, which bound from below the time that work takes on it.

    python benchmarks/gpu_machine.py --json machine.json       # versions, devices, DLPack, measured ceilings
    python benchmarks/gpu_machine.py --small                   # the same code on a CPU

The other `gpu_` benchmarks divide their times by floors. A floor is the number of operations over the
measured matrix rate, or of bytes over the measured bandwidth of memory, whichever takes longer.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "torchvision", "triton", "gsplat", "lpips",
    "numba", "diffusers", "transformers", "grain", "clu", "ml_collections", "numpy",
)  # fmt: skip
SIDE, COPIED_BYTES = 8192, 4 * 2**30
SMALL_SIDE, SMALL_COPIED_BYTES = 512, 64 * 2**20
POLL_S = 0.1


class Rates(NamedTuple):
    """Measured ceilings of a device: FLOP/s of matrix products, and bytes/s that a copy reads and writes."""

    bfloat16: float
    float32: float  # in the mode in which libraries compute float32 convolutions, tf32 on a GPU
    bandwidth: float


class Stage(NamedTuple):
    """A part of a program: the seconds that it took, and the FLOPs and bytes that it cannot do without."""

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "bfloat16"

    def bound(self, rates: Rates) -> tuple[str, float]:
        """What bounds the stage, "matrix rate" or "bandwidth", and the least seconds that this allows."""
        floors = {
            "matrix rate": self.flops / getattr(rates, self.dtype),
            "bandwidth": self.bytes / rates.bandwidth,
        }
        name = max(floors, key=floors.get)
        return name, floors[name]

    def record(self, rates: Rates) -> dict:
        """A row of the JSON file and of `table`; `ratio` is the measured time over the floor."""
        bound, floor = self.bound(rates)
        ratio = self.seconds / floor if floor else None
        return self._asdict() | {"bound_by": bound if floor else "", "floor_seconds": floor, "ratio": ratio}


def table(records: list[dict]) -> str:
    """The records of stages as lines of text."""
    lines = [f"{'stage':<34} {'s':>9} {'TFLOP':>9} {'GB':>8} {'floor, s':>9} {'ratio':>7}  bound by"]
    for each in records:
        ratio = f"{each['ratio']:7.2f}" if each["ratio"] else f"{'':>7}"
        work = f"{each['flops'] / 1e12:9.2f} {each['bytes'] / 1e9:8.2f} {each['floor_seconds']:9.4f}"
        lines.append(f"{each['name']:<34} {each['seconds']:9.4f} {work} {ratio}  {each['bound_by']}")
    return "\n".join(lines)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
    """The median time of a call of `function`, which must wait for its work itself if that is JAX's."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])


def measure_rates(small: bool) -> Rates:
    """Measures with random numbers, because products of zeros run faster."""
    side, copied = (SMALL_SIDE, SMALL_COPIED_BYTES) if small else (SIDE, COPIED_BYTES)
    torch.backends.cuda.matmul.allow_tf32 = True
    flops = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
        flops.append(2 * side**3 / median_seconds(lambda a=a, b=b: a @ b))
    source = torch.rand(copied // 4, device=device())
    target = torch.empty_like(source)
    return Rates(*flops, 2 * copied / median_seconds(lambda: target.copy_(source)))


def versions() -> dict[str, str]:
    """The versions of Python, CUDA and the packages that matter, without those that are not installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict:
    """The device, versions and date, which go into the results of every benchmark."""
    import jax

    on_gpu = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip() if on_gpu else "",
        "jax_devices": [str(each) for each in jax.devices()],
        "versions": versions(),
    }


def dlpack_shares_memory() -> bool:
    """Whether JAX and torch read each other's arrays without a copy."""
    import jax.numpy as jnp

    from im3d_jax import bridge

    tensor = torch.arange(1024, dtype=torch.float32, device=device())
    synchronize()
    array = bridge.as_jax(tensor)
    doubled = (array * 2).block_until_ready()
    back = torch.from_dlpack(doubled)
    same = back.data_ptr() == doubled.unsafe_buffer_pointer()
    return bool(same and jnp.array_equal(doubled, 2 * jnp.arange(1024)) and (back == 2 * tensor).all())


class PeakMemory:
    """Records the peak GPU memory of each process, by its id; there is none where nothing can measure it."""

    def __init__(self) -> None:
        self.peak_bytes: dict[int, int] = {}
        self._is_over = threading.Event()

    def __enter__(self) -> PeakMemory:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # there is no package, no driver or no GPU
            return self
        self._thread = threading.Thread(target=self._poll, args=(pynvml, handle), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()

    def _poll(self, pynvml, handle) -> None:
        while not self._is_over.wait(POLL_S):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                used = process.usedGpuMemory or 0
                self.peak_bytes[process.pid] = max(used, self.peak_bytes.get(process.pid, 0))


def write(path: Path | None, result: dict) -> None:
    """Writes the result as JSON, if there is a path: whole or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1, default=str))
        temporary.replace(path)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all `gpu_` benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options. Without a GPU or `--small` it says so and exits with 0, so that `make bench` goes on."""
    flags = parser.parse_args()
    if not flags.small and not torch.cuda.is_available():
        print(f"{parser.prog} needs a CUDA GPU; --small runs the same code on a CPU")
        raise SystemExit(0)
    return flags


def main() -> None:
    flags = parse(arguments(__doc__))
    rates = measure_rates(flags.small)
    result = describe() | {"rates": rates._asdict(), "dlpack_shares_memory": dlpack_shares_memory()}
    write(flags.json, result)
    print(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
