"""Several assets fitted in a batch against the same ones after each other: steps a second, and the ratio.

    python benchmarks/fits_together.py                                  # 4 assets at 64 and 128 px
    python benchmarks/fits_together.py --assets 1 4 16 --sizes 512      # on a GPU

Test objects, true views. Each way fits the same objects from their start in turns, after a warm-up; "cpu" is
the processor time of the process, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from im3d_jax.data import objects, procedural
from recon_torch.fit.optimization import Fit, run_together
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

NUM_VIEWS, WARM_UP_STEPS = 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", nargs="+", type=int, default=[4], metavar="N")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], metavar="PX")
    parser.add_argument("--num-steps", type=int, default=200, help="of each fit (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(f"{flags.threads} thread(s)\n")
    print("| px | assets | one by one, s | batch, s | ratio | one by one, cpu s | batch, cpu s | ratio |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for size in flags.sizes:
        for count in flags.assets:
            row = compare(size, count, flags.num_steps)
            print(f"| {size} | {count} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)


def compare(size: int, count: int, num_steps: int) -> list[float]:
    """Wall seconds one by one and in a batch, their ratio, and the same of processor seconds."""
    last = WARM_UP_STEPS + num_steps

    def one_by_one(fits: list[Fit]) -> None:
        for fit in fits:
            fit.run(last)

    alone = seconds(one_by_one, new_fits(size, count))
    batch = seconds(lambda fits: run_together(fits, last), new_fits(size, count))
    return [value for a, b in zip(alone, batch, strict=True) for value in (a, b, a / b)]


def new_fits(size: int, count: int) -> list[Fit]:
    first = objects.SPLITS["test"][0]
    made = procedural.turntables(0, list(range(first, first + count)), size=size, num_views=NUM_VIEWS)
    fits = []
    for index in range(count):
        settings = FitSettings(seed=index, lpips_weights="random")
        fits.append(Fit(orbit(NUM_VIEWS, float(made.elevation_rad[index]), size), settings))
        fits[-1].set_targets(*(torch.tensor(np.array(each[index])) for each in made.views[:2]))
        fits[-1].run(WARM_UP_STEPS)
    return fits


def seconds(action: Callable[[list[Fit]], None], fits: list[Fit]) -> tuple[float, float]:
    """Seconds of wall clock time and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    action(fits)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
