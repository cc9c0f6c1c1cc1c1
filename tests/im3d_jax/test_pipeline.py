"""A pipeline's assets: how long their files last, whose files stay, what is read and counted."""

import dataclasses
import gc
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from im3d_jax import config_flags, method, pipeline, stages
from im3d_jax.asset import ASSET, Request
from im3d_jax.conditions import pictures
from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.outputs import files_of
from recon_torch.settings import ExportSettings, MeshSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]

CHANGES = """
    config.video.num_steps = 2
    config.text_to_image.num_steps = 1
    config.rounds.update(at_steps=(2,), num_runs=1, num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=4, lpips_net="alex")
    config.turntable.update(num_frames=2, size=32)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, write_runnable, local_client):
    config = config_flags.load(write_runnable(tmp_path_factory.mktemp("config"), CHANGES))
    with pipeline.load(config) as loaded:
        yield loaded


def test_temporary_files_last_as_long_as_the_asset(loaded):
    asset = loaded.make("a red car", show=stages.silent)
    directory = asset.directory
    assert (directory / "report.json").is_file()
    del asset
    gc.collect()
    assert not directory.exists()


def test_a_failed_asset_leaves_no_temporary_files(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline.Pipeline, "make_best", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loaded.make("a red car")
    (own,) = tmp_path.iterdir()  # the process's own directory, which it removes at its end
    assert [path.name for path in own.iterdir()] == [locks.OWNER]


def test_files_of_others_stay(loaded, tmp_path):
    """Also within the directories of an asset, whose own files of an earlier one go."""
    loaded.make("a blue car", out=tmp_path, save_views=True)
    theirs = ["notes.txt", "images/photo.png", "images/mine/000.png", "views_0/notes.txt", "views_x/000.png"]
    for name in theirs:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    asset = loaded.make("a red car", out=tmp_path)
    assert all((tmp_path / name).read_text() == name for name in theirs)
    assert (tmp_path / "views_0").is_dir() and not (tmp_path / "views_1").exists()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "photo.png", "mine", "000.png", "001.png", "002.png", "003.png",
    }  # fmt: skip
    files = [path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path, ASSET)]
    assert not set(files) & set(theirs)
    copy = asset.save(tmp_path / "copy")
    assert [path.relative_to(copy).as_posix() for path in files_of(copy, ASSET)] == files
    assert (copy / "asset.ply").read_bytes() == (tmp_path / "asset.ply").read_bytes()
    with pytest.raises(UserError, match="is what it is to read"):
        asset.save(tmp_path)


@pytest.mark.parametrize("name", ["images", "images/000.png", "report.json", "asset.safetensors"])
def test_a_file_that_is_not_ours_is_refused_before_anything_is_made(loaded, monkeypatch, tmp_path, name):
    monkeypatch.setattr(method, "make_asset", lambda *_: 1 / 0)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is no"):
        loaded.make("a red car", out=tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_the_picture_is_read_once_for_all_tries(loaded, monkeypatch, tmp_path):
    inside = np.hypot(*(np.mgrid[:40, :40] - 20)) < 10
    Image.fromarray(np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)).save(tmp_path / "a.png")
    read, load_images = [], pictures.load_images

    def counted(paths, *arguments, **named):
        read.extend(paths)
        return load_images(paths, *arguments, **named)

    monkeypatch.setattr(pictures, "load_images", counted)
    with loaded.own_client() as client:
        request = Request("", str(tmp_path / "a.png"), 0, tmp_path / "out")
        request.out.mkdir()
        monkeypatch.setattr(type(client), "inspect", lambda *_: verdict("bad"))
        asset = loaded.make_best(request, client, num_retries=2)
    assert read == [tmp_path / "a.png"]
    assert [each["seed"] for each in asset.report["tries"]] == [0, 1000, 2000]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == asset.report


def verdict(name):
    return {"verdict": name, "reasons": ["why"], "hints": [], "numbers": {}}


def test_threads_count_the_calls_of_their_own_assets(loaded, tmp_path):
    """2 denoising steps of the video and 1 of the round, each one call; the picture takes 1."""

    def make(number):
        return loaded.make("a red car", seed=number, out=tmp_path / str(number), show=stages.silent)

    with ThreadPoolExecutor(3) as threads:
        reports = [asset.report for asset in threads.map(make, range(3))]
    assert [report["network_calls"] for report in reports] == [3] * 3
    assert [report["text_to_image_calls"] for report in reports] == [1] * 3
    assert [report["seed"] for report in reports] == [0, 1, 2]


def test_the_elevation_that_is_given_is_reported_as_it_was_given(loaded, tmp_path):
    report = loaded.make("a red car", elevation_deg=12.3, out=tmp_path).report
    assert report["given_elevation_deg"] == 12.3 and report["elevation_deg"] == pytest.approx(12.3)
    assert loaded.make("a red car", out=tmp_path).report["given_elevation_deg"] is None


def test_renders_are_encoded_for_further_rounds_only(loaded, monkeypatch, tmp_path):
    encoded, encode_renders = [], method.encode_renders

    def counted(*arguments):
        encoded.append(arguments)
        return encode_renders(*arguments)

    monkeypatch.setattr(method, "encode_renders", counted)
    asset = loaded.make("a red car", out=tmp_path, show=stages.silent)
    assert len(asset.rounds) == 2 and len(encoded) == 1


def test_a_mesh_on_request(loaded, tmp_path, monkeypatch):
    """It is noted in the report, and a fit without a surface is an asset all the same."""
    settings = dataclasses.replace(
        loaded.settings,
        export=ExportSettings(mesh=True),
        mesh=MeshSettings(level=0.02, resolution=32, texture=32, triangles=200),
    )
    monkeypatch.setattr(loaded, "settings", settings)
    asset = loaded.make("a red car", out=tmp_path, show=stages.silent)
    assert "error" not in asset.report["mesh"]
    assert asset.report["mesh"] == json.loads((tmp_path / "mesh.json").read_text())
    assert asset.report["mesh"]["texture_from"] == "views" and (tmp_path / "mesh.glb").stat().st_size > 1000
    none = dataclasses.replace(settings, mesh=MeshSettings(level=99.0, resolution=32))
    monkeypatch.setattr(loaded, "settings", none)
    asset = loaded.make("a red car", out=tmp_path, show=stages.silent)
    assert "no surface" in asset.report["mesh"]["error"] and not (tmp_path / "mesh.glb").exists()
