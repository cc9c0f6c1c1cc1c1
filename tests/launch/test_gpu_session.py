"""The session on a GPU machine, run with a stand-in for python3: parts that fail, are done or lack time."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/gpu_session.sh"


@pytest.fixture
def session(tmp_path):
    """A function that runs the script and returns the calls of python3. The benchmark `fit` fails."""
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(
        f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/calls.txt\n[[ $1 != benchmarks/gpu_fit.py ]]\n'
    )
    python.chmod(0o755)

    def run(*arguments):
        environment = os.environ | {
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "RESULTS": str(tmp_path / "results"),
            "OUT": str(tmp_path / "out"),
            "SITE": str(tmp_path),
        }
        command = ["bash", str(SCRIPT), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        calls = tmp_path / "calls.txt"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return lines

    return run


def test_a_failed_part_stops_no_other_part_and_is_tried_again(session, tmp_path):
    first = session("600", "machine", "fit", "pipeline")
    assert [line.split()[0] for line in first] == [
        f"benchmarks/gpu_{n}.py" for n in ("machine", "fit", "pipeline")
    ]
    assert [line.split()[0] for line in session("600", "machine", "fit", "pipeline")] == [
        "benchmarks/gpu_fit.py"
    ]
    assert "fit: exit 1" in (tmp_path / "out/summary.txt").read_text()
    assert (tmp_path / "out/logs.tar.gz").stat().st_size > 0


def test_its_tests_exist(session):
    (call,) = session("600", "tests")
    paths = [word for word in call.split() if word.startswith("tests/")]
    assert paths and all((SCRIPT.parents[1] / path).exists() for path in paths)


def test_no_part_is_begun_without_time(session, tmp_path):
    assert session("20", "machine") == []
    assert "machine: not begun" in (tmp_path / "out/summary.txt").read_text()
