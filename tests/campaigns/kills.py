"""Kills runs at random moments, starts them again, and prints what was left and whether the bytes are equal.

    python tests/campaigns/kills.py                       # 40 kills, about 15 minutes on two cores
    python tests/campaigns/kills.py --only export worker --share 0.3

It is no test that pytest collects, because it is slow and its moments are random. SIGKILL, which no process
can handle, meets `im3d generate` anywhere and between any two renames of its export, the 3D worker,
`im3d batch` and `im3d train`, all with networks as small as can be. Every run is then given again as it was.
A row has

    kills       how many there were, and how many came too late because the run had ended
    orphans     processes of the run that still lived ten seconds after it was killed
    mixtures    directories whose report.json or error.json stood for files that were not of that asset
    left        temporary files and directories: after the kills, and after the reruns
    equal       reruns whose files have the bytes of a run that nobody killed

The exit code is 1 if there were orphans or mixtures, or if anything was left or unequal after a rerun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILLS = {"parent": 12, "export": 7, "worker": 8, "batch": 8, "training": 5}
PROMPT, OTHER_PROMPT = "a red car", "a blue mug"
ORPHANS_AFTER_S = 10.0
TEMPORARY = ("im3d", "recon_", "pymp-")  # not PyTorch's cache

SMALL = """
from configs import tiny

def get_config():
    config = tiny.get_config()
    config.update(size=32, num_views=4, weights={weights!r}, num_threads=1)
    config.backbone.kwargs.update(latent_shape=(8, 8, 64), model_channels=8, channel_mult=(1,), ff_mult=1,
        num_res_blocks=(0,), attention_levels=(), head_dim=8, temporal_span=("pixel",), text_dims=(8,))
    config.text_to_image.num_steps = 2
    config.video.num_steps = 2
    config.rounds.update(at_steps=(150,), num_runs=1, num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=300)
    config.turntable.update(num_frames=4, size=32)
    return config
"""

SMALL_TRAINING = """
from configs import tiny_turntable

def get_config():
    config = tiny_turntable.get_config()
    config.update(size=8, num_threads=1)
    config.backbone.kwargs.update(latent_shape=(2, 2, 64), model_channels=8, channel_mult=(1,), ff_mult=1,
        num_res_blocks=(0,), attention_levels=(), head_dim=8, temporal_span=("pixel",), text_dims=(8,))
    config.train.update(init_from="", num_steps=60, warmup_steps=0, decay_steps=0, log_every=1)
    config.train.checkpoint.update(every=6, keep=2, keep_every=0, weights_every=20)
    config.train.sample.every = 0
    for name, stream in config.train.streams.items():
        stream.update(batch_size=8, num_views=min(stream.num_views, 3))
    return config
"""

KILLER = """
import os, signal, sys
from im3d_jax import main

left, out = int(sys.argv[1]), sys.argv[2]
rename, counted = os.replace, 0

def replace(source, target):
    global counted
    name = os.path.relpath(target, out)
    if not name.startswith((".im3d_", "..")):
        if counted == left:
            os.kill(os.getpid(), signal.SIGKILL)
        counted += 1
    rename(source, target)

os.replace = replace
code = main.run(sys.argv[3:])
print("renames", counted)
sys.exit(code)
"""


@dataclass
class Row:
    """What a kind of kill has come to. left: (after the kill, after the rerun) of every kill."""

    kills: int = 0
    too_late: int = 0
    orphans: int = 0
    mixtures: int = 0
    left: list[tuple[int, int]] = field(default_factory=list)
    equal: int = 0
    compared: int = 0

    @property
    def is_good(self) -> bool:
        clean = all(after == 0 for _, after in self.left)
        return clean and not self.orphans and not self.mixtures and self.equal == self.compared

    def __str__(self) -> str:
        kills = f"{self.kills} ({self.too_late} too late)"
        left = " -> ".join(str(sum(each)) for each in zip(*self.left, strict=True))
        equal = f"{self.equal} of {self.compared}"
        return f"{kills:<18}{self.orphans:>8}{self.mixtures:>10}{left:>12}{equal:>12}"


class Lab:
    """A directory for everything, with small configs, and runs of `im3d` in it."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.directory, self.rng = directory, rng
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.config, self.training = directory / "small.py", directory / "small_training.py"
        weights = directory / "weights.safetensors"
        self.config.write_text(SMALL.format(weights=str(weights)))
        self.training.write_text(SMALL_TRAINING)
        self.environment = os.environ | {
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.prompts = directory / "prompts.txt"
        self.prompts.write_text("a red car\na blue mug\na green duck\n")
        write_weights(self.config, weights)

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Starts `im3d COMMAND`, or Python with what begins with -c. Its output goes to log.txt."""
        words = list(map(str, command))
        python = [sys.executable] if words[0] == "-c" else [sys.executable, "-m", "im3d_jax"]
        with open(self.directory / "log.txt", "wb") as log:
            return subprocess.Popen(
                [*python, *words], env=self.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self, *command: object, codes: tuple[int, ...] = (0,)) -> float:
        """Runs a command to its end. Returns its seconds."""
        began = time.monotonic()
        code = self.start(*command).wait()
        if code not in codes:
            sys.exit(f"{' '.join(map(str, command))} ended with {code}:\n{self.log()}")
        return time.monotonic() - began

    def log(self) -> str:
        return (self.directory / "log.txt").read_text(errors="replace")

    def left(self, *outs: Path) -> int:
        """How many temporary files and directories there are."""
        hidden = [path for out in outs for path in out.rglob(".im3d*") if path.name != ".im3d.json"]
        nested = [path for path in hidden if any(each.name.startswith(".im3d_") for each in path.parents)]
        temporary = [path for path in self.temporary.iterdir() if path.name.startswith(TEMPORARY)]
        return len(hidden) - len(nested) + len(temporary)

    def moments(self, count: int, seconds: float) -> list[float]:
        """Random moments, one in each of equal parts of some seconds."""
        return [seconds * (number + self.rng.random()) / count for number in range(count)]


# ---- Kinds of kills ----


def parent(lab: Lab, kills: int) -> Row:
    """`im3d generate` at any moment."""
    row, out = Row(), lab.directory / "parent"
    command = generate(lab, PROMPT, out)
    expected, seconds = reference(lab, out, command)
    for moment in lab.moments(kills, seconds):
        shutil.rmtree(out, ignore_errors=True)
        kill_after(lab, lab.start(*command), moment, row)
        row.mixtures += is_mixture(out, expected)
        compare(lab, out, command, expected, row)
    return row


def export(lab: Lab, kills: int) -> Row:
    """`im3d generate` between two renames of its files, which take the place of another asset's."""
    row, out, other = Row(), lab.directory / "export", lab.directory / "other"
    lab.finish(*generate(lab, OTHER_PROMPT, other))
    command = generate(lab, PROMPT, out)
    shutil.copytree(other, out)
    lab.finish("-c", KILLER, -1, out, *command)
    total = int(lab.log().rpartition("renames ")[2])
    expected, old = files(out), files(other)
    for number in sorted(lab.rng.sample(range(total), min(kills, total))):
        shutil.rmtree(out)
        shutil.copytree(other, out)
        process = lab.start("-c", KILLER, number, out, *command)
        row.kills += 1
        row.too_late += process.wait() != -signal.SIGKILL
        row.mixtures += is_mixture(out, expected) and is_mixture(out, old)
        compare(lab, out, command, expected, row)
    return row


def worker(lab: Lab, kills: int) -> Row:
    """The 3D worker of `im3d generate`, which another one replaces: nothing is started again."""
    row, out = Row(), lab.directory / "worker"
    command = generate(lab, PROMPT, out)
    expected, seconds = reference(lab, out, command)
    for moment in lab.moments(kills, seconds):
        shutil.rmtree(out, ignore_errors=True)
        process = lab.start(*command)
        until = time.monotonic() + moment
        while time.monotonic() < until or (process.poll() is None and not workers_of(process.pid)):
            time.sleep(0.05)
        found = workers_of(process.pid)
        row.kills += 1
        row.too_late += not found
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        is_good = process.wait() == 0
        row.left.append((0, lab.left(out)))
        row.compared += 1
        row.equal += is_good and without_reports(files(out)) == without_reports(expected)
    return row


def batch(lab: Lab, kills: int) -> Row:
    """`im3d batch`, one killed after another on the same directory, until all of its assets are there."""
    row, out = Row(), lab.directory / "batch"
    flags = ("--prompts", lab.prompts, "--num-assets", 2, "--out", out)
    command = ("batch", f"--config={lab.config}", *flags)
    expected, seconds = reference(lab, out, command)
    shutil.rmtree(out)
    for moment in lab.moments(kills, 0.7 * seconds):
        kill_after(lab, lab.start(*command), moment, row)
        for asset in (out / "assets").glob("*"):
            prefix = f"assets/{asset.name}/"
            whole = {name.removeprefix(prefix): each for name, each in expected.items() if prefix in name}
            row.mixtures += is_mixture(asset, whole)
    compare(lab, out, command, expected, row)
    return row


def training(lab: Lab, kills: int) -> Row:
    """`im3d train`, one killed after another on the same workdir, until all of its steps are done."""
    row, out = Row(), lab.directory / "training"
    command = ("train", f"--config={lab.training}", f"--workdir={out}")
    expected, seconds = reference(lab, out, command)
    shutil.rmtree(out)
    for moment in lab.moments(kills, seconds):
        kill_after(lab, lab.start(*command), moment, row)
    compare(lab, out, command, expected, row)
    return row


# ---- Parts of them ----


def generate(lab: Lab, prompt: str, out: Path) -> tuple[object, ...]:
    return ("generate", f"--config={lab.config}", "--prompt", prompt, "--out", out, "--save-views")


def reference(lab: Lab, out: Path, command: tuple[object, ...]) -> tuple[dict[str, bytes], float]:
    """The files of a run that nobody kills, and its seconds, once its programs have been compiled."""
    lab.finish(*command)
    shutil.rmtree(out)
    seconds = lab.finish(*command)
    return files(out), seconds


def kill_after(lab: Lab, process: subprocess.Popen[bytes], moment: float, row: Row) -> None:
    """Kills a process after some seconds, and counts those that it has started and that survive it."""
    try:
        process.wait(moment)
        row.too_late += 1
    except subprocess.TimeoutExpired:
        pass
    started = descendants(process.pid)
    process.kill()
    process.wait()
    row.kills += 1
    until = time.monotonic() + ORPHANS_AFTER_S
    while any(map(is_running, started)) and time.monotonic() < until:
        time.sleep(0.05)
    row.orphans += sum(map(is_running, started))


def compare(lab: Lab, out: Path, command: tuple[object, ...], expected: dict[str, bytes], row: Row) -> None:
    """Gives the command again, and compares what there is then."""
    before = lab.left(out)
    lab.finish(*command)
    row.left.append((before, lab.left(out)))
    row.compared += 1
    row.equal += files(out) == expected


def is_mixture(asset: Path, expected: dict[str, bytes]) -> bool:
    """Whether there is a report, but not with the files that are expected of it."""
    return (asset / "report.json").exists() and files(asset) != expected


def files(directory: Path) -> dict[str, bytes]:
    """Path -> content of what a run has made, without seconds, rates and Orbax's own notes."""
    found = {}
    for path in sorted(directory.rglob("[!.]*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        if name.startswith(("checkpoints/", "gallery", "summary")):
            continue
        found[name] = steady(path)
    return found


def steady(path: Path) -> bytes:
    """A file's content without what the clock decides."""
    if path.name == "report.json":
        report = json.loads(path.read_text())
        return json.dumps({name: value for name, value in report.items() if name != "seconds"}).encode()
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        kept = ("loss", "grad_norm", "learning_rate", "step")
        return json.dumps([{k: v for k, v in line.items() if k.endswith(kept)} for line in lines]).encode()
    return path.read_bytes()


def without_reports(found: dict[str, bytes]) -> dict[str, bytes]:
    """A report says that a worker has died, as it should."""
    return {name: content for name, content in found.items() if name != "report.json"}


def workers_of(pid: int) -> list[int]:
    """The children of a process that multiprocessing has spawned, but for its tracker."""
    found = []
    for child in descendants(pid):
        try:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and that these have, as long as it lives."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent_pid = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent_pid, []).append(int(path.parent.name))

    def below(each: int) -> Iterator[int]:
        for child in children.get(each, []):
            yield child
            yield from below(child)

    return list(below(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_weights(config_path: Path, path: Path) -> None:
    """Random weights for the network of a config."""
    import jax
    import numpy as np

    from im3d_jax import backbones, checkpoint, config_flags

    config = config_flags.load(config_path)
    model = backbones.build("emu_video", config.backbone.kwargs.to_dict())
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    checkpoint.save_weights(path, params, {"words": list(config.text.kwargs.words)})


KINDS: dict[str, Callable[[Lab, int], Row]] = {
    each.__name__: each for each in (parent, export, worker, batch, training)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="some of the kinds")
    parser.add_argument("--share", type=float, default=1.0, help="of the kills of each kind (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    flags = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    is_good = True
    with tempfile.TemporaryDirectory(prefix="kills-") as directory:
        lab = Lab(Path(directory), random.Random(flags.seed))
        print(f"{'':<10}{'kills':<18}{'orphans':>8}{'mixtures':>10}{'left':>12}{'equal':>12}", flush=True)
        for name in flags.only:
            row = KINDS[name](lab, max(1, math.ceil(flags.share * KILLS[name])))
            is_good &= row.is_good
            print(f"{name:<10}{row}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
