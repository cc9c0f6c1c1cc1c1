"""Shows how a run is doing (progress, metrics, sampled videos, a profile) and stops it at NaN.

    with Watch(workdir, step=step, num_steps=1000, log_every=10) as watch:
        while step < 1000:
            state, metrics = train_step(...)  # returns at once; the device computes on
            step += 1
            watch.add(step, "turntable", metrics, ids, wait_s)

The metrics of a step are read two steps later. The device then still has the next two steps to compute, so it
never idles, and the loop never runs further ahead than that. A thread waits for the end of each step: rates
count the time to there, which is neither when the step was handed to the device nor when it is looked at. All
processes of a run have the same metrics, so they skip a step, or stop, together.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from im3d_jax import costs
from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.views.images import to_uint8
from recon_torch.views.video import write_video

LAG_STEPS = 2

DEVICE_KINDS = {
    r"\bA100\b": "a100",
    r"\bH100 80GB HBM3": "h100",  # SXM; the PCIe and NVL cards are slower
    r"\bH200\b": "h200",
    r"\bB200\b": "b200",
    r"^TPU v4$": "tpu_v4",
    r"^TPU v5( lite|e)$": "tpu_v5e",
    r"^TPU v5p?$": "tpu_v5p",
    r"^TPU v6( lite|e)$": "tpu_v6e",
}
"""Pattern of JAX's name of a device -> its name in `costs.ACCELERATORS`."""


class NotFinite(FloatingPointError):
    """More losses or gradients were not finite than `max_skipped` allows. The message names the step."""


class Work(NamedTuple):
    """What one step of a stream computes on all devices together. A field is 0 where it is not known.

    flops: floating-point operations of the forward and the backward pass.
    """

    examples: int = 0
    frames: int = 0
    flops: float = 0.0


class Record(NamedTuple):
    """The arguments of one call of `Watch.add`, and what tells the time at which the step ended."""

    ended_s: Callable[[], float]
    step: int
    stream: str
    metrics: Mapping[str, Any]
    ids: Sequence[str]
    wait_s: float


class Watch:
    """Writes means of the metrics every `log_every` steps and stops the run when they are not finite.

    Use it as a context manager: leaving it without an exception also reads the metrics of the last steps.
    Each line of `workdir`/metrics.jsonl is {"step", "steps_per_second", ...}. Lines beyond `step` are dropped
    at the start, because a run that was killed repeats those steps. TensorBoard's files, in
    `workdir`/tensorboard, keep them.

    Args:
        step: the number of steps that are already done.
        work: the work of a step of each stream. It may be filled in later, as programs are compiled.
        max_skipped: the number of steps with a loss or gradient that is not finite that the run tolerates.
        skipped_steps: the number of such steps before `step`.
        tensorboard: whether to write TensorBoard's files; needs the extra `tensorboard`.
        peak_flops: FLOP/s of all devices together at best, see `peak_flops`. None leaves out the MFU.
        profile: (step, n) traces the n steps that follow `step` into `workdir`/profile; n = 0 traces none.
        is_main: whether this process writes. The others only check that the metrics are finite.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        num_steps: int,
        log_every: int,
        work: dict[str, Work] | None = None,
        max_skipped: int = 0,
        skipped_steps: int = 0,
        tensorboard: bool = False,
        peak_flops: float | None = None,
        profile: tuple[int, int] = (0, 0),
        is_main: bool = True,
    ):
        self.workdir, self.num_steps, self.log_every = workdir, num_steps, log_every
        self.work, self.max_skipped, self.peak_flops = work or {}, max_skipped, peak_flops
        self.skipped_steps, self.skipped_records = skipped_steps, 0
        self._is_main = is_main
        self._pending: deque[Record] = deque()
        self._window = Window(step, monotonic())
        self._waiting = ThreadPoolExecutor(1, "watch")
        self._profile, self._is_profiling = profile, False
        self._writer = None
        if is_main:
            truncate(self.workdir / "metrics.jsonl", step)
            if tensorboard:
                self._writer = open_tensorboard(workdir / "tensorboard")
        # disable=None shows the bar on a terminal only; elsewhere `_write_line` prints a line instead.
        self._bar = tqdm(total=num_steps, initial=step, disable=None if is_main else True, dynamic_ncols=True)
        self._profile_if_due(step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.write()
        finally:
            if self._is_profiling:
                jax.profiler.stop_trace()
            if self._writer:
                self._writer.close()
            self._bar.close()
            self._waiting.shutdown(wait=False)

    def add(
        self,
        step: int,
        stream: str,
        metrics: Mapping[str, Any],
        ids: Sequence[str],
        wait_s: float = 0.0,
        skipped_records: int = 0,
    ) -> None:
        """Takes the metrics of a step that may still be running, and reads those of two steps ago.

        Args:
            step: the number of steps done, including this one.
            metrics: arrays or numbers. `is_finite` is 1, or 0 where the step left the state unchanged because
                its loss or gradient was not finite. `loss_by_level` [L] and `count_by_level` [L] are sums
                over the step's examples, one entry per noise level. The others are scalars.
            ids: names of the objects in the part of the batch that this process loaded.
            wait_s: seconds that the loop waited for the batch.
            skipped_records: the number of corrupt records met since the start.

        Raises NotFinite, at the same step on all processes.
        """
        self._pending.append(Record(self._end_of(metrics), step, stream, metrics, ids, wait_s))
        self.skipped_records = skipped_records
        self._look(LAG_STEPS)
        self._profile_if_due(step)

    def _end_of(self, metrics: Mapping[str, Any]) -> Callable[[], float]:
        """A function that waits until the device has these metrics, and returns the time at which it had."""
        awaited = [each for each in metrics.values() if hasattr(each, "is_ready") and not each.is_ready()]
        if not awaited:
            now = monotonic()
            return lambda: now
        return self._waiting.submit(_wait_for, awaited).result

    def write(self) -> None:
        """Waits for all steps and writes their metrics. Call it before a checkpoint is saved."""
        self._look(0)
        if self._window.steps:
            self._write_line()

    def video(self, step: int, name: str, frames: Float[np.ndarray, "T H W 3"], fps: int = 8) -> None:
        """Writes frames in [0, 1] as a video into `workdir`/samples, and as one row to TensorBoard."""
        if not self._is_main:
            return
        write_video(self.workdir / "samples" / f"{name}_{step:07d}.mp4", frames, fps)
        if self._writer:
            strip = np.concatenate(list(to_uint8(frames)), axis=1)
            self._writer.write_images(step, {f"samples/{name}": strip[None]})

    def _look(self, keep: int) -> None:
        while len(self._pending) > keep:
            record = self._pending.popleft()
            values = jax.device_get(list(record.metrics.values()))
            values = dict(zip(record.metrics, map(np.asarray, values), strict=True))
            self._window.count(record, self.work.get(record.stream, Work()))
            self._bar.update(record.step - self._bar.n)
            if values.pop("is_finite"):
                self._window.add(record.stream, values)
            else:
                self._skip(record, values)
            if record.step % self.log_every == 0:
                self._write_line()

    def _skip(self, record: Record, values: dict[str, np.ndarray]) -> None:
        self.skipped_steps += 1
        numbers = {name: float(value) for name, value in values.items() if value.ndim == 0}
        shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        where = f"step {record.step} of {record.stream} is not finite"
        message = f"{where}: {shown}; objects {', '.join(record.ids)}"
        if self.skipped_steps > self.max_skipped:
            allowed = f"config.train.max_skipped allows {self.max_skipped} such steps"
            raise NotFinite(f"{message}; {allowed}; the last checkpoint is sound")
        tqdm.write(f"skipped: {message}", file=sys.stderr)  # each process knows its objects
        as_text = {name: str(value) for name, value in numbers.items()}  # JSON has no NaN
        self._append({"step": record.step, "skipped": list(record.ids), **as_text})

    def _write_line(self) -> None:
        window = self._window
        self._window = Window(window.last_step, window.ended_s)
        if not self._is_main:
            return
        rates = window.rates(self.peak_flops)
        counts = {"skipped_records": self.skipped_records, "skipped_steps": self.skipped_steps}
        line = rates | window.means() | {"memory_gb": memory_bytes() / 1e9} | counts
        self._append({"step": window.last_step, **line})
        if self._writer:
            self._writer.write_scalars(window.last_step, line)
        means = {name: value for name, value in window.means().items() if "/" not in name}
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
            return
        eta_s = (self.num_steps - window.last_step) / rates["steps_per_second"]
        text = " ".join(f"{name}={value:.5g}" for name, value in means.items())
        text += f" {rates['steps_per_second']:.3g} steps/s, data wait {rates['data_wait_share']:.0%}"
        print(f"step {window.last_step}/{self.num_steps} {text} ETA {_clock(eta_s)}", flush=True)

    def _append(self, line: dict) -> None:
        if self._is_main:
            path = self.workdir / "metrics.jsonl"
            try:
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {path} ({error.strerror}); make room and go on") from error

    def _profile_if_due(self, step: int) -> None:
        first, num_steps = self._profile
        if not (num_steps and self._is_main):
            return
        if self._is_profiling and step >= first + num_steps:
            self._look(0)  # waits for the steps that the device is still computing
            jax.profiler.stop_trace()
            self._is_profiling = False
        elif step == first:
            jax.profiler.start_trace(self.workdir / "profile")
            self._is_profiling = True


class Window:
    """The metrics read since the last line was written.

    A window lasts from the end of the last step of the window before to the end of its own last step.
    """

    def __init__(self, step: int, started_s: float):
        self.last_step, self.steps = step, 0
        self.started_s = self.ended_s = started_s
        self.wait_s, self.work = 0.0, Work()
        self._scalars: defaultdict[str, list[float]] = defaultdict(list)
        # By stream: (sums of losses [L], counts [L]).
        self._levels: defaultdict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)

    def count(self, record: Record, work: Work) -> None:
        """Counts a step. One that is not finite counts as well, because it took time."""
        self.last_step, self.steps, self.ended_s = record.step, self.steps + 1, record.ended_s()
        self.wait_s += record.wait_s
        examples, frames = self.work.examples + work.examples, self.work.frames + work.frames
        self.work = Work(examples, frames, self.work.flops + work.flops)

    def add(self, stream: str, values: dict[str, np.ndarray]) -> None:
        """Adds the metrics of a step; see `Watch.add`."""
        if "loss_by_level" in values:
            self._levels[stream].append((values["loss_by_level"], values["count_by_level"]))
        for name, value in values.items():
            if not name.endswith("_by_level"):
                self._scalars[f"{stream}_{name}"].append(float(value))

    def means(self) -> dict[str, float]:
        """Means over the steps, and for each noise level that occurred the mean over its examples."""
        means = {name: math.fsum(values) / len(values) for name, values in self._scalars.items()}
        for stream, pairs in self._levels.items():
            losses, counts = np.sum(np.asarray(pairs, np.float64), axis=0)
            means |= {
                f"{stream}_loss/level_{level}": float(losses[level] / counts[level])
                for level in np.flatnonzero(counts)
            }
        return means

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """Speed: per second, and seconds per step."""
        elapsed_s = max(self.ended_s - self.started_s, 1e-9)
        rates = {
            "steps_per_second": self.steps / elapsed_s,
            "step_seconds": elapsed_s / self.steps,
            "data_wait_share": min(self.wait_s / elapsed_s, 1.0),
        }
        if self.work.examples:
            rates["examples_per_second"] = self.work.examples / elapsed_s
        if self.work.frames:
            rates["frames_per_second"] = self.work.frames / elapsed_s
        if self.work.flops and peak_flops:
            rates["mfu"] = self.work.flops / elapsed_s / peak_flops
        return rates


def _wait_for(metrics: Sequence[Any]) -> float:
    with suppress(Exception):  # whoever reads the metrics gets the same error
        jax.block_until_ready(metrics)
    return monotonic()


def truncate(path: Path, step: int) -> None:
    """Drops the lines of a metrics.jsonl that lie beyond `step`, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


def open_tensorboard(directory: Path):
    """Returns a writer of event files with its own thread. Raises UserError if TensorFlow is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
        from clu import metric_writers  # imports TensorFlow as well
    except ImportError as error:
        hint = "pip install 'im3d[tensorboard]', or set config.train.tensorboard to False"
        raise UserError(f"TensorBoard needs {error.name or 'TensorFlow'}; {hint}") from None
    tf.config.set_visible_devices([], "GPU")  # otherwise TensorFlow would reserve their memory
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, by what `jax.Device.device_kind` says; None where unknown."""
    name = next((name for pattern, name in DEVICE_KINDS.items() if re.search(pattern, device_kind)), None)
    return costs.ACCELERATORS[name].flops if name else None


def memory_bytes() -> int:
    """Peak memory of the first local device, or of the process where the device does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, however many hours."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
