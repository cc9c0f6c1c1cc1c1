"""The launchers with stand-ins for `im3d`, `srun` and `scontrol`, and their YAML compared with the code."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from im3d_jax.training import hosts
from recon_torch.errors import CommandParser

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in ROOT.glob("launch/*/*") if path.suffix in (".sh", ".sbatch"))
JOBSETS = sorted(ROOT.glob("launch/gke/*.yaml"))


@pytest.fixture
def commands(tmp_path):
    """A function that makes commands of shell scripts, and returns an environment in which they are found."""
    directory = tmp_path / "bin"
    directory.mkdir()

    def make(**scripts):
        for name, script in scripts.items():
            path = directory / name
            path.write_text(f"#!/usr/bin/env bash\ncd '{tmp_path}'\n{script}\n")
            path.chmod(0o755)
        return os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}

    return make


def run(*command, **environment):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_the_shell_s_check(path):
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    result = run(*checker, str(path), **os.environ)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- SLURM ----


@pytest.mark.parametrize(
    "code, start, is_requeued",
    [(0, 1, False), (1, 1, False), (2, 1, False), (hosts.EXIT_REQUEUE, 1, True)]
    + [
        (hosts.EXIT_REQUEUE, 99, True),
        (hosts.EXIT_HUNG, 9, True),
        (134, 1, True),
        (hosts.EXIT_HUNG, 10, False),
    ],
)
def test_slurm_requeues_by_exit_code_and_number_of_starts(code, start, is_requeued, commands, tmp_path):
    environment = commands(
        srun=f'echo "$@" >> srun.txt; exit {code}', scontrol='echo "$@" >> scontrol.txt', date="echo now"
    )
    environment |= dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_RESTART_COUNT=str(start - 1))
    script = str(ROOT / "launch/slurm/train.sbatch")
    result = run("bash", script, "--config=a b.py", "--workdir=w", **environment)
    assert result.returncode == code, result.stderr
    assert (
        (tmp_path / "srun.txt")
        .read_text()
        .endswith("im3d train --cluster=slurm --config=a b.py --workdir=w\n")
    )
    requeued = tmp_path / "scontrol.txt"
    assert (requeued.read_text() if requeued.exists() else "") == "requeue 7\n" * is_requeued


@pytest.mark.parametrize(
    "code, start, is_requeued",
    [
        (0, 1, False),
        (1, 1, False),
        (2, 1, False),
        (hosts.EXIT_REQUEUE, 99, True),
        (137, 9, True),
        (137, 10, False),
    ],
)
def test_of_a_job_array_only_the_task_is_requeued(code, start, is_requeued, commands, tmp_path):
    environment = commands(
        srun=f'echo "$@" >> srun.txt; exit {code}', scontrol='echo "$@" >> scontrol.txt', date="echo now"
    )
    # The last task of an array, whose own job number is that of the array.
    environment |= dict(SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    environment |= dict(SLURM_JOB_NODELIST="n1", SLURM_RESTART_COUNT=str(start - 1))
    script = str(ROOT / "launch/slurm/batch.sbatch")
    result = run("bash", script, "--prompts=a b.txt", "--out=o", **environment)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "srun.txt").read_text().endswith("im3d batch --prompts=a b.txt --out=o\n")
    requeued = tmp_path / "scontrol.txt"
    assert (requeued.read_text() if requeued.exists() else "") == "requeue 7_3\n" * is_requeued


# ---- One machine ----

LOCAL = str(ROOT / "launch/local/train.sh")


def test_local_processes_get_their_flags_and_logs(commands, tmp_path):
    environment = commands(im3d='echo "$JAX_LOCAL_DEVICE_IDS: $@"') | {"PORT": "12399"}
    result = run(LOCAL, "3", str(tmp_path / "logs"), "--config=a b.py", **environment)
    assert result.returncode == 0, result.stderr
    for i in range(3):
        flags = f"train --coordinator=localhost:12399 --num-processes=3 --process-id={i} --config=a b.py"
        assert (tmp_path / "logs" / f"process-{i}.log").read_text() == f"{i}: {flags}\n"


def test_a_run_that_saved_and_stopped_starts_again(commands, tmp_path):
    environment = commands(im3d='echo start; [[ $(grep -c start "logs/process-0.log") -gt 2 ]] || exit 75')
    result = run(LOCAL, "1", str(tmp_path / "logs"), **environment)
    assert result.returncode == 0
    assert (tmp_path / "logs/process-0.log").read_text() == "start\n" * 3
    assert result.stdout.count("starts again") == 2


def test_a_process_that_fails_ends_the_others(commands, tmp_path):
    fails = '[[ "$*" != *--process-id=1* ]] || exit 70'
    environment = commands(im3d=f"{fails}; echo waits; exec sleep 100")
    result = run(LOCAL, "2", str(tmp_path / "logs"), **environment)
    assert result.returncode == hosts.EXIT_HUNG and "ended with 70" in result.stderr
    assert (tmp_path / "logs/process-0.log").read_text() == "waits\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_all_processes_and_end_the_run(number, commands, tmp_path):
    """The processes take a while to save, as `im3d train` does. The run is not started again afterwards."""
    saves = 'trap "sleep 1; echo saved; exit 75" TERM; echo ready; sleep 60 & wait'
    process = subprocess.Popen([LOCAL, "2", str(tmp_path / "logs")], env=commands(im3d=saves))
    logs = [tmp_path / "logs" / f"process-{i}.log" for i in range(2)]
    deadline = time.monotonic() + 30
    while not all(log.exists() and log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == hosts.EXIT_REQUEUE
    assert [log.read_text() for log in logs] == ["ready\nsaved\n"] * 2


# ---- Kubernetes ----


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_agree_with_themselves_and_with_the_code(path):
    jobset = yaml.safe_load(path.read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"

    program, command, *flags = container["args"]
    parser = CommandParser("train", "")
    hosts.add_flags(parser)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    flags = [flag.replace("$(JOB_COMPLETION_INDEX)", "3") for flag in flags]
    parsed = parser.parse_args(flags)
    assert (program, command) == ("im3d", "train") and (ROOT / parsed.config).exists()
    assert any(parsed.workdir.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    if not parsed.cluster:
        name = jobset["metadata"]["name"]
        (port,) = container["ports"]
        assert parsed.coordinator == f"{name}-{workers['name']}-0-0.{name}:{port['containerPort']}"
        assert parsed.num_processes == job["parallelism"] and parsed.process_id == 3

    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [dict(containerName=container["name"], operator="In", values=[hosts.EXIT_REQUEUE])]
    # `podFailurePolicy` is refused with any other restart policy.
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
