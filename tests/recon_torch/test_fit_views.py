"""The fit command: its files, its report, worlds that are not this project's, its refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from recon_torch import fit_views
from recon_torch.cameras import Cameras, orbit, read_transforms, write_transforms
from recon_torch.errors import UserError
from recon_torch.export import read_image, write_image
from recon_torch.gaussians import Gaussians, load_ply
from recon_torch.rasterize import rasterize

SIZE = 32
MOVED_BY, ENLARGED_BY = np.array([3.0, -1.0, 2.0]), 2.5
pytestmark = pytest.mark.filterwarnings("ignore:no weights for LPIPS")

OBJECT = Gaussians(
    means=torch.tensor([[0.0, 0.0, -0.2], [0.2, 0.0, 0.1], [-0.15, 0.2, 0.15]]),
    quats=torch.tensor([1.0, 0, 0, 0]).repeat(3, 1),
    log_scales=torch.tensor([[0.15, 0.15, 0.05], [0.06, 0.1, 0.1], [0.1, 0.1, 0.1]]).log(),
    opacity_logits=torch.full((3,), 5.0),
    sh0=torch.tensor([[1.0, -1.0, -1.5], [-1.0, 0.5, -1.0], [-1.0, -0.5, 1.5]]),
)


def render(gaussians: Gaussians, cameras: Cameras, background: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    image = rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors,
        torch.from_numpy(cameras.w2c),
        torch.from_numpy(cameras.intrinsics_px),
        cameras.width,
        cameras.height,
        background=torch.full((3,), background),
    )
    return image.rgb.clamp(0, 1).numpy(), image.alpha.numpy()


def moved(cameras: Cameras) -> Cameras:
    """The same pictures of an object that is elsewhere and larger."""
    w2c = cameras.w2c.copy()
    w2c[:, :3, 3] = ENLARGED_BY * w2c[:, :3, 3] - w2c[:, :3, :3] @ MOVED_BY
    return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def write_views(directory, cameras: Cameras, where=lambda cameras: cameras) -> None:
    rgb, alpha = render(OBJECT, cameras, background=0.0)
    images = np.concatenate([np.where(alpha > 0, rgb / np.maximum(alpha, 1e-6), 0), alpha], -1)
    names = [f"{index}.png" for index in range(len(cameras))]
    for name, image in zip(names, images, strict=True):
        write_image(directory / name, image)
    write_transforms(directory / "transforms.json", where(cameras), names)


CAMERAS = orbit(8, 0.3, SIZE)
HELD_OUT = orbit(4, 0.3, SIZE, azimuths_rad=np.arange(4) * np.pi / 2 + 0.2)
OPTIONS = ["--lpips-net", "alex", "--engine", "cpu"]


@pytest.fixture(autouse=True)
def short_turntable(monkeypatch):
    monkeypatch.setattr(fit_views, "TURNTABLE_FRAMES", 6)


def test_writes_the_asset_and_a_true_report(tmp_path, capsys):
    write_views(tmp_path / "train", CAMERAS, moved)
    write_views(tmp_path / "test", HELD_OUT, moved)
    out = tmp_path / "deep" / "out"
    options = ["--held-out", str(tmp_path / "test"), "--steps", "200", "--seed", "7", *OPTIONS]
    fit_views.main(["--views", str(tmp_path / "train"), "--out", str(out), *options])

    report = json.loads((out / "report.json").read_text())
    assert (
        report["seed"] == 7
        and report["num_steps"] == 200
        and set(report["seconds"]) == {"load", "fit", "export"}
    )
    assert set(report["versions"]) >= {"torch", "gsplat", "lpips", "python"} and report["device"]
    assert any("random" in note for note in report["notes"])
    asset = load_ply(out / "asset.ply")
    assert len(asset.means) == report["num_gaussians"]
    for name, cameras in (("training", CAMERAS), ("held_out", HELD_OUT)):
        # Rendered anew from the file, in the views' own world, against the truth.
        mine, truth = render(asset, moved(cameras))[0], render(OBJECT, cameras)[0]
        psnr = -10 * np.log10(((mine - truth) ** 2).mean((1, 2, 3))).mean()
        assert report[name]["psnr"] == pytest.approx(psnr, abs=0.3) and psnr > 26
        assert {"ssim", "lpips", "psnr_foreground", "silhouette_iou"} < set(report[name])

    cameras, images = read_transforms(out / "transforms.json")
    np.testing.assert_allclose(cameras.w2c, moved(CAMERAS).w2c, atol=1e-5)
    expected = render(asset, moved(CAMERAS))[0]
    np.testing.assert_allclose(read_image(out / images[3]), expected[3], atol=3 / 255)
    assert Image.open(out / "views.png").width > 8 * 96
    assert (out / "turntable.mp4").stat().st_size > 500
    assert "held_out: psnr" in capsys.readouterr().out


def test_every_nth_view_is_held_out(tmp_path):
    write_views(tmp_path, CAMERAS)
    flags = fit_views._parser().parse_args(["--views", str(tmp_path), "--out", "x", "--held-out", "3"])
    train, held_out = fit_views._load(flags)
    np.testing.assert_allclose(held_out.cameras.w2c, CAMERAS.w2c[[2, 5]], atol=1e-6)
    np.testing.assert_allclose(train.cameras.w2c, CAMERAS.w2c[[0, 1, 3, 4, 6, 7]], atol=1e-6)


def test_own_orbits_are_the_unit_frame():
    center, scale = fit_views.unit_frame(orbit(16, 0.5, SIZE))
    np.testing.assert_allclose(center, 0, atol=1e-6)
    assert scale == pytest.approx(1, abs=1e-6)


def test_unit_frame_undoes_a_move():
    center, scale = fit_views.unit_frame(moved(CAMERAS))
    np.testing.assert_allclose(center, MOVED_BY, atol=1e-5)
    assert scale == pytest.approx(1 / ENLARGED_BY, rel=1e-5)
    back = fit_views.to_unit(moved(CAMERAS), center, scale)
    np.testing.assert_allclose(back.w2c, CAMERAS.w2c, atol=1e-5)
    away = fit_views.from_unit(OBJECT, center, scale)
    np.testing.assert_allclose(render(away, moved(CAMERAS))[0], render(OBJECT, CAMERAS)[0], atol=1e-4)


def test_turntable_keeps_height_distance_and_field_of_view():
    turntable = fit_views.turntable(orbit(8, 0.3, SIZE, radius=1.7, fov_deg=50.0))
    expected = orbit(6, 0.3, SIZE, radius=1.7, fov_deg=50.0)
    np.testing.assert_allclose(turntable.w2c, expected.w2c, atol=1e-5)
    np.testing.assert_allclose(turntable.intrinsics_px, expected.intrinsics_px, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "9"], "from 2 to the number of views"),
        (["--held-out", "nowhere"], "nowhere/transforms.json does not exist"),
        (["--steps", "0"], "--steps 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--size", "8"], "too small"),
        (["--lpips-net", "resnet"], "unknown LPIPS net"),
        (["--lpips-weights", "none.pth"], "none.pth do not exist"),
        (["--isnet-weights", "none.onnx"], "none.onnx do not exist"),
        (["--engine", "vulkan"], "vulkan"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, options, message):
    write_views(tmp_path / "views", CAMERAS)
    if "--isnet-weights" in options:
        for path in (tmp_path / "views").glob("*.png"):
            Image.open(path).convert("RGB").save(path)
    with pytest.raises(UserError, match=message):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), *options])
    assert not list((tmp_path / "out").glob("*"))


def test_refuses_cameras_that_look_the_same_way(tmp_path):
    same = orbit(3, 0.3, SIZE, azimuths_rad=np.zeros(3))
    write_views(tmp_path / "views", same)
    with pytest.raises(UserError, match="same way"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")])


def test_refuses_an_out_that_is_a_file(tmp_path):
    write_views(tmp_path / "views", CAMERAS)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot be made"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "mine"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        fit_views.main(["--help"])
    assert ended.value.code == 0
    assert "im3d fit --views captured --held-out 8 --out fitted" in capsys.readouterr().out
