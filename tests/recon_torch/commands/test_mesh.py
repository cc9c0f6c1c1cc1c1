"""`im3d mesh` from files to files, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
import trimesh

from recon_torch.commands import mesh
from recon_torch.files import write_json
from recon_torch.formats.ply import save_ply
from recon_torch.raster.gaussians import SH_C0, Gaussians
from recon_torch.raster.render import render
from recon_torch.scene.splats import moved_back
from recon_torch.views.cameras import orbit
from recon_torch.views.directory import write_views
from recon_torch.views.transforms import write_transforms
from recon_torch.views.world import World

SMALL = ["--resolution", "48", "--texture", "64", "--triangles", "600"]


def box(count: int = 12) -> Gaussians:
    """A shell around a box, 0.6 long in x, 0.4 in y, 0.2 in z, red where x > 0 and green elsewhere."""
    half = np.array([0.3, 0.2, 0.1])
    ticks = np.linspace(-1, 1, count)
    places = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    places = places[abs(places).max(-1) == 1] * half
    colors = np.where(places[:, :1] > 0, (0.9, 0.1, 0.1), (0.1, 0.8, 0.1))
    num = len(places)
    return Gaussians(
        torch.from_numpy(places).float(),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(num, 1),
        torch.full((num, 3), math.log(0.025)),
        torch.full((num,), 4.0),
        torch.from_numpy((colors - 0.5) / SH_C0).float(),
    )


@pytest.fixture
def asset(tmp_path):
    """A directory as `im3d generate` writes it."""
    directory = tmp_path / "asset"
    directory.mkdir()
    save_ply(box(), directory / "asset.ply")
    write_transforms(directory / "transforms.json", orbit(6, 0.4, 64), [f"{k:03d}.png" for k in range(6)])
    return directory


def run(*flags) -> None:
    mesh.main([*map(str, flags), *SMALL])


@pytest.mark.parametrize("method", ["opacity", "depth"])
def test_a_box(asset, tmp_path, method, capsys):
    """The long side, x of our world, is z of glTF; the front is red, and z of our world is up, which is y."""
    out = tmp_path / "mesh"
    run(asset, "--out", out, "--method", method, "--formats", "glb", "ply", "--watertight")
    report = json.loads((out / "mesh.json").read_text())
    assert report["watertight"] and report["triangles"] <= 600 and report["pieces"] == 1
    assert report["method"] == method and report["texture_coverage"] > 0.9 and report["up"] == "+Y"
    found = trimesh.load(out / "mesh.glb").geometry["mesh"]
    assert len(found.faces) == report["triangles"]
    np.testing.assert_allclose(found.extents, [0.5, 0.3, 0.7], atol=0.06)
    assert found.volume == pytest.approx(report["volume"], rel=1e-4)
    colors = found.visual.to_color().vertex_colors[:, :3] / 255
    front, back = found.vertices[:, 2] > 0.1, found.vertices[:, 2] < -0.1
    assert np.median(colors[front], 0)[0] > 0.7 and np.median(colors[back], 0)[1] > 0.6
    ply = trimesh.load(out / "mesh.ply")
    assert ply.is_watertight and ply.volume == pytest.approx(report["volume"], rel=1e-4)
    told = capsys.readouterr().out
    assert "mesh.glb, mesh.ply in" in told and "watertight" in told


def test_a_world_of_its_own(tmp_path):
    """A fit of views in a world ten times as large, with +Y up, far from its origin."""
    world = World(np.array([5.0, -3.0, 20.0]), 0.1)
    turn = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # +Z to +Y, -Y to +Z
    lying = box()._replace(means=box().means @ turn.T.mT)
    lying = lying._replace(means=box().means[:, [0, 2, 1]] * torch.tensor([1.0, 1, -1]))
    directory = tmp_path / "fit"
    directory.mkdir()
    save_ply(moved_back(lying, world), directory / "asset.ply", ("-x", "-y", "z"))
    place = {
        "center": world.center,
        "scale": world.scale,
        "up": (0.0, 1.0, 0.0),
        "asset_is_normalized": False,
    }
    write_json(directory / "report.json", {"world": place, "num_gaussians": len(lying.means)})
    run(directory, "--out", tmp_path / "mesh")
    found = trimesh.load(tmp_path / "mesh/mesh.glb").geometry["mesh"]
    # +Y of that world is up, and the turntable begins at its +Z.
    np.testing.assert_allclose(sorted(found.extents), [2, 4, 6], atol=1.2)
    assert found.extents[1] == found.extents.min()
    np.testing.assert_allclose(found.bounds.mean(0)[1], -3, atol=0.2)


def test_bad_input(asset, tmp_path, user_error):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "nerf").mkdir()
    (tmp_path / "nerf/asset.safetensors").write_bytes(b"x")
    (tmp_path / "fitted").mkdir()
    (tmp_path / "fitted/mesh.json").write_text("{}")
    trimesh.creation.box().export(tmp_path / "mesh.ply")
    (tmp_path / "text.ply").write_text("hello")
    cases = {
        "has no asset.ply": (tmp_path / "empty",),
        "radiance field": (tmp_path / "nerf",),
        "has a mesh": (tmp_path / "fitted",),
        "is not a .ply of Gaussians": (tmp_path / "mesh.ply",),
        "is not a .ply file": (tmp_path / "text.ply",),
        "cannot be read": (tmp_path / "missing",),
        "nowhere above the level": (asset, "--level", "90"),
        "the density of Gaussians is 0 where nothing is": (asset, "--level", "0"),
        "level is -0.5": (asset, "--level", "-0.5"),
        "a whole number from 4": (asset, "--triangles", "3"),
        "a whole number from 16": (asset, "--texture", "0"),
        "invalid choice: 'stl'": (asset, "--formats", "stl"),
        "does not exist": (asset, "--views", tmp_path / "missing"),
    }
    for message, flags in cases.items():
        with user_error(message):
            mesh.main([*map(str, flags), "--out", str(out), "--resolution", "32"])
        assert not out.exists(), message


def test_views_of_another_world_are_refused(asset, tmp_path, user_error):
    """As those of a user are, where the asset was brought to unit size."""
    cameras = orbit(6, 0.4, 48)
    rgba = np.concatenate([render(box(), cameras).rgb, render(box(), cameras).alpha], -1).clip(0, 1)
    write_views(tmp_path / "near", cameras, rgba)
    write_views(tmp_path / "far", World(np.array([0.4, 0.0, 0.0]), 1.0).cameras_back(cameras), rgba)
    with user_error("views show the asset elsewhere"):
        mesh.main([str(asset), "--views", str(tmp_path / "far"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    run(asset, "--views", tmp_path / "near", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/mesh.json").read_text())["texture_from"] == "views"


def test_files_of_others_stay(asset, tmp_path, user_error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mesh.obj").write_text("mine")
    with user_error("mesh.obj is not of an earlier run"):
        run(asset, "--out", out)
    assert (out / "mesh.obj").read_text() == "mine" and len(list(out.iterdir())) == 1


def test_a_second_run_takes_the_place_of_the_first(asset, tmp_path):
    out = tmp_path / "out"
    run(asset / "asset.ply", "--out", out, "--formats", "obj")
    run(asset, "--out", out)
    assert {path.name for path in out.iterdir()} >= {"mesh.glb", "mesh.json"}
    assert not (out / "mesh.obj").exists()
