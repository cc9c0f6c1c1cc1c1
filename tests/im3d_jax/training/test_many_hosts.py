"""`im3d train` as 2 processes of 4 devices, as 1 of 8 and as 1 of 1: the same losses and the same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

RUNS = {  # name: (processes, devices of each, mesh)
    "alone": (1, 1, "data=-1"),
    "one host": (1, 8, "data=8"),
    "two hosts": (2, 4, "fsdp=8"),  # each holds half of every parameter
}


@pytest.fixture(scope="module")
def config_file(shrunk, random_weights, tmp_path_factory):
    """One stream, so one program to compile; only temporal layers train, so a small one."""
    config = shrunk(init_from=random_weights, num_steps=3, trainable="temporal").to_dict()
    del config["train"]["streams"]["image"]
    path = tmp_path_factory.mktemp("config") / "shrunk.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config})\n"
    )
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def train(config_file, workdir, processes, devices, mesh):
    """Runs it and gives (lines of metrics.jsonl, weights, output of each process)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "im3d_jax", "train", f"--config={config_file}", f"--workdir={workdir}"]
    command.append(f"--config.train.mesh={mesh}")
    if processes > 1:
        command += [f"--coordinator=localhost:{free_port()}", f"--num-processes={processes}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = [
        subprocess.Popen(
            command + [f"--process-id={i}"] * (processes > 1), env=environment, cwd=ROOT, **pipes
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(workdir / "weights.safetensors"), outputs


@pytest.fixture(scope="module")
def results(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs")
    return {name: train(config_file, workdir / name, *run) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "alone"])
def test_hosts_and_meshes_train_as_one_device_does(name, results, random_weights):
    (lines, weights, _), (expected_lines, expected_weights, _) = results[name], results["alone"]
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines] == [1, 2, 3]
    for key in ("turntable_loss", "turntable_grad_norm"):
        values, expected = ([line[key] for line in each] for each in (lines, expected_lines))
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert len(set(values)) == 3
    assert weights.keys() == expected_weights.keys()
    # Not element by element: Adam makes a whole step also of a gradient that is rounding and nothing else.
    start = load_file(random_weights)
    differences = {path: np.float64(value) - expected_weights[path] for path, value in weights.items()}
    changes = {path: np.float64(value) - start[path] for path, value in expected_weights.items()}
    error, change = (sum(np.abs(each).sum() for each in tree.values()) for tree in (differences, changes))
    assert error < 0.005 * change


def test_only_process_0_speaks(results):
    first, second = results["two hosts"][2]
    assert "step 3/3" in first and "wrote" in first
    assert "step 3/3" not in second and "wrote" not in second
