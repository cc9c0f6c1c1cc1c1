"""Wall time of `im3d batch --ray` against static shards, with stand-in assets that only wait.

    python benchmarks/cluster.py                 # 64 assets on 4 actors or shards, in this machine
    python benchmarks/cluster.py --seconds 0.5 --num-assets 32

Each is run twice: with actors of equal speed, and with one that is five times slower. The time counts from
the first asset that is begun to the last that is done, so that it holds no start of processes.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from im3d_jax import asset, config_flags, pipeline
from im3d_jax.asset import ASSET, REPORT, Asset, Request
from im3d_jax.jobs import batch
from im3d_jax.jobs.making import InProcess, Making
from im3d_jax.jobs.stop import Stop
from im3d_jax.settings import AssetSettings
from im3d_jax.stages import Show
from recon_torch import outputs
from recon_torch.files import write_json
from recon_torch.views.cameras import orbit

NUM_ACTORS = 4
TIMES_SLOWER = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-assets", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0, help="that an asset takes")
    flags = parser.parse_args()
    print(f"{flags.num_assets} assets of {flags.seconds} s, {NUM_ACTORS} actors or shards")
    print(f"{'':<26}{'shards, s':>11}{'actors, s':>11}{'ratio':>8}")
    for what, slower in (("equal", 1), (f"one {TIMES_SLOWER} times slower", TIMES_SLOWER)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "prompts.txt").write_text("a duck\n" * flags.num_assets)
            shards_s = of_shards(root, flags.seconds, slower)
            actors_s = of_actors(root, flags.seconds, slower)
        print(f"{what:<26}{shards_s:>11.1f}{actors_s:>11.1f}{actors_s / shards_s:>8.2f}", flush=True)


# ---- The stand-in ----


class Client:
    """Takes the place of a 3D worker."""

    def close(self) -> None:
        pass


class StandIn(NamedTuple):
    """A `lanes.Maker` whose assets are nothing but their reports. seconds: that an asset takes."""

    settings: AssetSettings
    seconds: float = 0.0

    def warnings(self, prompt: str) -> list[str]:
        return []

    def start_client(self) -> Client:
        return Client()

    def make_best(self, request: Request, client: Client, *, num_retries: int, show: Show) -> Asset:
        begun = time.time()
        time.sleep(self.seconds)
        report = {
            **asset.origin(request, asset.images_digest(request), self.settings.config_digest),
            "image": request.image,
            "quality": {"verdict": "good", "reasons": [], "hints": []},
            "rounds": [{"psnr": 20.0}],
            "seconds": {"total": self.seconds},
            "begun": begun,
            "done": time.time(),
        }
        outputs.put(request.out, ASSET, REPORT, partial(write_json, content=report))
        return Asset(request.out, report, orbit(1), [])


def load(settings: AssetSettings, seconds: float, slower: int, claims: Path) -> StandIn:
    """In an actor. The first one to claim it is the slow one."""
    try:
        (claims / "slow").touch(exist_ok=False)
        return StandIn(settings, seconds * slower)
    except FileExistsError:
        return StandIn(settings, seconds)


# ---- What is timed ----


def of_shards(root: Path, seconds: float, slower: int) -> float:
    """Seconds of a process for each static shard, as an array of SLURM starts them."""
    context = multiprocessing.get_context("spawn")
    shards = [
        context.Process(target=run_shard, args=(root, number, seconds * (slower if number == 0 else 1)))
        for number in range(NUM_ACTORS)
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    return wall_s(root / "shards")


def run_shard(root: Path, number: int, seconds: float) -> None:
    settings = read_settings()
    asked = batch.Batch(root / "prompts.txt", root / "shards", f"{number}/{NUM_ACTORS}")
    run(asked, settings, InProcess(partial(StandIn, settings, seconds)))


def of_actors(root: Path, seconds: float, slower: int) -> float:
    """Seconds of as many actors on a Ray cluster of this machine."""
    import ray

    from im3d_jax.cluster.crew import connected
    from im3d_jax.cluster.making import Cluster, Needs, OnCluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a script
    settings = read_settings()
    asked = batch.Batch(root / "prompts.txt", root / "actors", "0/1")
    cluster = Cluster("auto", Needs(max_actors=NUM_ACTORS), min_actors=NUM_ACTORS)
    making = OnCluster(cluster, partial(load, settings, seconds, slower, root), settings, asked)
    with connected("local", NUM_ACTORS):
        run(asked, settings, making)
    return wall_s(root / "actors")


def run(asked: batch.Batch, settings: AssetSettings, making: Making) -> None:
    with Stop() as stop:
        if batch.run(asked, settings, making, stop):
            raise SystemExit("not all assets were made")


def read_settings() -> AssetSettings:
    return pipeline.read_settings(config_flags.with_overrides("configs/tiny.py", {}))


def wall_s(out: Path) -> float:
    """From the first asset that was begun to the last that was done."""
    reports: Sequence[dict] = [json.loads(path.read_text()) for path in out.glob(f"assets/*/{REPORT}")]
    return max(each["done"] for each in reports) - min(each["begun"] for each in reports)


if __name__ == "__main__":
    main()
