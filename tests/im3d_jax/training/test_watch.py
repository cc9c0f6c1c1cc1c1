"""What a run shows of itself, against means in NumPy; and when it looks at what the device computes."""

import io
import json
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from im3d_jax.training import watch
from im3d_jax.training.watch import NotFinite, Watch, Work
from recon_torch.errors import UserError


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "monotonic", clock)
    return clock


def metrics_of(loss, **others):
    return {"loss": loss, "grad_norm": 2 * loss, "is_finite": np.isfinite(loss), **others}


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_lines_and_event_files_hold_the_means(tmp_path, clock):
    rng = np.random.default_rng(0)
    losses = {"image": rng.random(12), "turntable": rng.random(12)}
    by_level, counts = rng.random((12, 4)), rng.integers(0, 3, (12, 4))
    counts[:, 3] = 0
    work = {"image": Work(examples=8), "turntable": Work(examples=2, frames=32, flops=6e9)}
    with Watch(
        tmp_path, step=4, num_steps=16, log_every=6, work=work, peak_flops=1e11, tensorboard=True
    ) as it:
        for step in range(5, 17):
            clock.now += 0.5
            stream = "image" if step % 3 == 0 else "turntable"
            metrics = metrics_of(jax.block_until_ready(jnp.float32(losses[stream][step - 5])))
            if stream == "turntable":
                metrics |= {"loss_by_level": by_level[step - 5], "count_by_level": counts[step - 5]}
            it.add(step, stream, metrics, ["a", "b"], wait_s=0.1, skipped_records=3)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [6, 12, 16]
    for line, steps in zip(lines, ([5, 6], range(7, 13), range(13, 17)), strict=True):
        images = [step for step in steps if step % 3 == 0]
        videos = [step for step in steps if step % 3]
        elapsed_s = 0.5 * len(steps)
        expected = {"steps_per_second": 2, "step_seconds": 0.5, "data_wait_share": 0.1 / 0.5}
        expected["examples_per_second"] = (8 * len(images) + 2 * len(videos)) / elapsed_s
        expected["frames_per_second"] = 32 * len(videos) / elapsed_s
        expected["mfu"] = 6e9 * len(videos) / elapsed_s / 1e11
        expected |= {"skipped_steps": 0, "skipped_records": 3, "memory_gb": line["memory_gb"]}
        for stream, of in (("image", images), ("turntable", videos)):
            expected[f"{stream}_loss"] = np.mean([losses[stream][step - 5] for step in of])
            expected[f"{stream}_grad_norm"] = 2 * expected[f"{stream}_loss"]
        rows = np.array(videos) - 5
        for level in range(3):
            if counts[rows, level].sum():
                mean = by_level[rows, level].sum() / counts[rows, level].sum()
                expected[f"turntable_loss/level_{level}"] = mean
        assert line == pytest.approx({"step": steps[-1], **expected}, rel=1e-6)
        shown = {tag: value_at(events, tag, steps[-1]) for tag in expected}
        assert shown == pytest.approx(expected, rel=1e-6)
    assert 0.05 < line["memory_gb"] < 100 and "turntable_loss/level_3" not in events.Tags()["tensors"]


def value_at(events, tag, step):
    (point,) = (event for event in events.Tensors(tag) if event.step == step)
    return float(tensor_util.make_ndarray(point.tensor_proto))


class Computed:
    """A loss that a device takes its time for."""

    def __init__(self, value):
        self.value, self.is_done = value, False

    def __array__(self, dtype=None, copy=None):
        assert self.is_done, "looked at too early"
        return np.asarray(self.value, dtype)


def test_metrics_are_looked_at_two_steps_later(tmp_path):
    with Watch(tmp_path, step=0, num_steps=5, log_every=1) as it:
        losses = []
        for step in range(1, 6):
            losses.append(Computed(float(step)))
            if step > 2:
                losses[step - 3].is_done = True
            it.add(step, "s", {"loss": losses[-1], "is_finite": True}, [])
        assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]
        with pytest.raises(AssertionError, match="too early"):
            it.write()
        losses[4].is_done = True
        it.write()
    assert [line["s_loss"] for line in read_lines(tmp_path)] == [1, 2, 3, 5]


class OnDevice:
    """A loss that the device has at a certain time, until which whoever asks for it waits."""

    def __init__(self, value, clock, ends):
        self.value, self.clock, self.ends, self.is_done = value, clock, ends, threading.Event()

    def is_ready(self):
        return self.is_done.is_set()

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.ends)
        self.is_done.set()

    def __array__(self, dtype=None, copy=None):
        assert self.is_done.wait(timeout=60)
        return np.asarray(self.value, dtype)


@pytest.mark.parametrize("log_every", [1, 2, 3, 4])
def test_rates_count_to_the_end_of_the_steps(log_every, tmp_path, clock):
    """The loop hands out all steps at once, and the device takes 10 s for each."""
    with Watch(tmp_path, step=0, num_steps=12, log_every=log_every, work={"s": Work(examples=5)}) as it:
        for step in range(1, 13):
            loss = OnDevice(float(step), clock, 100.0 + 10 * step)
            it.add(step, "s", {"loss": loss, "is_finite": True}, [], wait_s=0.5)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(log_every, 13, log_every))
    for line in lines:
        assert line["step_seconds"] == pytest.approx(10) and line["steps_per_second"] == pytest.approx(0.1)
        assert line["examples_per_second"] == pytest.approx(0.5)
        assert line["data_wait_share"] == pytest.approx(0.05)


def test_a_pause_of_the_loop_is_not_time_of_the_steps_after_it(tmp_path, clock):
    """The device has two steps to compute while the loop does something else for 90 s."""
    with Watch(tmp_path, step=0, num_steps=6, log_every=1) as it:
        losses = [OnDevice(float(step), clock, 100.0 + 10 * step) for step in range(1, 7)]
        for step in range(1, 5):
            it.add(step, "s", {"loss": losses[step - 1], "is_finite": True}, [])
        it._waiting.submit(int).result()  # noqa: SLF001 - the thread has seen the end of step 4, at 140 s
        clock.now = 230.0
        for step in (5, 6):
            losses[step - 1].ends = 230.0 + 10 * (step - 4)
            it.add(step, "s", {"loss": losses[step - 1], "is_finite": True}, [])
    assert [line["step_seconds"] for line in read_lines(tmp_path)] == pytest.approx([10] * 4 + [100, 10])


@pytest.mark.parametrize("is_main", [True, False])
def test_what_is_not_finite_is_skipped_then_stops_every_process(is_main, tmp_path, capsys):
    settings = dict(step=0, num_steps=9, log_every=4, max_skipped=2, skipped_steps=1, is_main=is_main)
    stop = r"step 5 of s .*loss 1, grad_norm inf; objects lamp, boat; .*max_skipped allows 2"
    with pytest.raises(NotFinite, match=stop), Watch(tmp_path, **settings) as it:
        it.add(1, "s", metrics_of(1.0), ["mug"])
        it.add(2, "s", metrics_of(float("nan")), ["train/7/chair", "train/9/hat"])
        it.add(3, "s", metrics_of(3.0), ["mug"])
        it.add(4, "s", metrics_of(5.0), ["mug"])
        it.add(5, "s", metrics_of(1.0) | {"grad_norm": np.inf, "is_finite": False}, ["lamp", "boat"])
        it.add(6, "s", metrics_of(float("nan")), ["mug"])
        it.add(7, "s", metrics_of(7.0), ["mug"])
        pytest.fail("went on")
    output = capsys.readouterr()
    assert "skipped: step 2 of s is not finite: loss nan, grad_norm nan; objects train/7/chair" in output.err
    if is_main:
        skip, line = read_lines(tmp_path)
        assert skip == {
            "step": 2,
            "skipped": ["train/7/chair", "train/9/hat"],
            "loss": "nan",
            "grad_norm": "nan",
        }
        assert line["step"] == 4 and line["s_loss"] == 3 and line["skipped_steps"] == 2
        assert "step 4/9 s_loss=3 s_grad_norm=6 " in output.out
    else:
        assert not list(tmp_path.iterdir()) and not output.out


def test_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 5, "skipped": ["a"]}\n{"step": 6}\n{"step": 8, "s_l')
    watch.truncate(path, 8)
    assert [line["step"] for line in read_lines(tmp_path)] == [2, 4, 5, 6]
    with Watch(tmp_path, step=4, num_steps=6, log_every=2) as it:
        for step in (5, 6):
            it.add(step, "s", metrics_of(1.0), [])
    assert [line["step"] for line in read_lines(tmp_path)] == [2, 4, 6]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_and_no_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Watch(tmp_path, step=2, num_steps=8, log_every=2) as it:
        for step in range(3, 7):
            it.add(step, "s", metrics_of(0.25), [])
    shown = sys.stderr.getvalue()
    assert "2/8" in shown and "6/8" in shown and "s_loss=0.25" in shown and not capsys.readouterr().out


def test_videos_are_files_and_rows_of_pictures(tmp_path):
    frames = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    with Watch(tmp_path, step=0, num_steps=1, log_every=1, tensorboard=True) as it:
        it.video(40, "mug", frames)
    assert (tmp_path / "samples" / "mug_0000040.mp4").stat().st_size > 100
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0}).Reload()
    (event,) = events.Tensors("samples/mug")
    width, height, encoded = tensor_util.make_ndarray(event.tensor_proto)
    shown = np.asarray(Image.open(io.BytesIO(encoded)))
    assert (int(width), int(height), event.step) == (48, 16, 40)
    np.testing.assert_array_equal(shown[:, 16:32], np.rint(frames[1] * 255))


def test_a_profile_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls, done = [], []
    monkeypatch.setattr(watch.jax.profiler, "start_trace", lambda path: calls.append((path, len(done))))
    monkeypatch.setattr(watch.jax.profiler, "stop_trace", lambda: calls.append(("stop", len(done))))
    for start in (0, 5):
        with Watch(tmp_path, step=start, num_steps=9, log_every=9, profile=(2, 3)) as it:
            for step in range(start + 1, 10):
                done.append(step)
                it.add(step, "s", metrics_of(1.0), [])
    assert calls == [(tmp_path / "profile", 2), ("stop", 5)]  # none when it goes on from a later step
    with Watch(tmp_path, step=2, num_steps=9, log_every=9, profile=(2, 3)) as it:
        pass
    assert calls[2:] == [(tmp_path / "profile", 13), ("stop", 13)]


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, tflops):
    assert watch.peak_flops(kind) == (tflops and tflops * 1e12)


WITHOUT = """
import sys
from pathlib import Path
from im3d_jax.training.watch import Watch
with Watch(Path(sys.argv[1]), step=0, num_steps=1, log_every=1) as it:
    it.add(1, "s", {"loss": 1.0, "is_finite": True}, [])
assert not {"tensorflow", "tensorboard", "clu.metric_writers", "clu.periodic_actions"} & set(sys.modules)
"""


def test_tensorflow_is_imported_only_for_tensorboard(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], check=True)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"TensorBoard needs tensorflow; pip install 'im3d\[tensorboard\]'"):
        Watch(tmp_path, step=0, num_steps=1, log_every=1, tensorboard=True)
