"""`im3d render` writes what the Gaussians look like from the cameras in its transforms.json."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_torch import outputs
from recon_torch.commands import render
from recon_torch.errors import UserError
from recon_torch.formats.ply import save_ply
from recon_torch.outputs import Kind
from recon_torch.raster.gaussians import SH_C0, Gaussians
from recon_torch.views import cameras
from recon_torch.views.images import read_image
from recon_torch.views.transforms import read_transforms


@pytest.fixture
def dot_file(tmp_path):
    """A .ply of one small opaque red Gaussian at (0, 0.2, 0.1)."""
    dot = Gaussians(
        means=torch.tensor([[0.0, 0.2, 0.1]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        log_scales=torch.full((1, 3), math.log(0.02)),
        opacity_logits=torch.tensor([10.0]),
        sh0=(torch.tensor([[0.9, 0.1, 0.2]]) - 0.5) / SH_C0,
    )
    save_ply(dot, tmp_path / "dot.ply")
    return tmp_path / "dot.ply"


def test_files_show_the_asset(dot_file, tmp_path):
    out = tmp_path / "views"
    flags = "--num-views 12 --elevation-deg 30 --size 48 --background 0"
    render.main(["--asset", str(dot_file), "--out", str(out), *flags.split()])
    orbit, names = read_transforms(out / "transforms.json")
    assert len(names) == 12 and (out / "turntable.mp4").stat().st_size > 0
    np.testing.assert_allclose(orbit.w2c, cameras.orbit(12, math.radians(30)).w2c, atol=1e-6)
    for w2c, intrinsics, name in zip(orbit.w2c, orbit.intrinsics_px, names, strict=True):
        image = read_image(out / name)
        seen = intrinsics @ (w2c @ [0, 0.2, 0.1, 1])[:3]
        weight = image[..., 0] / image[..., 0].sum()
        centre = [
            (weight.sum(0) * (np.arange(48) + 0.5)).sum(),
            (weight.sum(1) * (np.arange(48) + 0.5)).sum(),
        ]
        np.testing.assert_allclose(centre, seen[:2] / seen[2], atol=0.1)
        np.testing.assert_allclose(image.sum((0, 1)) / image[..., 0].sum(), [1, 1 / 9, 2 / 9], atol=0.01)


def test_background_is_white_unless_given(dot_file, tmp_path):
    render.main(["--asset", str(dot_file), "--out", str(tmp_path / "o"), "--num-views", "1", "--size", "32"])
    np.testing.assert_array_equal(read_image(tmp_path / "o" / "000.png")[0, 0], [1, 1, 1])


def test_only_what_was_rendered_before_is_replaced(dot_file, tmp_path):
    """Files beside the asset stay, and those that an earlier call wrote go."""
    flags = ["--asset", str(dot_file), "--out", str(tmp_path), "--size", "16"]
    for count in (3, 2):
        render.main([*flags, "--num-views", str(count)])
        assert len(read_transforms(tmp_path / "transforms.json")[1]) == count
        assert len(list(tmp_path.glob("0*.png"))) == count and dot_file.is_file()
    outputs.put(tmp_path / "fit", Kind("fit", ("transforms[.]json",)), "transforms.json", Path.touch)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/007.png").write_text("mine")
    for name, message in {"fit": "transforms.json is of `im3d fit`", "mine": "007.png is not of"}.items():
        with pytest.raises(UserError, match=message):
            render.main(["--asset", str(dot_file), "--out", str(tmp_path / name)])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-views 0", "--num-views: '0' is not a whole number from 1"),
        ("--elevation-deg 90", "--elevation-deg: '90' is not a number between -90 and 90"),
        ("--size 9999", "--size: '9999' is not a whole number from 8 to 4096"),
        ("--radius inf", "--radius: 'inf' is not a number from 0.001"),
        ("--asset none.ply", "none.ply"),
        ("--asset /dev/zero", "/dev/zero is a device; give the path of a file"),
    ],
)
def test_bad_input_leaves_nothing(dot_file, tmp_path, flags, message):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        render.main(["--asset", str(dot_file), "--out", str(out), *flags.split()])
    assert not out.exists()
