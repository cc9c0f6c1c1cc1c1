"""A batch on Ray: the SLURM script with stand-ins for what it calls, and the YAML compared with the code."""

import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from im3d_jax.cluster import flags as cluster_flags
from im3d_jax.commands import batch
from im3d_jax.training import hosts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/ray/batch.sbatch")

# As SLURM does, it signals all processes of a step.
SRUN = """
echo "$@" >> srun.txt
while [[ $1 != bash ]]; do shift; done
set -m
trap 'told=1; [[ ! $step ]] || kill -TERM -- -$step' TERM
"$@" &
step=$!
[[ ! $told ]] || kill -TERM -- -$step
wait $step
wait $step
"""
RAY = """
echo "$@" >> ray.txt
[[ "$*" =~ --temp-dir=([^ ]+) ]]
echo 10.0.0.1:4321 > "${BASH_REMATCH[1]}/ray_current_cluster"
exec sleep 60
"""

BOTH_RUN = "until (($(wc -l < ray.txt) == 2)); do /bin/sleep 0.1; done"


@pytest.fixture
def job(tmp_path):
    """A function that starts the script as a job of two nodes. im3d, ray: shell scripts in their places."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "r").mkdir()

    def start(im3d, ray=RAY, restarts=0):
        stand_ins = dict(
            im3d=im3d,
            ray=ray,
            srun=SRUN,
            scontrol='echo "$@" >> scontrol.txt',
            sleep="exec /bin/sleep ${1/#1/0.1}",
        )
        for name, text in stand_ins.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\ncd '{tmp_path}'\n{text}\n")
            path.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(tmp_path / "r"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "n1",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        command = ["bash", SCRIPT, "--prompts=a b.txt", "--out=o"]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def read(path):
    return path.read_text() if path.exists() else ""


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
def test_the_driver_s_exit_code_is_the_job_s(code, start, is_requeued, job, tmp_path):
    process = job(f'echo "$@" > im3d.txt; {BOTH_RUN}; exit {code}', restarts=start - 1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert read(tmp_path / "im3d.txt") == "batch --ray=10.0.0.1:4321 --prompts=a b.txt --out=o\n"
    assert read(tmp_path / "scontrol.txt") == "requeue 7\n" * is_requeued
    assert not list((tmp_path / "r").iterdir())


def test_every_node_has_its_own_directory_and_free_ports(job, tmp_path):
    process = job(BOTH_RUN)
    assert process.wait(60) == 0
    head, worker = sorted(read(tmp_path / "ray.txt").splitlines(), key=lambda line: "--head" not in line)
    assert "--port=0" in head and "--address=10.0.0.1:4321" in worker
    ports = re.findall(r"--(\S*port)=(\d+)", head + worker)
    assert {name for name, number in ports if number != "0"} == {"ray-client-server-port"}
    directories = re.findall(r"--temp-dir=(\S+)", head + worker)
    assert len(set(directories)) == 2
    assert all("--num-cpus=8" in line and "--block" in line for line in (head, worker))
    steps = re.findall(r"^--nodes=1 .*--(nodelist|exclude)=n1", read(tmp_path / "srun.txt"), re.MULTILINE)
    assert sorted(steps) == ["exclude", "nodelist"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_driver_which_may_take_its_time(number, job, tmp_path):
    name = number.name.removeprefix("SIG")
    process = job(
        f'trap "/bin/sleep 1; echo {name} >> im3d.txt; exit 75" {name}; touch ready\n'
        "while :; do /bin/sleep 0.1; done"
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == hosts.EXIT_REQUEUE
    assert read(tmp_path / "im3d.txt") == f"{name}\n" and read(tmp_path / "scontrol.txt") == "requeue 7\n"


def test_a_cluster_that_does_not_start_is_tried_three_times_and_leaves_its_logs(job, tmp_path):
    process = job("touch im3d.txt", ray="echo the port is taken >&2; exit 1")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 71 and output.count("the port is taken") == 3, output
    assert not (tmp_path / "im3d.txt").exists() and read(tmp_path / "scontrol.txt") == "requeue 7\n"
    (directory,) = (tmp_path / "r").iterdir()
    assert str(directory) in output and "the port is taken" in read(directory / "start.log")


def test_a_cluster_that_is_lost_is_not_taken_for_assets_that_failed(job, tmp_path):
    dies = RAY.replace("exec sleep 60", "[[ $* == *--address* ]] || { /bin/sleep 1; exit 1; }; exec sleep 60")
    process = job("/bin/sleep 2; exit 1", ray=dies)
    assert process.wait(60) == 71 and read(tmp_path / "scontrol.txt") == "requeue 7\n"


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def ray_version():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pin,) = (each for each in extras["cluster"] if each.startswith("ray"))
    return re.search(r">=([\d.]+),", pin)[1]


def cluster_and_command(name):
    """The cluster that a file asks for, and the `im3d batch` command that it runs or recommends."""
    text = (ROOT / "launch/ray" / name).read_text()
    document = yaml.safe_load(text)
    assert document["apiVersion"] == "ray.io/v1"
    if document["kind"] == "RayJob":
        return document["spec"]["rayClusterSpec"], document["spec"]["entrypoint"]
    comment = re.sub(r"\\\n#", "", text)
    return document["spec"], re.search(r"-- (im3d batch.*)", comment)[1]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_files_for_kubernetes_agree_with_themselves_and_with_the_code(name, ray_version):
    cluster, command = cluster_and_command(name)
    assert cluster["rayVersion"].startswith(f"{ray_version}.")
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # no actors beside the driver
    (driver,), (actors,) = (each["template"]["spec"]["containers"] for each in (head, group))
    assert driver["image"] == actors["image"]

    program, name, *argv = shlex.split(command)
    flags = batch.make_parser().parse_known_args(argv)[0]
    batch.check(flags)
    assert (program, name, flags.ray) == ("im3d", "batch", "auto")
    limits = actors["resources"]["limits"]
    per_machine = limits["nvidia.com/gpu"] // flags.gpus_per_actor
    assert per_machine * flags.cpus_per_actor <= actors["resources"]["requests"]["cpu"]
    _, most = cluster_flags.actor_range(flags.actors)
    assert group["minReplicas"] == 0 and group["maxReplicas"] * per_machine == most

    for container, pod in ((driver, head["template"]["spec"]), (actors, group["template"]["spec"])):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
        assert all(str(path).startswith("/runs/") for path in (flags.prompts, flags.out))
        assert mounts["runs"] == "/runs"
    keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
    assert {"cloud.google.com/gke-spot", "nvidia.com/gpu"} == keys


def test_the_driver_has_longer_to_stop_than_ray_gives_by_default():
    job = yaml.safe_load((ROOT / "launch/ray/rayjob.yaml").read_text())
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 30
