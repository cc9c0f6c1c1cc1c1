"""The CPU rasteriser against the reference in torch, in the same run: milliseconds forward and with backward.

    python benchmarks/rasterizer.py                              # 5k at 64 px, 10k at 128 px, 20k at 256 px
    python benchmarks/rasterizer.py --cases 5000x64 --views 16   # the shipped model's case, all views at once
    python benchmarks/rasterizer.py --threads 1 --no-reference

The scene is a ball of random Gaussians, which are smaller if there are more of them, as in a fit. A time is
the best of --repeats calls, each of which renders all views; the reference runs twice, and the second counts.
"""

from __future__ import annotations

import argparse
import time

import torch

from recon_torch.raster.gaussians import Activated
from recon_torch.raster.render import render
from recon_torch.settings import Engine
from recon_torch.views.cameras import orbit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default="5000x64,10000x128,20000x256", help="comma-separated GAUSSIANSxPIXELS"
    )
    parser.add_argument("--views", type=int, default=1, help="cameras per call")
    parser.add_argument("--opacity", type=float, default=0.5, help="of every Gaussian, from 0 to 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-reference", action="store_true", help="leave out the slow reference")
    flags = parser.parse_args()

    torch.set_num_threads(flags.threads)
    print(f"{flags.views} view(s), {flags.threads} thread(s), opacity {flags.opacity}")
    print(f"{'Gaussians':>9} {'px':>4} | {'cpu forward':>12} {'+ backward':>12} |"
          f" {'ref. forward':>12} {'+ backward':>12} | {'forward':>8} {'both':>8}")  # fmt: skip
    for case in flags.cases.split(","):
        count, size = (int(number) for number in case.split("x"))
        forward, both = time_engine(Engine.CPU, count, size, flags.views, flags.opacity, flags.repeats)
        row = f"{count:9d} {size:4d} | {forward:9.2f} ms {both:9.2f} ms |"
        if not flags.no_reference:
            slow_forward, slow_both = time_engine(Engine.TORCH, count, size, flags.views, flags.opacity, 1)
            row += f" {slow_forward:9.0f} ms {slow_both:9.0f} ms |"
            row += f" {slow_forward / forward:7.0f}x {slow_both / both:7.0f}x"
        print(row, flush=True)


def time_engine(
    engine: Engine, count: int, size: int, views: int, opacity: float, repeats: int
) -> tuple[float, float]:
    """Best milliseconds of a forward pass, and of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    gaussians = Activated(
        directions * 0.5 * torch.rand(count, 1, generator=generator) ** (1 / 3),
        torch.randn(count, 4, generator=generator),
        (0.5 + torch.rand(count, 3, generator=generator)) * 0.25 / count ** (1 / 3),
        torch.full((count,), opacity),
        torch.rand(count, 3, generator=generator),
    )
    for tensor in gaussians:
        tensor.requires_grad_()
    cameras = orbit(views, 0.3, size)
    target = torch.rand(views, size, size, 3, generator=generator)
    forward, both = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        rgb = render(gaussians, cameras, engine=engine).rgb
        forward.append(time.perf_counter() - begin)
        torch.autograd.grad(rgb, gaussians, target)
        both.append(time.perf_counter() - begin)
    return 1e3 * min(forward[1:]), 1e3 * min(both[1:])


if __name__ == "__main__":
    main()
