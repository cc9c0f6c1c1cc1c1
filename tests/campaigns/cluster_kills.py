"""Kills parts of a job on a Ray cluster at random moments, and prints what came of its assets.

    python tests/campaigns/cluster_kills.py                                # 100 assets, 20 kills
    python tests/campaigns/cluster_kills.py --num-assets 12 --kills 4

The cluster has four raylets in this machine, of which one joins when the job runs already. SIGKILL meets
actors, their 3D workers, raylets and the driver. Another raylet takes the place of one that is killed, and
the driver is started again by the same command. The assets are made by the whole method, with a network as
small as can be and few steps. In the end

    made once   assets whose report.json was written once, however often it was begun
    equal       assets whose files have the bytes of a batch without a cluster that nobody killed
    left        temporary files and directories: after the job, and after one more asset
    orphans     actors and 3D workers that still live ten seconds after the driver has ended

The exit code is 1 unless all assets were made once and are equal, and nothing is left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kills import ORPHANS_AFTER_S, ROOT, Lab, is_running, without_reports, workers_of
from kills import files as files_of

NUM_NODES = 4
SHARES = {"actor": 8, "worker": 6, "raylet": 3, "driver": 3}
"""How many of twenty kills meet what."""

FEW_STEPS = ("--config.fit.num_steps=40", "--config.rounds.at_steps=(20,)")
LONGEST_S = 3600.0


class Nodes:
    """The raylets, of which the first is the head's. It makes no assets and is not killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address = self._cluster.address
        self._raylets: list[Any] = []

    def join(self) -> None:
        """Adds a raylet. Ray gives it 30 s to start, which a busy machine may exceed."""
        node = self._cluster.add_node(wait=False, num_cpus=1)
        self._raylets.append(node)

    def kill(self, rng: random.Random) -> int:
        """Kills a raylet; another one joins."""
        node = self._raylets.pop(rng.randrange(len(self._raylets)))
        pid = node.all_processes["raylet"][0].process.pid
        self._cluster.remove_node(node, allow_graceful=False)
        self.join()
        return pid

    def close(self) -> None:
        self._cluster.shutdown()


class Driver:
    """`im3d batch --ray`, which is started again when it is killed."""

    def __init__(self, lab: Lab, command: list[object]) -> None:
        self._lab, self._command = lab, command
        self.lines: list[str] = []  # of stderr
        self.begin()

    def begin(self) -> None:
        self._process = self._lab.start(*self._command)

    def look(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.poll()

    def kill(self) -> int:
        self._process.kill()
        self.end()
        return self._process.pid

    def end(self) -> None:
        self._process.wait()
        self.lines += self._lab.log().splitlines()


class Reports:
    """How often the report of each asset was written: files that take another's place are others."""

    def __init__(self, assets: Path) -> None:
        self._assets = assets
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def look(self) -> int:
        """How many there are."""
        for path in self._assets.glob("*/report.json"):
            found = path.stat()
            self._seen.setdefault(path.parent.name, set()).add((found.st_ino, found.st_mtime_ns))
        return len(self._seen)

    @property
    def times(self) -> Counter[int]:
        return Counter(len(each) for each in self._seen.values())


def actors() -> list[int]:
    """The processes of actors that have a 3D worker, of clusters below this process or beside it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::AssetActor") and is_running(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def own_actors(lab: Lab) -> list[int]:
    """Those of this campaign: others may run in the machine, too."""
    mine = []
    for pid in actors():
        try:
            if str(lab.directory).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                mine.append(pid)
        except OSError:
            continue
    return mine


def kill(what: str, lab: Lab, nodes: Nodes, driver: Driver, rng: random.Random) -> bool:
    """Kills something of a kind. Returns whether there was any."""
    if what == "raylet":
        nodes.kill(rng)
        return True
    if what == "driver":
        if driver.look() is not None:
            return False
        driver.kill()
        driver.begin()
        return True
    found = own_actors(lab)
    if what == "worker":
        found = [worker for actor in found for worker in workers_of(actor)]
    if found:
        os.kill(rng.choice(found), signal.SIGKILL)
    return bool(found)


def run(lab: Lab, nodes: Nodes, command: list[object], out: Path, num_assets: int, kills: list[str]) -> int:
    """Runs the job to its end, and kills as it goes.

    Returns how many drivers ended by themselves too early, and assets that were not written once.
    """
    rng = lab.rng
    moments = sorted(rng.uniform(0, 0.95) for _ in kills)  # shares of the assets
    reports, driver = Reports(out / "assets"), Driver(lab, command)
    began, restarts, joined, done = time.monotonic(), 0, NUM_NODES - 1, Counter[str]()
    while time.monotonic() - began < LONGEST_S:
        there = reports.look()
        if joined < NUM_NODES and there >= num_assets // 10:
            nodes.join()
            joined += 1
        while kills and there / num_assets >= moments[0]:
            time.sleep(rng.uniform(0, 3))
            if not kill(kills[0], lab, nodes, driver, rng):
                break  # it will be there in a moment
            done[kills[0]] += 1
            print(f"{time.monotonic() - began:6.0f} s, {there:3d} made: {kills[0]}", flush=True)
            kills, moments = kills[1:], moments[1:]
        if (code := driver.look()) is not None:
            driver.end()
            if code == 0:
                break
            print(f"the driver ended with {code}: {driver.lines[-1] if driver.lines else ''}", flush=True)
            restarts += 1
            driver.begin()
        time.sleep(0.1)
    reports.look()
    print(f"{time.monotonic() - began:.0f} s; kills: {dict(done)}; written: {dict(reports.times)}")
    noise = [line for line in driver.lines if "ray" in line.lower() and not line.startswith("im3d")]
    print(f"lines of Ray's on the driver's output: {len(noise)}", *noise[:5], sep="\n    ")
    return restarts + sum(times for often, times in reports.times.items() if often != 1)


def orphans(lab: Lab) -> int:
    until = time.monotonic() + ORPHANS_AFTER_S
    while own_actors(lab) and time.monotonic() < until:
        time.sleep(0.2)
    return len(own_actors(lab))


@contextmanager
def cluster(lab: Lab) -> Iterator[Nodes]:
    """Raylets with the lab's environment, in a directory of their own."""
    os.environ.update(lab.environment)
    os.environ.update(RAY_TMPDIR=str(lab.directory), RAY_worker_niceness="0")
    lab.environment = dict(os.environ)
    nodes = Nodes()
    try:
        for _ in range(NUM_NODES - 1):
            nodes.join()
        yield nodes
    finally:
        nodes.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-assets", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    flags = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rng = random.Random(flags.seed)
    kinds = [what for what, count in SHARES.items() for _ in range(count)]
    rng.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="k-", ignore_cleanup_errors=True) as directory:
        lab = Lab(Path(directory), rng)
        lab.prompts.write_text("a red car\na blue mug\na green duck\na yellow chair\n")
        begin = ("batch", f"--config={lab.config}", *FEW_STEPS, "--prompts", lab.prompts)
        begin += ("--num-assets", flags.num_assets // 4)
        expected, out = lab.directory / "expected", lab.directory / "out"
        undisturbed = subprocess.Popen(
            [sys.executable, "-m", "im3d_jax", *map(str, begin), "--out", str(expected)],
            env=lab.environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with cluster(lab) as nodes:
            command = [*begin, "--out", out, "--ray", nodes.address]
            bad = run(lab, nodes, command, out, flags.num_assets, kinds[: flags.kills])
            left_alive = orphans(lab)
        if undisturbed.wait():
            sys.exit("the batch without a cluster failed")
        names = sorted(path.name for path in (expected / "assets").iterdir())
        pairs = [(files_of(expected / "assets" / name), files_of(out / "assets" / name)) for name in names]
        equal = sum(without_reports(a) == without_reports(b) and "report.json" in b for a, b in pairs)
        before = lab.left(out)
        more = ("--prompt", "a red car", "--out", lab.directory / "more")
        lab.finish("generate", f"--config={lab.config}", *FEW_STEPS, *more)  # clears what the last kills left
        left = lab.left(out)
        print(f"equal {equal} of {len(names)}; left {before} -> {left}; orphans {left_alive}", flush=True)
    return int(bool(bad or left or left_alive) or equal != len(names))


if __name__ == "__main__":
    sys.exit(main())
