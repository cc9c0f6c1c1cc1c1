"""The client and its worker: what they share, what goes through the pipe, what is left when one dies.

A process costs seconds to start, so most tests use one client, each with an asset of its own.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recon_torch.errors import UserError
from recon_torch.fit.optimization import Fit
from recon_torch.fit.quality import inspect
from recon_torch.fit.recovery import SNAPSHOT_STEPS
from recon_torch.formats.ply import load_ply
from recon_torch.process import ReconstructionClient
from recon_torch.process.client import ReconClient, WorkerDied, WorkerFailed
from recon_torch.raster.render import render
from recon_torch.settings import ExportSettings, FitSettings, GateSettings
from recon_torch.views.cameras import orbit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no weights for LPIPS")]

CAMERAS = orbit(3, size=40)
SETTINGS = FitSettings(num_gaussians=200, num_steps=200, lpips_net="alex", w_lpips=0.0, w_rgb=1.0)
PATIENCE_S = 120.0  # for what takes a second where nothing else runs

# A parent with two workers. The kernel ends the one that the main thread started, even if it is stopped; the
# other one, which has nothing to do, has to notice the end of the pipe.
PARENT = """
import threading, time
from recon_torch.views.cameras import orbit
from recon_torch.process.client import ReconClient
from recon_torch.settings import FitSettings

def start(starter):
    settings = FitSettings(num_gaussians=10, lpips_net="alex", w_lpips=0.0)
    client = ReconClient(orbit(1, size=32), settings, num_threads=1)
    client.masks.fill_(1)
    client.set_targets()
    client.fit(1)
    print(starter, client.pid, flush=True)
    return client

def start_and_wait():
    client = start("thread")
    time.sleep(10**6)

if __name__ == "__main__":
    threading.Thread(target=start_and_wait).start()
    start("main").fit(10**9)
"""


def ball_views():
    """A grey disc on white, from all sides."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    masks = ((rows - 19.5) ** 2 + (columns - 19.5) ** 2 < 100).float()[None, :, :, None].repeat(3, 1, 1, 1)
    return 1 - 0.6 * masks.expand(-1, -1, -1, 3), masks


def begin_asset(client, settings=SETTINGS):
    client.reset(CAMERAS, settings)
    views, masks = ball_views()
    client.views.copy_(views)
    client.masks.copy_(masks)
    client.set_targets()


def wait_until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class At:
    """A function for `on_progress` that keeps the steps and calls `action` once, at a given step."""

    def __init__(self, step, action):
        self.step, self.action, self.steps = step, action, []

    def __call__(self, step, losses):
        self.steps.append(step)
        if self.action and step >= self.step:
            action, self.action = self.action, None
            action()


@pytest.fixture(scope="module")
def client():
    client = ReconClient(CAMERAS, SETTINGS, num_threads=1, progress_period_s=0.0)
    yield client
    client.close()


def test_the_client_keeps_its_contract(client):
    assert isinstance(client, ReconstructionClient)


def test_importing_the_client_loads_neither_gsplat_nor_lpips_nor_numba():
    code = "import sys, recon_torch.process.client; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" in modules.split()
    assert not {"gsplat", "lpips", "numba", "torchvision", "jax"} & set(modules.split())


def test_the_worker_writes_what_the_exported_gaussians_show(client, tmp_path):
    begin_asset(client)
    losses = []
    metrics = client.fit(60, lambda step, values: losses.append(values["loss"]))
    assert len(losses) == client.step == 60 and losses[-1] < 0.7 * losses[0]
    assert set(metrics) >= {"psnr", "ssim", "lpips"} and client.num_gaussians > 0

    pointer = client.render()[0].data_ptr()
    renders, alphas = client.render()
    assert renders.is_shared() and renders.data_ptr() == pointer
    client.export(tmp_path / "asset.ply")
    gaussians = load_ply(tmp_path / "asset.ply").gaussians
    client.export(tmp_path / "world.ply", ExportSettings(axes="world", formats=("glb",)))
    in_world = load_ply(tmp_path / "world.ply")
    assert client.notes[-1].startswith(f"world.glb: {client.num_gaussians} Gaussians in ")
    assert (tmp_path / "world.glb").read_bytes().startswith(b"glTF")
    assert in_world.upright is None and torch.equal(in_world.gaussians.means, gaussians.means)
    assert len(gaussians.means) == client.num_gaussians
    expected = render(gaussians, CAMERAS, background=torch.ones(3))
    torch.testing.assert_close(renders, expected.rgb, atol=1e-4, rtol=0)
    torch.testing.assert_close(alphas, expected.alpha, atol=1e-4, rtol=0)


def test_other_cameras_render_into_tensors_of_their_size(client):
    begin_asset(client)
    client.fit(20)
    own = client.render()[0].clone()
    turntable, alphas = client.render(orbit(18, size=56))  # more views than one chunk of the worker
    assert turntable.shape == (18, 56, 56, 3) and alphas.shape == (18, 56, 56, 1)
    assert turntable.is_shared() and client.renders is turntable
    assert bool((alphas.amax((1, 2, 3)) > 0.1).all())  # every view has been written
    again = client.render(CAMERAS[1:])[0]
    torch.testing.assert_close(again, own[1:], atol=0, rtol=0)


def test_a_new_asset_begins_afresh_in_the_same_process(client):
    begin_asset(client)
    first = client.pid, client.fit(30), client.render()[0].clone()
    client.reset(orbit(2, size=32), SETTINGS)
    assert client.views.shape == (2, 32, 32, 3) and client.masks.shape == (2, 32, 32, 1)
    client.masks.fill_(1)
    client.set_targets()
    client.fit(5)
    begin_asset(client)
    assert (client.pid, client.step) == (first[0], 0)
    assert client.fit(30) == first[1]
    assert torch.equal(client.render()[0], first[2])


def test_a_radiance_field_is_fitted_judged_and_exported_as_in_this_process(client, tmp_path):
    settings = dataclasses.replace(SETTINGS, representation="nerf", nerf_cells=16, nerf_samples=8)
    begin_asset(client, settings)
    client.fit(10)
    fit = Fit(CAMERAS, settings, "cpu")
    fit.set_targets(*ball_views())
    fit.run(10)
    torch.testing.assert_close(client.render()[0], fit.render(CAMERAS).rgb, atol=1e-4, rtol=0)
    judged, expected = client.inspect(GateSettings()), inspect(fit, CAMERAS)
    assert judged["verdict"] == expected["verdict"] and judged["numbers"].keys() == expected["numbers"].keys()
    assert client.inspect(GateSettings(view_shape=1.1))["verdict"] == "bad"
    client.export(tmp_path / "asset.ply")
    assert [path.name for path in tmp_path.iterdir()] == ["asset.safetensors"]
    assert any("asset.safetensors" in note for note in client.notes)


def test_only_small_messages_go_through_the_pipe(client, monkeypatch):
    sizes = []
    dumps, loads = ForkingPickler.dumps, ForkingPickler.loads  # by which the pipe writes and reads

    def counted_dumps(message):
        content = dumps(message)
        sizes.append(len(content))
        return content

    def counted_loads(content):
        sizes.append(len(content))
        return loads(content)

    monkeypatch.setattr(ForkingPickler, "dumps", counted_dumps)
    monkeypatch.setattr(ForkingPickler, "loads", counted_loads)
    begin_asset(client)
    client.fit(10)
    renders = client.render()[0]
    assert len(sizes) > 10
    assert max(sizes) < 2048 < 4 * renders.numel() / 10


def test_errors_reach_the_client_and_the_worker_goes_on(client):
    begin_asset(client)
    pid = client.pid
    client.views[1, 3, 4, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        client.set_targets()
    client.reset()
    with pytest.raises(WorkerFailed, match=r"(?s)worker.py.*AttributeError"):  # a bug: there are no targets
        client.fit(1)
    client.views.fill_(0.5)
    client.set_targets()
    client.fit(3)
    assert client.pid == pid and client.step == 3 and client.notes == Fit(CAMERAS, SETTINGS).notes


def test_a_fit_that_keeps_failing_is_one_line_and_the_worker_goes_on(client, user_error):
    begin_asset(client, dataclasses.replace(SETTINGS, prune_opacity=0.9999))
    pid = client.pid
    with user_error("pruned every Gaussian, after 3 fresh attempts"):
        client.fit(60)
    begin_asset(client)
    client.fit(2)
    assert client.pid == pid and client.step == 2


def test_a_full_disk_costs_the_snapshots_but_not_the_fit(client, tmp_path):
    begin_asset(client)
    client.fit(5)
    client.snapshot_path.unlink()
    client.snapshot_path.mkdir()  # so that no file can take this name
    client.fit(60)
    assert client.step == 60 and sum("cannot write" in note for note in client.notes) == 1
    client.snapshot_path.rmdir()

    client.export(tmp_path / "asset.ply")
    before = (tmp_path / "asset.ply").read_bytes()
    with pytest.raises(UserError, match="cannot write"):
        client.export(tmp_path / "asset.ply" / "deeper.ply")
    assert (tmp_path / "asset.ply").read_bytes() == before


def test_an_export_is_made_by_the_next_worker_if_one_dies(client, tmp_path):
    begin_asset(client)
    client.fit(10)
    os.kill(client.pid, signal.SIGKILL)
    client.export(tmp_path / "asset.ply")
    assert [path.name for path in tmp_path.iterdir()] == ["asset.ply"]
    assert len(load_ply(tmp_path / "asset.ply").gaussians.means) == client.num_gaussians and client.step == 10


def test_a_worker_killed_in_mid_fit_costs_at_most_one_snapshot_interval(client, caplog):
    begin_asset(client)
    metrics = client.fit(130)
    renders = client.render()[0].clone()

    begin_asset(client)
    kill = At(87, lambda: os.kill(client.pid, signal.SIGKILL))
    first_pid = client.pid
    assert client.fit(130, kill) == metrics
    assert torch.equal(client.render()[0], renders)
    assert client.pid != first_pid and not is_running(first_pid)
    assert 130 < len(kill.steps) <= 130 + SNAPSHOT_STEPS
    assert set(kill.steps) == set(range(1, 131))
    assert "SIGKILL" in client.notes[-1] and "SIGKILL" in caplog.text


def test_a_stalled_worker_is_replaced_and_the_second_death_is_the_last(client, monkeypatch):
    begin_asset(client)
    first_pid = client.pid
    monkeypatch.setattr(client, "stall_timeout_s", 8.0)

    def stop():
        os.kill(first_pid, signal.SIGSTOP)
        client.stall_timeout_s = PATIENCE_S  # of the next worker, as this machine may be slow

    client.fit(70, At(55, stop))
    assert client.step == 70 and client.pid != first_pid and not is_running(first_pid)
    assert "silent for 8 s" in client.notes[-1]

    # A crash inside C code: faulthandler prints the Python stack on the way out.
    with pytest.raises(WorkerDied, match=r"silent.*SIGABRT.*Fatal Python error: Aborted") as error:
        client.fit(120, At(80, lambda: os.kill(client.pid, signal.SIGABRT)))
    assert "\n" not in str(error.value) and "optimization.py" in error.value.details
    assert client.pid is None

    begin_asset(client)  # what killed two workers need not kill the next asset
    client.fit(2)
    assert client.step == 2 and client.pid is not None


def test_signals_to_the_process_group_are_handled_by_the_parent_alone(client, request):
    # Whoever runs the tests may have told this process to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    begin_asset(client)
    pid = client.pid
    client.fit(15, At(10, lambda: os.kill(pid, signal.SIGINT)))
    client.fit(30, At(20, lambda: os.kill(pid, signal.SIGTERM)))  # as a scheduler does
    assert client.pid == pid and client.step == 30
    with pytest.raises(KeyboardInterrupt):
        client.fit(60, At(40, lambda: signal.raise_signal(signal.SIGINT)))
    assert client.pid is None and not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the notice of a parent's end is Linux's")
def test_no_worker_survives_the_kill_of_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # the killed one cannot tidy up
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    pids = {}
    for line in parent.stdout:
        starter, pid = line.split()
        pids[starter] = int(pid)
        if len(pids) == 2:
            break
    assert len(pids) == 2 and all(is_running(pid) for pid in pids.values())
    os.kill(pids["main"], signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(is_running(pid) for pid in pids.values()))


def test_closing_ends_the_process_and_removes_the_snapshots(tmp_path):
    with ReconClient(CAMERAS, SETTINGS, snapshot_dir=tmp_path) as client:
        pid = client.pid
        assert pid is not None and any(tmp_path.iterdir())
    assert not is_running(pid) and not any(tmp_path.iterdir())


def test_a_missing_snapshot_directory_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="choose another snapshot_dir"):
        ReconClient(CAMERAS, SETTINGS, snapshot_dir=tmp_path / "absent")


def test_too_little_shared_memory_is_a_users_error(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="shm"):
        ReconClient(CAMERAS, SETTINGS, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_worker_renders_into_cuda_memory_of_this_process():
    with ReconClient(CAMERAS, SETTINGS, device="cuda") as client:
        begin_asset(client)
        pointer = client.render()[0].data_ptr()
        client.fit(60)
        renders, _ = client.render()
        assert renders.is_cuda and renders.data_ptr() == pointer
        torch.testing.assert_close(renders.cpu(), ball_views()[0], atol=0.9, rtol=0)
        assert float((renders.cpu() - ball_views()[0]).abs().mean()) < 0.1
