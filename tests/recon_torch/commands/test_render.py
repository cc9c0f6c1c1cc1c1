"""`im3d render` writes what the Gaussians look like from the cameras in its transforms.json."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_torch import outputs
from recon_torch.commands import render
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.formats.framing import moved_into
from recon_torch.formats.ply import save_ply
from recon_torch.outputs import Kind
from recon_torch.raster.gaussians import SH_C0, Gaussians
from recon_torch.raster.render import render_images
from recon_torch.settings import UP_AXES
from recon_torch.views import axes, cameras
from recon_torch.views.images import read_image
from recon_torch.views.transforms import read_cameras, read_transforms, write_transforms
from recon_torch.views.world import World


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


def test_an_asset_that_is_a_mesh_is_refused_by_name(tmp_path):
    (tmp_path / "mesh.json").write_text("{}")
    for asset in (tmp_path, tmp_path / "mesh.glb"):
        with pytest.raises(UserError, match="is a mesh, and this renders Gaussians; `im3d view"):
            render.main(["--asset", str(asset), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-views 0", "--num-views: '0' is not a whole number from 1"),
        ("--elevation-deg 90", "--elevation-deg: '90' is not a number between -90 and 90"),
        ("--size 9999", "--size: '9999' is not a whole number from 8 to 4096"),
        ("--radius inf", "--radius: 'inf' is not a number from 0.001"),
        ("--asset none.ply", "none.ply"),
        ("--asset /dev/zero", "/dev/zero is a device; give the path of a file"),
        ("--center 1 2 inf", "--center: 'inf' is not"),
        ("--cameras none", "none"),
        ("--cameras none --size 64", "--size is of an orbit"),
        ("--center 0 0 5 --radius 0.1", "no view shows .*dot.ply"),
    ],
)
def test_bad_input_leaves_nothing(dot_file, tmp_path, flags, message):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        render.main(["--asset", str(dot_file), "--out", str(out), *flags.split()])
    assert not out.exists()


ELSEWHERE = World(np.array([-40.0, 7.0, 90.0]), 0.02)  # fifty times as large as the unit ball


@pytest.fixture
def ball(tmp_path):
    """Gaussians in the ball of radius 0.45, those of its hull among them, and a faint one far away."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((200, 3), generator=generator)
    means *= 0.44 / means.norm(dim=-1, keepdim=True)
    means[-1] = torch.tensor([30.0, 0.0, 0.0])
    opacity_logits = torch.full((200,), 3.0)
    opacity_logits[-1] = -5
    return Gaussians(
        means=means,
        quats=torch.tensor([[1.0, 0, 0, 0]]).repeat(200, 1),
        log_scales=torch.full((200, 3), math.log(0.01)),
        opacity_logits=opacity_logits,
        sh0=torch.rand((200, 3), generator=generator) * 2 - 2,
    )


def elsewhere(gaussians):
    """What lies in the unit ball, in the world in which `ELSEWHERE` lies."""
    back = World(-ELSEWHERE.scale * ELSEWHERE.center, 1 / ELSEWHERE.scale)
    return moved_into(gaussians, back)


def rendered(tmp_path, gaussians, flags="", name="asset.ply"):
    save_ply(gaussians, tmp_path / name)
    small = "" if "--cameras" in flags else "--num-views 3 --size 48"
    argv = ["--asset", str(tmp_path / name), "--out", str(tmp_path / "out"), *f"{small} {flags}".split()]
    render.main(argv)
    return np.stack([read_image(path) for path in sorted((tmp_path / "out").glob("0*.png"))])


def test_an_asset_is_framed_in_its_own_world(ball, tmp_path):
    """As the same asset at unit size is; the cameras that are written see it where the pictures have it."""
    pictures = rendered(tmp_path, elsewhere(ball), name="scene.ply")
    rows, columns = np.nonzero((pictures < 0.9).any((0, -1)))
    assert 4 <= min(rows.min(), columns.min()) <= 12 and 36 <= max(rows.max(), columns.max()) <= 44
    [written], _ = read_cameras(tmp_path / "out")
    center, distance = (
        np.array(ELSEWHERE.center),
        np.linalg.norm(written.positions - ELSEWHERE.center, axis=-1),
    )
    np.testing.assert_allclose(written.project(center[None]).pixels, 24, atol=1)
    np.testing.assert_allclose(distance, 2 / ELSEWHERE.scale, rtol=0.15)


@pytest.mark.parametrize("up", ["y", "-x"])
def test_a_lone_file_says_which_axis_is_up(ball, tmp_path, up):
    """Its header does: it is upright in viewers, in a world whose up is another axis than z."""
    save_ply(ball, tmp_path / "lone.ply", axes.chosen("upright", np.array(UP_AXES[up])))
    render.main(["--asset", str(tmp_path / "lone.ply"), "--out", str(tmp_path / "lone"), "--size", "48"])
    found, _ = read_transforms(tmp_path / "lone/transforms.json")
    heights = found.positions @ np.array(UP_AXES[up])
    np.testing.assert_allclose(heights, 2 * np.sin(np.deg2rad(render.ELEVATION_DEG)), atol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_report_of_a_fit_says_where_its_asset_lies(ball, tmp_path, normalized):
    expected = rendered(tmp_path, ball, "--center 0 0 0 --radius 2 --up y", "unit.ply")
    place = {"center": list(ELSEWHERE.center), "scale": ELSEWHERE.scale, "up": [0.0, 1.0, 0.0]}
    write_json(
        tmp_path / "report.json",
        {"num_gaussians": 200, "world": place | {"asset_is_normalized": normalized}},
    )
    pictures = rendered(tmp_path, ball if normalized else elsewhere(ball))
    np.testing.assert_allclose(pictures, expected, atol=2 / 255)


@pytest.mark.parametrize(
    "report", ["{", "[]", '{"world": 3}', '{"num_gaussians": 200, "world": {"center": [1e400, 0, 0]}}']
)
def test_a_report_of_something_else_is_left_alone(ball, tmp_path, report):
    expected = rendered(tmp_path, elsewhere(ball), name="scene.ply")
    (tmp_path / "report.json").write_text(report)
    np.testing.assert_array_equal(rendered(tmp_path, elsewhere(ball)), expected)


def test_given_cameras_are_taken_as_they_are(ball, tmp_path):
    """The same pictures as at unit size, of the same cameras in the other world; images are not needed."""
    expected = rendered(tmp_path, ball, "--radius 2 --center 0 0 0 --elevation-deg 30", "unit.ply")
    unit = cameras.orbit(3, math.radians(30), 48)
    write_transforms(tmp_path / "given/transforms.json", ELSEWHERE.cameras_back(unit), ["a", "b", "c"])
    given = f"--cameras {tmp_path / 'given'}"
    np.testing.assert_allclose(rendered(tmp_path, elsewhere(ball), given), expected, atol=2 / 255)
    np.testing.assert_allclose(
        read_cameras(tmp_path / "out")[0][0].w2c, ELSEWHERE.cameras_back(unit).w2c, atol=1e-4
    )


def without_axes(path):
    """As other programs save a .ply: without the comments in its header."""
    content = path.read_bytes()
    line = b"comment im3d axes -y -z x\n"
    assert line in content
    path.write_bytes(content.replace(line, b""))


def test_an_asset_that_another_program_wrote_anew_keeps_its_axes(ball, tmp_path, capsys):
    """Beside it transforms.json says them; elsewhere nothing does, and the user is told."""
    folder, given = tmp_path / "asset", tmp_path / "asset/transforms.json"
    write_transforms(given, cameras.orbit(2, 0.3, 48), ["a", "b"], **axes.entry(axes.UPRIGHT))
    save_ply(ball, folder / "asset.ply")

    def shown(asset, *flags):
        argv = ["--asset", asset, "--out", tmp_path / "out", "--cameras", folder, *flags]
        render.main([str(each) for each in argv])
        pictures = [read_image(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
        return np.stack(pictures), capsys.readouterr().out

    expected, said = shown(folder)  # a directory is taken as well
    assert "note" not in said
    without_axes(folder / "asset.ply")
    pictures, said = shown(folder / "asset.ply")
    np.testing.assert_array_equal(pictures, expected)
    assert "asset.ply: another program wrote it" in said
    (folder / "asset.ply").rename(tmp_path / "edited.ply")
    lying, said = shown(tmp_path / "edited.ply")
    assert "edited.ply: its header does not say" in said and np.abs(lying - expected).max() > 0.1
    upright, said = shown(tmp_path / "edited.ply", "--axes", "upright")
    np.testing.assert_array_equal(upright, expected)
    assert "note" not in said


def test_cameras_of_several_sizes_and_lenses_are_rendered(ball, tmp_path, capsys):
    """A portrait between two landscapes, with intrinsics of its own; a lens is left out and named."""
    wide, tall = orbit_of(64, 48), orbit_of(40, 56)
    rigs = [wide[:1], tall[1:2], wide[2:3]]
    write_transforms(tmp_path / "given/transforms.json", rigs, ["a", "b", "c"])
    content = json.loads((tmp_path / "given/transforms.json").read_text())
    assert {"w", "h"} <= content["frames"][1].keys() and "w" not in content
    content["frames"][2] |= {"camera_model": "OPENCV", "k1": 0.05}
    content["skew"] = 0.5
    write_json(tmp_path / "given/transforms.json", content)
    save_ply(ball, tmp_path / "ball.ply")
    argv = ["--asset", str(tmp_path / "ball.ply"), "--out", str(tmp_path / "out")]
    render.main([*argv, "--cameras", str(tmp_path / "given")])
    views = [read_image(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [view.shape for view in views] == [(48, 64, 3), (56, 40, 3), (48, 64, 3)]
    alone = render_images(ball, tall[1:2])[0]
    np.testing.assert_allclose(views[1], alone, atol=2 / 255)
    said = capsys.readouterr().out
    assert "its lens distortion is left out: it is the pinhole that a fit sees: frame 2\n" in said
    assert "it has entries that are not read: skew: all 3 views\n" in said
    assert "no video, as these have different sizes" in said
    assert not (tmp_path / "out/turntable.mp4").exists()
    written, _ = read_cameras(tmp_path / "out")
    assert [(rig.width, rig.height) for rig in written] == [(64, 48), (40, 56), (64, 48)]
    np.testing.assert_allclose(written[1].w2c, tall[1:2].w2c, atol=1e-5)
    np.testing.assert_allclose(written[1].intrinsics_px, tall[1:2].intrinsics_px, rtol=1e-6)


def orbit_of(width: int, height: int) -> cameras.Cameras:
    circle = cameras.orbit(3, 0.2, height)
    intrinsics_px = circle.intrinsics_px.copy()
    intrinsics_px[:, 0, 2] = width / 2 + 1.5
    return cameras.Cameras(circle.w2c, intrinsics_px, width, height)


def test_a_narrow_view_shows_the_asset_as_large(dot_file, tmp_path):
    sizes = []
    for fov_deg in (10, 33.8, 90):
        out = tmp_path / str(fov_deg)
        render.main(["--asset", str(dot_file), "--out", str(out), "--fov-deg", str(fov_deg), "--size", "96"])
        ball, distance = 0.45, np.linalg.norm(read_cameras(out)[0][0].positions[0])
        sizes.append(math.sin(math.radians(fov_deg) / 2) * distance / ball)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)


def test_views_that_show_nothing_are_named(dot_file, tmp_path, capsys):
    away = cameras.orbit(2, 0.0, 32)
    w2c = away.w2c.copy()
    w2c[1, 0, 3] = 50
    given = cameras.Cameras(w2c, away.intrinsics_px, 32, 32)
    write_transforms(tmp_path / "given/transforms.json", given, ["a", "b"])
    argv = ["--asset", str(dot_file), "--out", str(tmp_path / "o"), "--cameras", str(tmp_path / "given")]
    render.main(argv)
    assert "1 views show nothing but background: 001.png" in capsys.readouterr().out
