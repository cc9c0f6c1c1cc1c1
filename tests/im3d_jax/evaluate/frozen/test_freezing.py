"""Frozen truth: what is written, what is kept, and what is noticed when it was changed."""

import json
import shutil

import numpy as np
import pytest
import trimesh

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.evaluate.frozen import freezing, manifest
from im3d_jax.evaluate.frozen.freezing import How
from im3d_jax.evaluate.frozen.protocols import Protocol
from recon_torch.views.cameras import orbit

HOW = How(Protocol.SV3D_STATIC, 16, 20.0, 0, UpAxis.Z)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """A box, a model as Gazebo has it, and a file that is none."""
    root = tmp_path_factory.mktemp("meshes")
    (root / "toys").mkdir()
    trimesh.creation.box([1, 2, 3]).export(root / "toys" / "box.ply")
    (root / "Shoe" / "meshes").mkdir(parents=True)
    trimesh.creation.icosphere(1).export(root / "Shoe" / "meshes" / "model.stl")
    (root / "bad.stl").write_bytes(b"solid")
    return root


@pytest.fixture(scope="module")
def frozen(meshes, tmp_path_factory):
    out = tmp_path_factory.mktemp("frozen")
    _, failed = freezing.freeze(freezing.objects_below(meshes), meshes, {"toys/box": "a box"}, HOW, out, 0)
    return out, failed


def test_objects_are_called_by_their_paths(meshes, frozen):
    assert set(freezing.objects_below(meshes)) == {"Shoe", "toys__box", "bad"}
    truth = manifest.read(frozen[0])
    assert [item.name for item in truth.objects] == ["Shoe", "toys__box"]
    assert set(truth.failed) == set(frozen[1]) == {"bad"}
    assert [item.caption for item in truth.objects] == ["", "a box"]


def test_views_are_renders_from_the_protocols_cameras(meshes, frozen):
    truth = manifest.read(frozen[0])
    box = truth.objects[1]
    cameras = truth.cameras(box)
    expected = orbit(21, np.radians(20), 16, azimuths_rad=2 * np.pi * np.arange(1, 22) / 21)
    np.testing.assert_allclose(cameras.w2c, expected.w2c, atol=1e-6)
    np.testing.assert_allclose(cameras.intrinsics_px, expected.intrinsics_px, rtol=1e-6)
    rgb, alpha = truth.pictures(box)
    rgba, _ = mesh_rendering.render(load_mesh(meshes / "toys" / "box.ply", "z"), expected)
    np.testing.assert_allclose(alpha, rgba[..., 3:], atol=1 / 255)
    np.testing.assert_allclose(rgb, rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], atol=2 / 255)
    surface = truth.surface(box)
    np.testing.assert_allclose(surface.reshape(-1, 3).max(0), np.array([1, 2, 3]) / np.sqrt(56), rtol=1e-5)


def test_other_tools_read_the_surface(frozen):
    read = trimesh.load(frozen[0] / "objects" / "toys__box" / "surface.ply")
    assert len(read.faces) == 12 and read.area == pytest.approx(22 / 14, rel=1e-5)


def copy(frozen, tmp_path):
    shutil.copytree(frozen[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "name", ["objects/Shoe/images/003.png", "inputs/Shoe.png", "objects/Shoe/surface.ply"]
)
def test_a_changed_file_is_named(frozen, tmp_path, user_error, name):
    there = copy(frozen, tmp_path)
    (there / name).write_bytes((there / name).read_bytes() + b" ")
    with user_error(f"{name} was changed; copy it again"):
        manifest.read(there)
    (there / name).unlink()
    with user_error(f"{name} is missing"):
        manifest.read(there)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told.update(format=7), "no manifest of format 1"),
        (lambda told: told.update(objects=[]), "has no objects"),
        (lambda told: told["objects"][0].pop("given"), "an object of another form"),
        (lambda told: told["objects"][0].update(given="last"), "broken at 'Shoe': given"),
        (lambda told: told["objects"][0]["files"].update({"/etc/passwd": ""}), "broken at 'Shoe': files"),
        (lambda told: told["objects"][0].update(name="../Shoe"), "broken at '../Shoe'"),
    ],
)
def test_a_broken_manifest_is_refused(frozen, tmp_path, user_error, change, words):
    there = copy(frozen, tmp_path)
    told = json.loads((there / "truth.json").read_text())
    change(told)
    (there / "truth.json").write_text(json.dumps(told))
    with user_error(words):
        manifest.read(there)


def test_an_interrupted_run_goes_on_and_ends_alike(meshes, frozen, tmp_path, monkeypatch):
    there = copy(frozen, tmp_path)
    (there / "truth.json").unlink()
    shutil.rmtree(there / "objects" / "Shoe")
    rendered = []
    render = mesh_rendering.render
    monkeypatch.setattr(mesh_rendering, "render", lambda *a: rendered.append(1) or render(*a))
    captions = {"toys/box": "a box"}
    freezing.freeze(freezing.objects_below(meshes), meshes, captions, HOW, there, 0)
    assert len(rendered) == 1
    assert (there / "truth.json").read_bytes() == (frozen[0] / "truth.json").read_bytes()


def test_what_is_frozen_or_was_begun_otherwise_is_refused(meshes, frozen, tmp_path, user_error):
    found = freezing.objects_below(meshes)
    with user_error("holds a truth already, which is frozen"):
        freezing.refuse_frozen(frozen[0])
    there = copy(frozen, tmp_path)
    (there / "truth.json").unlink()
    with user_error("was begun with size_px 16, now it is 32"):
        freezing.freeze(found, meshes, {}, HOW._replace(size_px=32), there, 0)
    with user_error("none of 1 meshes could be rendered; bad: cannot read"):
        freezing.freeze({"bad": found["bad"]}, meshes, {}, HOW, tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()
