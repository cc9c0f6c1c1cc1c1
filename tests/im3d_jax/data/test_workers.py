"""Worker processes change neither data nor errors, and end with the process that started them."""

import operator
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from im3d_jax.data import objects
from im3d_jax.data.input_pipeline import Shard, open_stream
from im3d_jax.data.sources import ProceduralSource
from im3d_jax.data.workers import Workers, run_here

pytestmark = pytest.mark.slow

IGNORED = (signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 60.0  # for what takes a moment where nothing else runs

KILLED = """
import os, signal
from im3d_jax.data.workers import Workers

if __name__ == "__main__":
    print(Workers(1).run(os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def workers():
    with Workers(2, IGNORED) as workers:
        yield workers


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("start, shard", [(0, Shard(0, 1)), (3, Shard(1, 2))])
def test_batches_are_the_same_bit_for_bit(workers, start, shard):
    def batches(run):
        source = ProceduralSource(seed=5, first_object=20_100, size=8, num_views=3, run=run)
        settings = dict(seed=1, batch_size=6, shuffle=False, num_threads=3, buffer=3, max_corrupt=0)
        stream = open_stream(source, shard=shard, start=start, **settings)
        examples = [example for _ in range(5) for example in next(stream)]
        stream.close()
        return examples

    here, there = batches(run_here), batches(workers.run)
    assert len(here) == len(there) == 30 // shard.count
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and a["scene"].keys() == b["scene"].keys()
        for name in a["scene"]:
            assert a["scene"][name].dtype == b["scene"][name].dtype
            np.testing.assert_array_equal(a["scene"][name], b["scene"][name])
        assert all(a[name] == b[name] for name in ("id", "size", "caption", "elevation_rad"))


def test_work_runs_in_another_process_if_there_are_any(workers):
    assert workers.run(os.getpid) != os.getpid() == Workers(0).run(os.getpid)


def test_workers_import_neither_jax_nor_torch(workers):
    """Importing these would take seconds and memory in every process."""
    workers.run(objects.on_turntables, 0, [1, 2])
    assert workers.run(eval, "{'jax', 'torch', 'grain'} & set(__import__('sys').modules)") == set()


def test_errors_of_the_work_reach_the_caller(workers):
    with pytest.raises(ZeroDivisionError):
        workers.run(operator.truediv, 1, 0)
    assert workers.run(operator.truediv, 1, 2) == 0.5


def test_workers_ignore_signals_to_the_whole_job(workers):
    for number in IGNORED:
        workers.run(signal.raise_signal, number)
    assert workers.run(abs, -1) == 1


def test_workers_end_with_the_block_however_it_ends():
    with pytest.raises(KeyError), Workers(1) as workers:
        pid = workers.run(os.getpid)
        assert is_running(pid)
        raise KeyError
    assert not is_running(pid)


def test_the_death_of_a_worker_is_an_error():
    with Workers(1) as workers, pytest.raises(BrokenProcessPool):
        workers.run(os._exit, 1)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[3])
    paths = {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.run(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | paths, timeout=PATIENCE_S
    )
    assert process.returncode == -signal.SIGKILL
    deadline_s = time.monotonic() + PATIENCE_S
    while is_running(int(process.stdout)):
        assert time.monotonic() < deadline_s, "the worker outlived its parent"
        time.sleep(0.05)
