"""Objects read per second from a data set, beside a plain Pillow loop over the directories it was built from.

    python benchmarks/data.py                        # 64 px and 512 px, 16 views
    python benchmarks/data.py --sizes 256 --threads 1,2,4,8

Both give 16 views of an object as float32 over white, with their alpha. The loop reads the objects in order,
in one thread. The data set is read in shuffled order, record by record, and once more by the input pipeline
of training with --threads threads. All files are in the system's cache, so this measures decoding and not a
disk. The numbers are those of the best of --repeats passes, by the clock and by the time of the processor.
The latter says what one core does, whatever else the machine is busy with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from im3d_jax.commands import dataset
from im3d_jax.data.input_pipeline import Shard, open_stream
from im3d_jax.data.turntables import TurntableSource

PIXELS = 2**18  # in one view of all objects together: 64 objects of 64 px, but at least MIN_OBJECTS
MIN_OBJECTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="64,512", help="comma-separated sides of the views in pixels")
    parser.add_argument("--threads", default="1,2", help="comma-separated numbers of threads of the pipeline")
    parser.add_argument("--repeats", type=int, default=3, help="passes of which the best counts")
    flags = parser.parse_args()
    print(
        f"{'px':>4} {'kB an object':>13} | {'read by':>20} {'objects/s':>10} {'per core':>9} "
        f"{'against loop':>13}"
    )
    for size in map(int, flags.sizes.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            views, data = Path(directory, "views"), Path(directory, "data")
            count = max(MIN_OBJECTS, PIXELS // size**2)
            with contextlib.redirect_stdout(io.StringIO()):
                dataset.main(f"render --procedural {count} --size {size} --out {views}".split())
                dataset.main(f"build --views {views} --out {data} --split train=1".split())
            measure(size, count, views, data, [int(each) for each in flags.threads.split(",")], flags.repeats)


def measure(size: int, count: int, views: Path, data: Path, threads: list[int], repeats: int) -> None:
    """Prints the rows of the table for one size."""
    source = TurntableSource(data)
    stored = sum(path.stat().st_size for path in data.iterdir()) / count
    readers = {"Pillow loop": lambda: pillow_loop(views), "records": lambda: read_records(source)}
    for number in threads:
        readers[f"pipeline, {number} thread" + "s" * (number > 1)] = lambda number=number: stream(
            source, number
        )
    loop = None
    for name, read in readers.items():
        seconds, cpu_seconds = best_seconds(read, repeats)
        loop = loop or cpu_seconds
        row = (
            f"{size:4d} {stored / 1e3:13.1f} | {name:>20} {count / seconds:10.1f} {count / cpu_seconds:9.1f}"
        )
        print(f"{row} {loop / cpu_seconds:12.2f}x", flush=True)


def pillow_loop(views: Path) -> None:
    for directory in sorted(path for path in views.iterdir() if path.is_dir()):
        frames = [np.asarray(Image.open(path)) for path in sorted((directory / "images").iterdir())]
        rgba = np.stack(frames).astype(np.float32) / 255
        rgba[..., :3] = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def read_records(source: TurntableSource) -> None:
    for index in np.random.default_rng(0).permutation(len(source)):
        source[int(index)]


def stream(source: TurntableSource, num_threads: int) -> None:
    settings = dict(seed=0, batch_size=1, shard=Shard(0, 1), shuffle=True, max_corrupt=0)
    batches = open_stream(source, num_threads=num_threads, buffer=2 * num_threads, **settings)
    for _ in range(len(source)):
        next(batches)
    batches.close()


def best_seconds(read: Callable[[], None], repeats: int) -> tuple[float, float]:
    """The least seconds by the clock, and the least of the processor's time."""
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        read()
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu_begin)
    return min(seconds), min(cpu_seconds)


if __name__ == "__main__":
    main()
