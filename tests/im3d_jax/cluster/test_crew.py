"""A job on a real Ray cluster of one node: actors are killed, and every asset is there in the end, once."""

import json
import os
import signal
from pathlib import Path

import pytest

from im3d_jax.cluster import dispatch
from im3d_jax.jobs import batch, index
from im3d_jax.jobs.stop import Stop
from recon_torch.errors import UserError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def job(cluster_benchmark, tmp_path):
    """Runs prompts on a cluster of this machine. Returns the exit code and the batch's directory."""
    from im3d_jax.cluster.making import Cluster, Needs, OnCluster

    ray.cloudpickle.register_pickle_by_value(cluster_benchmark)
    settings = cluster_benchmark.read_settings()

    class Killed(cluster_benchmark.StandIn):
        """Its actor is killed by some prompts: always, or the first time. One prompt fails."""

        def make_best(self, request, client, **options):
            died = Path(request.out).parents[1] / f"died-{request.out.name}"
            if request.prompt == "always" or (request.prompt == "once" and not died.exists()):
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt == "fails":
                raise UserError("this cannot be made")
            return super().make_best(request, client, **options)

    def run(prompts, address="auto", needs=None, **options):
        path = tmp_path / "prompts.txt"
        path.write_text("".join(f"{each}\n" for each in prompts))
        asked = batch.Batch(path, tmp_path / "out", "0/1")
        cluster = Cluster(address, needs or Needs(max_actors=2), **options)
        making = OnCluster(cluster, lambda: Killed(settings), settings, asked)
        with Stop() as stop:
            return batch.run(asked, settings, making, stop), tmp_path / "out"

    return run


@pytest.fixture(scope="module", autouse=True)
def local_cluster():
    from im3d_jax.cluster.crew import connected

    with connected("local", num_cpus=4):
        yield


def test_what_kills_actors_is_made_again_or_put_aside(job, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_STRIKES", 2)  # another actor takes seconds to start
    # What ends the last actors comes last, or the test would wait for yet another one.
    prompts = ["a", "once", "b", "c", "fails", "always"]
    code, out = job(prompts)
    rows = index.Index(out).refresh().rows
    assert code == 1 and len(rows) == len(prompts)
    errors = {row.prompt: row.error for row in rows.values() if row.error}
    assert errors.keys() == {"always", "fails"} and errors["fails"] == "this cannot be made"
    assert errors["always"].startswith("it has ended 2 actors, the last one on ")
    assert json.loads((out / "summary.json").read_text())["num_failed"] == 2
    assert not list(out.glob(".im3d_*"))  # the token is gone
    assert "4 made (4 good), 2 failed" in capsys.readouterr().out


def test_a_cluster_that_lacks_what_is_asked_for(job, tmp_path):
    from im3d_jax.cluster.making import Needs

    with pytest.raises(
        UserError, match=r"no actor after 3 s: .* 1 CPUs and 64 GPUs; there are 1 nodes .* 0 GPUs"
    ):
        job(["a"], needs=Needs(gpus=64.0), patience_s=3.0)
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(monkeypatch):
    from im3d_jax.cluster.crew import connected

    def init(**options):
        raise ConnectionError("Could not find any running Ray instance.\nMore lines")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(
            UserError, match="^no Ray cluster at 'auto': Could not find any running Ray instance.$"
        ),
        connected("auto"),
    ):
        pass


def test_an_actor_that_memory_ran_out_for_is_lost_and_its_node_stays(
    cluster_benchmark, tmp_path, monkeypatch
):
    from im3d_jax.cluster import crew as module
    from im3d_jax.cluster.actor import Order
    from im3d_jax.cluster.events import Lost

    def get(ref):  # what Ray's monitor of memory has killed ends in this, which is no RayActorError
        raise ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")

    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda handle, no_restart: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "id", "Alive": True}])
    order = Order(lambda: None, cluster_benchmark.read_settings(), tmp_path, {}, str(tmp_path))
    crew = module.RayCrew(order, module.Needs())
    crew._members["a"] = module.Member(None, "n7", "id", is_ready=True)  # noqa: SLF001
    crew._hear("ref", module.Call("a", "make"))  # noqa: SLF001
    [event] = crew.events(0.0)
    assert isinstance(event, Lost) and "low on memory" in event.error and not event.with_node


def test_what_raylets_say_is_not_printed(monkeypatch, capsys):
    from im3d_jax.cluster.crew import connected

    worker = ray._private.worker  # noqa: SLF001
    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    said = {"lines": ["A worker died."], "pid": "raylet", "is_err": False}  # as Ray's listener does
    worker.print_to_stdstream(said, ignore_prefix=False)
    assert "(raylet)" in capsys.readouterr().out
    with connected("auto"):
        worker.print_to_stdstream(said, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_a_cluster_of_this_machine_may_start_slowly(monkeypatch):
    from im3d_jax.cluster.crew import MAX_STARTS, connected

    begun = []

    def init(**options):
        begun.append(options["address"])
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for address, times in (("auto", 1), ("local", MAX_STARTS)):
        with pytest.raises(UserError, match="timed out during startup"), connected(address):
            pass
        assert begun == [address] * times
        begun.clear()


def test_signals_stay_those_of_the_batch(monkeypatch):
    from im3d_jax.cluster.crew import connected

    def init(**options):  # as Ray 2.60 does
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with Stop() as stop:
        stop.in_lanes = True
        with connected("auto"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.now and stop.by_signal
