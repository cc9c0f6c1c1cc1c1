"""What the fit command refuses, in one line and before anything is written, and its help."""

import importlib.util

import numpy as np
import pytest

from recon_torch.commands import fit as fit_views
from recon_torch.errors import UserError
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import write_views

SIZE = 32
CAMERAS = orbit(8, 0.3, SIZE)


def squares(cameras: Cameras) -> np.ndarray:
    """RGBA pictures of a grey square."""
    images = np.zeros((len(cameras), SIZE, SIZE, 4))
    images[:, 8:24, 8:24] = [0.5, 0.5, 0.5, 1]
    return images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--held-out 9", "from 2 to the number of views"),
        ("--held-out nowhere", "nowhere/transforms.json does not exist"),
        ("--steps 0", "--steps: '0' is not a whole number from 1"),
        ("--seed -1", "--seed: '-1' is not a whole number from 0"),
        ("--size 8", "--size: '8' is not a whole number from 32"),
        ("--lpips-net resnet", "--lpips-net: invalid choice: 'resnet'"),
        ("--lpips-weights none.pth", "none.pth do not exist"),
        ("--isnet-weights none.onnx", "none.onnx do not exist"),
        ("--isnet-weights none.onnx --check", "none.onnx do not exist"),
        ("--engine vulkan", "vulkan"),
        ("--start none.ply", "none.ply cannot be read"),
        ("--axes up", "--axes: invalid choice: 'up'"),
        ("--formats png", "--formats: invalid choice: 'png'"),
        ("--formats spz spz4", "two write asset.spz"),
        ("--colour red", "--colour"),
        ("--up w", "--up"),
        ("--video turn.mp4", "either --views DIR or --video FILE"),
        ("--fov-deg 180", "--fov-deg: '180' is not a number from 1 to 170"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, options, message):
    write_views(tmp_path / "views", CAMERAS, squares(CAMERAS))
    with pytest.raises(UserError, match=message):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), *options.split()])
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out x", "either --views DIR or --video FILE"),
        ("--views x", "give --out DIR"),
        ("--views x --out y --at-once 0", "--at-once: '0' is not a whole number from 1"),
        ("--views x ./x --out y", "names a directory twice"),
        ("--views x z --out y --held-out test", "--held-out is N"),
        ("--video x --check", "--check needs --views"),
        ("--views x z --out y --start a.ply", "--start goes with one --views"),
        ("--views x --out y --representation nerf --start a.ply", "cannot --start"),
        ("--views x --out y --representation nerf --formats glb", "a radiance field has none"),
        ("--views x --out y --representation nerf --page", "--page shows Gaussians"),
        ("--views x --out y --representation nerf --mesh", "--mesh is made of Gaussians"),
        ("--views x --out y --representation nerf --viewer", "--viewer shows Gaussians"),
        ("--views x z --out y --viewer", "--viewer shows one fit"),
        ("--views x --out y --viewer-stay", "--viewer-stay keeps the page of --viewer"),
        ("--views x --out y --viewer --viewer-port 65536", "--viewer-port: '65536' is not a whole number"),
        ("--views x --out y --viewer --viewer-host 203.0.113.1", "cannot listen on 203.0.113.1:8080"),
        ("--views x --out y --representation mesh --start a.ply", "a mesh cannot --start"),
        ("--views x --out y --representation mesh --formats spz", "mesh writes mesh.glb; leave them out"),
        ("--views x --out y --representation mesh --mesh", "writes a mesh by itself"),
        ("--views x --out y --representation mesh --axes world", "--axes is of asset.ply"),
        ("--views x --out y --representation mesh --engine gsplat", "renders Gaussians, and no mesh"),
        ("--video x --out y", "--video needs --elevation-deg"),
        ("--views x --out y --held-out 1", "--held-out is 1; give a whole number from 2, or views"),
        ("--video x --out y --elevation-deg 90", "--elevation-deg: '90' is not a number between"),
    ],
)
def test_refuses_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        fit_views.main(options.split())


def test_a_viewer_needs_its_package(monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=importlib.util.find_spec: None if name == "viser" else find(name),
    )
    with pytest.raises(UserError, match=r"--viewer needs viser; pip install .im3d\[viewer\]"):
        fit_views.main(["--views", "x", "--out", "y", "--viewer"])


def test_refuses_cameras_that_look_the_same_way(tmp_path):
    same = orbit(3, 0.3, SIZE, azimuths_rad=np.zeros(3))
    write_views(tmp_path / "views", same, squares(same))
    with pytest.raises(UserError, match="same way"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")])


def test_refuses_an_out_that_is_a_file(tmp_path):
    write_views(tmp_path / "views", CAMERAS, squares(CAMERAS))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot be made"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "mine"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        fit_views.main(["--help"])
    assert ended.value.code == 0
    assert "im3d fit --views captured --held-out 8 --out fitted" in capsys.readouterr().out
