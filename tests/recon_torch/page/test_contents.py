"""What a page shows is what the asset holds, turned as glTF has it; what cannot be read is named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from recon_torch.files import write_json
from recon_torch.formats.ply import save_ply
from recon_torch.page import contents
from recon_torch.text_files import read_json
from recon_torch.views import axes
from tests.recon_torch.page.conftest import CAMERAS, HOSTILE, page_points


def stored_means(ply: bytes) -> np.ndarray:
    """The columns x, y, z as any viewer reads them."""
    header, _, body = ply.partition(b"end_header\n")
    return np.frombuffer(body, "<f4").reshape(-1, header.count(b"property float"))[:, :3]


def test_all_of_an_asset_is_read(asset, blobs):
    shown = contents.read(asset)
    assert (shown.title, shown.verdict, shown.num_gaussians, shown.mesh) == (HOSTILE, "suspect", 4, None)
    assert ("seed", "7") in shown.facts and ("seconds", "fit 1.2, total 2.0") in shown.facts
    assert shown.notes == ["a note", HOSTILE]
    assert shown.rounds.labels == ["0: 20.0 dB to its views", "1: 30.1 dB to its views"]
    assert shown.rounds.num_rows == 5
    np.testing.assert_array_equal(stored_means(shown.ply), page_points(blobs.means.numpy()))


def test_cameras_see_points_of_the_page_where_their_pictures_show_them(asset):
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (20, 3))
    expected = CAMERAS.project(points).pixels
    views = contents.read(asset).views
    assert len(views) == len(CAMERAS)
    for view, pixels in zip(views, expected, strict=True):
        homogeneous = np.concatenate([page_points(points), np.ones((20, 1))], 1)
        x, y, z, _ = (homogeneous @ np.linalg.inv(view.c2w).T).T
        half = np.tan(np.radians(view.fov_deg) / 2)
        across, up = x / (-z * half * view.aspect), y / (-z * half)
        found = 24 * np.stack([1 + across, 1 - up], -1)
        np.testing.assert_allclose(found, pixels, atol=1e-3)
        assert Image.open(io.BytesIO(view.picture)).size == (48, 48)


@pytest.mark.parametrize("choice", ["upright", "world"])
@pytest.mark.parametrize(
    ("up", "turned"),
    # Where the axes of the asset's own world end up: up becomes +Y, and what is front there becomes +Z.
    [([0, 0, 1], [1, 2, 0]), ([0, 1, 0], [0, 1, 2]), ([1, 0, 0], [2, 0, 1])],
)
def test_an_asset_of_any_world_stands_at_unit_size(tmp_path, blobs, up, turned, choice):
    center, scale = np.array([3.0, -2.0, 5.0]), 0.25
    far = blobs._replace(means=blobs.means / scale + torch.tensor(center, dtype=torch.float32))
    save_ply(far, tmp_path / "asset.ply", axes.chosen(choice, np.array(up, float)))
    world = {"center": center.tolist(), "scale": scale, "up": up, "asset_is_normalized": False}
    write_json(tmp_path / "report.json", {"num_gaussians": 4, "world": world})
    (tmp_path / "mesh.glb").write_bytes(b"glTF")
    shown = contents.read(tmp_path)
    expected = blobs.means.numpy()[:, turned]
    np.testing.assert_allclose(stored_means(shown.ply), expected, atol=1e-6)
    in_mesh = far.means.numpy()[:, turned]  # a mesh has the same axes at the scale of the asset's world
    np.testing.assert_allclose(shown.mesh.scale * in_mesh + shown.mesh.offset, expected, atol=1e-6)


def test_an_upright_file_stands_without_its_report(tmp_path, blobs):
    """+Y is up in its world, as its header says."""
    save_ply(blobs, tmp_path / "moved.ply", axes.chosen("upright", np.array([0.0, 1.0, 0.0])))
    np.testing.assert_array_equal(
        stored_means(contents.read(tmp_path / "moved.ply").ply), blobs.means.numpy()
    )


def test_a_file_of_gaussians_alone_is_an_asset(asset):
    shown = contents.read(asset / "asset.ply")
    assert (shown.title, shown.num_gaussians, shown.views, shown.rounds) == ("asset", 4, [], None)


def test_a_mesh_is_shown_in_the_place_of_gaussians(asset):
    with_gaussians = contents.read(asset)
    (asset / "asset.ply").unlink()
    (asset / "mesh.glb").write_bytes(b"glTF and more")
    report = read_json(asset / "report.json")
    place = {"center": [1.0, 2.0, 3.0], "scale": 0.5, "up": [0.0, 0.0, 1.0]}
    write_json(asset / "report.json", report | {"num_gaussians": 0, "world": place})
    shown = contents.read(asset)
    assert (shown.ply, shown.num_gaussians, shown.title) == (b"", 0, with_gaussians.title)
    np.testing.assert_allclose(shown.mesh.offset, -0.5 * page_points(np.array([1.0, 2.0, 3.0])))
    assert len(shown.views) == len(CAMERAS) and not any(name == "Gaussians" for name, _ in shown.facts)


def test_a_mesh_is_taken_if_it_is_one(asset):
    (asset / "mesh.glb").write_bytes(b"glTF and more")
    mesh = contents.read(asset).mesh
    assert (mesh.glb, mesh.scale, mesh.offset.tolist()) == (b"glTF and more", 1, [0, 0, 0])
    (asset / "mesh.glb").write_bytes(b"<script>")
    assert contents.read(asset).mesh is None


def test_what_is_missing_or_spoilt_is_named_and_the_rest_is_shown(asset):
    (asset / "images" / "003.png").unlink()
    (asset / "report.json").write_text("{")
    shown = contents.read(asset)
    assert shown.num_gaussians == 4 and shown.title == "asset" and not shown.views
    assert any("003.png" in note for note in shown.notes) and any(
        "report.json" in note for note in shown.notes
    )


@pytest.mark.parametrize(
    "report",
    [
        [1, 2],
        {"quality": "good", "rounds": 3, "seconds": [1], "notes": "text", "prompt": {"a": [1]}},
        {"quality": {"verdict": 5, "reasons": {"a": 1}}, "rounds": [None, "x"], "seconds": {"a": "b"}},
    ],
)
def test_a_report_may_hold_anything(asset, report):
    write_json(asset / "report.json", report)
    assert contents.read(asset).num_gaussians == 4


def test_a_sheet_of_another_number_of_rounds_is_not_cut(asset):
    report = {"rounds": [{"psnr": 1.0}] * 5, "num_gaussians": 4}
    write_json(asset / "report.json", report)
    assert contents.read(asset).rounds is None


def test_a_directory_without_gaussians_is_refused(tmp_path, user_error):
    with user_error("has no asset.ply; give the directory of an asset"):
        contents.read(tmp_path)
