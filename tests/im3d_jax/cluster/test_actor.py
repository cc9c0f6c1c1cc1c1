"""What an actor does, without Ray: it is an object whose methods are called."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from im3d_jax import config_flags, pipeline
from im3d_jax.asset import REPORT, Request
from im3d_jax.cluster.actor import AssetActor, Order
from im3d_jax.conditions import text_to_image
from im3d_jax.jobs import rows
from im3d_jax.jobs.object_storage import Bucket, opened
from im3d_jax.jobs.storage import Disk
from im3d_jax.objects.urls import parse
from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.process.client import WorkerDied


@pytest.fixture
def make(cluster_benchmark, tmp_path, monkeypatch):
    """Makes an actor whose model is the stand-in with some of its methods replaced."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("NPROC", "7")
    settings = cluster_benchmark.read_settings()

    def make(make_best=None, token="token", settings=settings, **changes):
        class Model(cluster_benchmark.StandIn):
            def start_client(self):
                return MagicMock()

        if make_best:
            Model.make_best = make_best
        order = Order(partial(Model, settings), settings, Disk(tmp_path), {}, os.getcwd(), token, **changes)
        return AssetActor(order, lambda: "node")

    (tmp_path / "token").touch()
    return make


def request_of(tmp_path, seed=0):
    return Request("a duck", "", seed, tmp_path / "assets/000000")


def test_an_actor_makes_an_asset_once(make, tmp_path):
    actor = make()
    assert actor.place().node_id == "node" and actor.place().pid == os.getpid()
    assert actor.load() == ""
    kind, name, outcome = actor.make(request_of(tmp_path))
    assert (kind, name, outcome.verdict, outcome.error) == ("Done", "000000", "good", "")
    written = (tmp_path / "assets/000000" / REPORT).read_text()
    # Another actor may have died before it could tell that it was done.
    assert make().load() == "" and actor.make(request_of(tmp_path))[2] == outcome
    assert (tmp_path / "assets/000000" / REPORT).read_text() == written


def test_what_must_be_set_before_jax_starts(make):
    make(num_threads=3).load()
    assert os.environ["NPROC"] == "3" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    os.environ["CUDA_VISIBLE_DEVICES"] = "5"
    make(has_gpu=True).load()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_a_directory_that_is_not_shared_is_refused(make, tmp_path):
    assert (
        make(token="elsewhere").load()
        == f"{tmp_path} is not what the driver sees there; share it with all nodes"
    )
    assert not (tmp_path / "assets").exists()


def test_a_model_that_cannot_load_is_refused_in_a_line(make):
    actor = make()
    actor._order = actor._order._replace(load=partial(_raise, UserError("no weights at w.npz")))  # noqa: SLF001
    assert actor.load() == "no weights at w.npz"
    actor._order = actor._order._replace(load=partial(_raise, OSError("disk")))  # noqa: SLF001
    assert actor.load() == "OSError: disk"


def _raise(error):
    raise error


def test_failures_are_told_by_their_kinds(make, tmp_path):
    def make_best(model, request, client, **_):
        raise [UserError("no"), WorkerDied("the 3D worker died twice")][request.seed]

    actor = make(make_best)
    actor.load()
    kind, _, outcome = actor.make(request_of(tmp_path, seed=0))
    assert kind == "Done" and outcome.error == "no"
    assert json.loads((tmp_path / "assets/000000/error.json").read_text())["error"] == "no"
    assert actor.make(request_of(tmp_path, seed=1)) == ("Broken", "000000", "the 3D worker died twice")


def test_the_picture_of_a_text_to_image_pipeline_is_drawn_once(make, tmp_path, monkeypatch):
    drawn = []

    def draw(path, prompts, seeds, *_):
        drawn.extend(prompts)
        if "x" in prompts:
            raise UserError("its safety checker blanked 'x'")
        disc = (np.hypot(*(np.mgrid[:40, :40] - 20)) < 10)[..., None]
        return [np.where(disc, np.float32([0.8, 0.1, 0.2]), np.float32(1)) for _ in prompts]

    monkeypatch.setattr(text_to_image, "draw", draw)
    config = config_flags.with_overrides("configs/tiny.py", {"text_to_image.pipeline": "sdxl"})
    actor = make(settings=pipeline.read_settings(config))
    assert actor.load() == ""
    request = request_of(tmp_path)
    assert actor.make(request)[2].verdict == "good"
    report = tmp_path / "assets/000000" / REPORT
    picture = Path(json.loads(report.read_text())["image"])
    assert picture.is_file() and picture.parent.parent == tmp_path / "pictures"
    report.unlink()
    assert actor.make(request)[2].verdict == "good" and drawn == ["a duck"]
    kind, _, outcome = actor.make(request._replace(prompt="x", out=tmp_path / "assets/000001"))
    assert kind == "Done" and outcome.error == "its safety checker blanked 'x'"


def test_an_asset_that_another_process_makes_is_left_to_it(make, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)
    actor = make()
    actor.load()
    request = request_of(tmp_path)
    request.out.mkdir(parents=True)
    with ThreadPoolExecutor(1) as other, locks.hold(request.out):  # a thread's locks are its own
        kind, _, error = other.submit(actor.make, request).result()
    assert kind == "Busy" and f"process {os.getpid()}" in error and rows.read(request.out) is None
    assert actor.make(request)[0] == "Done"


def test_an_actor_that_shares_nothing_but_a_bucket(cluster_benchmark, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("NPROC", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = cluster_benchmark.read_settings()

    class Model(cluster_benchmark.StandIn):
        num_made = 0

        def start_client(self):
            return MagicMock()

        def make_best(self, request, client, **options):
            Model.num_made += 1
            if request.prompt == "fails":
                raise UserError("this cannot be made")
            return super().make_best(request, client, **options)

    def actor(storage, token):
        order = Order(partial(Model, settings), settings, storage, {}, os.getcwd(), token)
        return AssetActor(order._replace(storage=pickle.loads(pickle.dumps(storage))), lambda: "node")

    with opened(parse(f"{bucket}/run")) as driver, driver.hold((0, 1), lambda: None), driver.token() as token:
        first, second = actor(driver, token), actor(driver, token)
        assert first.load() == second.load() == ""
        request = Request("a duck", "", 0, driver.out / "assets/000000")
        outcomes = [each.make(request)[2] for each in (first, second)]
        assert outcomes[0].error == "" and outcomes[0].verdict == "good"
        assert outcomes[0] == outcomes[1] and Model.num_made == 1
        failed = request._replace(prompt="fails", out=driver.out / "assets/000001")
        assert first.make(failed)[2].error == "this cannot be made"
        found = {row.name: row.verdict for row in driver.all_rows({})}
        assert found == {"000000": "good", "000001": "failed"}
        assert not list(driver.out.glob("assets/*/*"))
        assert (
            f"{bucket}/other is not what the driver sees"
            in actor(Bucket(parse(f"{bucket}/other")), token).load()
        )
