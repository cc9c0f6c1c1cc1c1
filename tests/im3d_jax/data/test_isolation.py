"""Items that fail, crash, hang or come too late stop no other item, here and in processes."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from im3d_jax.data.isolation import Failure, Outcome, Reason, attempt, run_all
from recon_torch.errors import UserError


class Deeds:
    """Work whose items say what becomes of them. It counts the attempts at each in a directory."""

    def __init__(self, directory):
        self._directory = Path(directory)

    def __call__(self, name):
        marks = self._directory / name
        marks.mkdir(exist_ok=True)
        number = len(list(marks.iterdir())) + 1
        (marks / str(number)).touch()
        if name.startswith("stop"):
            raise UserError("the disk is full")
        return attempt(self._do, name, number)

    def _do(self, name, number):
        kind = name.split("-")[0]
        if kind == "unusable":
            raise UserError("it has no triangles")
        if kind == "fault":
            raise IndexError("out of bounds")
        if kind == "memory" or (kind == "once" and number == 1):
            raise MemoryError
        if kind == "killed" or (kind == "crash" and number == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        if kind == "slow":
            time.sleep(600)


def no_work():
    os._exit(7)


def run(directory, names, **options):
    options = dict(jobs=0) | options
    return {name: failure for name, failure in run_all(Deeds, (str(directory),), names, **options)}


@pytest.mark.parametrize("jobs", [0, 2])
def test_failures_are_named_and_the_rest_is_done(tmp_path, jobs):
    names = ["a", "unusable", "b", "fault", "memory", "once", "c"]
    found = run(tmp_path, names, jobs=jobs, retries=1)
    assert found == {
        **dict.fromkeys(["a", "b", "c", "once"]),
        "unusable": Failure(Reason.UNUSABLE, "it has no triangles", 1),
        "fault": Failure(Reason.FAULT, "IndexError: out of bounds", 1),
        "memory": Failure(Reason.MEMORY, "not enough memory (MemoryError)", 2),
    }
    attempts = {name: len(list((tmp_path / name).iterdir())) for name in names}
    assert attempts == dict.fromkeys(names, 1) | {"memory": 2, "once": 2}


@pytest.mark.slow
def test_processes_that_die_are_replaced(tmp_path):
    names = ["killed-1", "a", "crash", "exit", "b", "slow", "c", "d"]
    found = run(tmp_path, names, jobs=2, retries=1, timeout_s=3.0)
    assert found == {
        **dict.fromkeys(["a", "b", "c", "d", "crash"]),
        "killed-1": Failure(Reason.KILLED, "its process was ended by SIGKILL", 2),
        "exit": Failure(Reason.KILLED, "its process ended with code 3", 2),
        "slow": Failure(Reason.TIMEOUT, "it took longer than 3 s", 1),
    }


@pytest.mark.parametrize("jobs", [0, 1])
def test_what_concerns_all_items_stops_the_work(tmp_path, user_error, jobs):
    with user_error("the disk is full"):
        run(tmp_path, ["a", "stop", "b"], jobs=jobs)
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_processes_that_cannot_begin_stop_the_work(user_error):
    with user_error("ended with code 7 before its first object"):
        list(run_all(no_work, (), ["a"], jobs=1))


def test_no_process_outlives_the_work(tmp_path):
    running = run_all(Deeds, (str(tmp_path),), ["a", "b", "c"], jobs=2)
    assert next(running) in [Outcome(name, None) for name in "abc"]
    running.close()
    assert not multiprocessing.active_children()
