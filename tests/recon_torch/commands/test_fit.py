"""The fit command: its files, its report, worlds that are not this project's, its refusals."""

import functools
import json
import re

import numpy as np
import pytest
import torch
import trimesh

from recon_torch.commands import fit as fit_views
from recon_torch.commands.fit import origins, run
from recon_torch.errors import UserError
from recon_torch.fit import asset
from recon_torch.fit.optimization import Fit
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.page.live import LivePage
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render as render_gaussians
from recon_torch.scene import mesh as mesh_scene
from recon_torch.settings import MeshSettings
from recon_torch.views import world
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import read_image, write_image
from recon_torch.views.transforms import read_transforms, write_transforms
from recon_torch.views.video import write_video

pytestmark = pytest.mark.slow

SIZE = 32
MOVED_BY, ENLARGED_BY = np.array([3.0, -1.0, 2.0]), 2.5

OBJECT = Gaussians(
    means=torch.tensor([[0.0, 0.0, -0.2], [0.2, 0.0, 0.1], [-0.15, 0.2, 0.15]]),
    quats=torch.tensor([1.0, 0, 0, 0]).repeat(3, 1),
    log_scales=torch.tensor([[0.15, 0.15, 0.05], [0.06, 0.1, 0.1], [0.1, 0.1, 0.1]]).log(),
    opacity_logits=torch.full((3,), 5.0),
    sh0=torch.tensor([[1.0, -1.0, -1.5], [-1.0, 0.5, -1.0], [-1.0, -0.5, 1.5]]),
)


def render(gaussians: Gaussians, cameras: Cameras, background: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    image = render_gaussians(gaussians, cameras, background=torch.full((3,), background))
    return image.rgb.clamp(0, 1).numpy(), image.alpha.numpy()


def moved(cameras: Cameras) -> Cameras:
    """The same pictures of an object that is elsewhere and larger."""
    w2c = cameras.w2c.astype(np.float64)
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
    monkeypatch.setattr(asset, "TURNTABLE_FRAMES", 6)
    monkeypatch.setattr(asset, "MeshSettings", functools.partial(MeshSettings, resolution=48, texture=64))


def test_writes_the_asset_and_a_true_report(tmp_path, capsys):
    write_views(tmp_path / "train", CAMERAS, moved)
    write_views(tmp_path / "test", HELD_OUT, moved)
    out = tmp_path / "deep" / "out"
    options = ["--held-out", str(tmp_path / "test"), "--steps", "200", "--seed", "7", "--mesh", *OPTIONS]
    fit_views.main(["--views", str(tmp_path / "train"), "--out", str(out), *options])

    report = json.loads((out / "report.json").read_text())
    assert (
        report["seed"] == 7
        and report["num_steps"] == 200
        and set(report["seconds"]) == {"load", "fit", "export"}
    )
    assert set(report["versions"]) >= {"torch", "gsplat", "lpips", "python"} and report["device"]
    assert any("random" in note for note in report["notes"])
    asset = load_ply(out / "asset.ply").gaussians
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
    assert read_image(out / "views.png").shape[1] > 8 * 96
    assert (out / "turntable.mp4").stat().st_size > 500
    said = capsys.readouterr().out
    assert "held_out: psnr" in said and f"quality: {report['quality']['verdict']}" in said
    assert report["quality"]["numbers"]["worst_view_shape"] > 0.9
    _check_mesh(out, report)


def _check_mesh(out, report):
    """It lies where the object is in the views' own world, in the axes of glTF."""
    assert report["mesh"] == json.loads((out / "mesh.json").read_text())
    mesh = trimesh.load(out / "mesh.glb", force="mesh")
    places = OBJECT.means.numpy() * ENLARGED_BY + MOVED_BY
    assert (mesh.bounds[0] < places[:, [1, 2, 0]]).all() and (places[:, [1, 2, 0]] < mesh.bounds[1]).all()
    assert mesh.extents.max() < 1.2 * ENLARGED_BY and len(mesh.faces) == report["mesh"]["triangles"]


def test_a_view_that_contradicts_the_others_is_named_also_by_a_radiance_field(tmp_path):
    """The turntable is around -Y, which is not up in the pictures."""
    write_views(tmp_path / "views", CAMERAS)
    wrong = read_image(tmp_path / "views" / "2.png")
    write_image(tmp_path / "views" / "2.png", np.flipud(wrong))
    out = tmp_path / "out"
    options = ["--representation", "nerf", "--steps", "60", "--up=-y", *OPTIONS]
    fit_views.main(["--views", str(tmp_path / "views"), "--out", str(out), *options])
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["verdict"] != "good" and "views 2," in report["quality"]["reasons"][0]
    assert report["num_gaussians"] == 0 and any("asset.safetensors" in note for note in report["notes"])
    assert (out / "asset.safetensors").is_file() and not (out / "asset.ply").exists()


def test_a_mesh_is_fitted_in_the_world_of_the_views(tmp_path, monkeypatch, capsys):
    few = functools.partial(run.FitSettings, mesh_cells=14, mesh_colors=24, w_lpips=0.0)
    monkeypatch.setattr(run, "FitSettings", few)
    monkeypatch.setattr(mesh_scene, "MeshSettings", functools.partial(MeshSettings, texture=64))
    write_views(tmp_path / "views", CAMERAS, moved)
    out = tmp_path / "out"
    fit_views.main(
        [
            "--views",
            str(tmp_path / "views"),
            "--out",
            str(out),
            "--representation",
            "mesh",
            "--steps",
            "20",
            *OPTIONS,
        ]
    )
    report = json.loads((out / "report.json").read_text())
    assert not (out / "asset.ply").exists() and "mesh: mesh.glb" in capsys.readouterr().out
    assert report["mesh"]["watertight"] and report["training"]["silhouette_iou"] > 0.8
    _check_mesh(out, report)


def test_a_fit_that_is_watched_is_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("viser")
    shown, show = [], LivePage.show

    def watched(self, gaussians, text):
        show(self, gaussians, text)
        shown.append((text, len(gaussians.means)))

    monkeypatch.setattr(LivePage, "show", watched)
    write_views(tmp_path / "views", CAMERAS)
    files = []
    for extra in ([], ["--viewer", "--viewer-port", "0"]):
        out = tmp_path / f"out{len(extra)}"
        options = ["--views", str(tmp_path / "views"), "--out", str(out), "--steps", "60", *OPTIONS, *extra]
        fit_views.main(options)
        files.append((out / "asset.ply").read_bytes())
    assert files[0] == files[1]
    assert [text.partition(",")[0] for text, _ in shown] == [f"step {step} of 60" for step in (1, 25, 50, 60)]
    assert shown[-1][0].endswith(f", {shown[-1][1]} Gaussians")
    assert "http://127.0.0.1:" in capsys.readouterr().out
    capsys.readouterr()
    fit_views.main([*options[:-3], "--resume"])
    assert "1 of 1 are there already" in capsys.readouterr().out


def test_every_nth_view_is_held_out(tmp_path):
    write_views(tmp_path, CAMERAS)
    flags = fit_views.parse(["--views", str(tmp_path), "--out", "x", "--held-out", "3"])
    train, held_out, _ = run.read_views(flags, flags.views[0])
    np.testing.assert_allclose(held_out.cameras.w2c, CAMERAS.w2c[[2, 5]], atol=1e-6)
    np.testing.assert_allclose(train.cameras.w2c, CAMERAS.w2c[[0, 1, 3, 4, 6, 7]], atol=1e-6)


def test_an_empty_name_of_views_to_test_with_is_refused(tmp_path, user_error):
    with user_error("--held-out is empty"):
        fit_views.parse(["--views", str(tmp_path), "--out", "x", "--held-out", ""])


def split_of(directory):
    """Writes the views of `directory` as the original NeRF's: frames 2 and 5 to test with."""
    content = json.loads((directory / "transforms.json").read_text())
    tested = [content["frames"][index] for index in (2, 5)]
    trained = [frame for frame in content["frames"] if frame not in tested]
    for name, frames in (("train", trained), ("test", tested)):
        (directory / f"transforms_{name}.json").write_text(json.dumps(content | {"frames": frames}))
    (directory / "transforms.json").unlink()


def test_views_that_are_split_are_held_out_unless_flags_say_otherwise(tmp_path, user_error):
    write_views(tmp_path, CAMERAS)
    split_of(tmp_path)

    def read(views, *options):
        flags = fit_views.parse(["--views", str(views), "--out", "x", *options])
        train, held_out, notes = run.read_views(flags, flags.views[0])
        said.extend(notes)
        return train.names, held_out and held_out.names, set(origins.files(flags, flags.views[0]))

    said = []
    picture = read_image(tmp_path / "5.png")
    write_image(tmp_path / "5.png", np.roll(picture, SIZE // 2, 1))
    train, held_out, files = read(tmp_path)
    assert said == ["held-out views: the mask touches the border: 5.png"]
    assert held_out == ["2.png", "5.png"] and len(train) == 6
    assert files >= set(tmp_path.iterdir())
    assert read(tmp_path / "transforms_train.json")[:2] == (train, None)
    assert read(tmp_path, "--held-out", "3")[:2] == (["0.png", "1.png", "4.png", "6.png"], ["3.png", "7.png"])
    test_file = str(tmp_path / "transforms_test.json")
    assert read(tmp_path / "transforms_train.json", "--held-out", test_file)[:2] == (train, held_out)
    with user_error("is split itself; give the path of one of its files"):
        read(tmp_path, "--held-out", str(tmp_path))


def test_each_file_of_cameras_has_a_place_of_its_own(tmp_path):
    for name in ("a/transforms.json", "b/transforms_train.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    sources = [tmp_path / "a" / "transforms.json", tmp_path / "b" / "transforms_train.json", tmp_path / "c"]
    places = run.directories(sources, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in places.values()] == [
        "a",
        "b/transforms_train",
        "c",
    ]


def test_normalized_assets_are_at_the_origin_and_can_be_mapped_back(tmp_path):
    """The object is large, far from the origin, and y is up."""
    y_up = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # takes +Z to +Y

    def away(cameras):
        w2c = moved(cameras).w2c.astype(np.float64)
        w2c[:, :3, :3] = w2c[:, :3, :3] @ y_up.T
        return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)

    write_views(tmp_path / "views", CAMERAS, away)
    paths = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")]
    fit_views.main([*paths, "--steps", "100", "--normalize", *OPTIONS])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    place = report["world"]
    assert place["asset_is_normalized"] and place["up"] == [0, 1, 0]
    asset, _, upright = load_ply(tmp_path / "out" / "asset.ply")
    assert upright == ("-x", "-y", "z")  # half a turn about Z, which viewers turn back
    assert json.loads((tmp_path / "out" / "transforms.json").read_text())["asset_axes"] == "-x -y z"
    assert asset.means.norm(dim=-1).quantile(0.9) < 0.5
    own = render(asset, read_transforms(tmp_path / "out" / "transforms.json")[0])[0]
    np.testing.assert_allclose(own[2], read_image(tmp_path / "out" / "renders" / "002.png"), atol=3 / 255)

    means = asset.means / place["scale"] + torch.tensor(place["center"])
    back = asset._replace(means=means.float(), log_scales=asset.log_scales - np.log(place["scale"]))
    apart = np.abs(render(back, away(CAMERAS))[0] - own)
    assert apart.mean() < 1e-5 and apart.max() < 1 / 255  # fainter splats are cut off, by rounding
    assert (10 * np.log10(1 / ((own - render(OBJECT, CAMERAS)[0]) ** 2).mean())) > 20


def test_a_fit_starts_from_a_file(tmp_path):
    """Ten steps from the truth, in the views' own world, agree with them; from a ball they cannot."""
    write_views(tmp_path / "views", CAMERAS, moved)
    truth = OBJECT._replace(
        means=OBJECT.means * ENLARGED_BY + torch.tensor(MOVED_BY).float(),
        log_scales=OBJECT.log_scales + float(np.log(ENLARGED_BY)),
    )
    save_ply(truth, tmp_path / "truth.ply")
    paths = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), "--steps", "10"]
    fit_views.main([*paths, "--start", str(tmp_path / "truth.ply"), *OPTIONS])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["psnr"] > 30 and report["num_gaussians"] < 10
    flags = fit_views.parse([*paths, "--start", str(tmp_path / "truth.ply"), *OPTIONS])
    assert run.is_made(flags, flags.views[0], tmp_path / "out")
    save_ply(OBJECT._replace(means=OBJECT.means + 900), tmp_path / "truth.ply")
    assert not run.is_made(flags, flags.views[0], tmp_path / "out")
    with pytest.raises(UserError, match="less than 50% is where the cameras look"):
        fit_views.main([*paths, "--start", str(tmp_path / "truth.ply"), *OPTIONS])


def test_an_object_away_from_where_the_cameras_look_is_noted(tmp_path, ball_masks):
    cameras = orbit(8, 0.3, SIZE, fov_deg=70.0)
    masks = ball_masks(cameras, np.array([0.8, 0.0, 0.0]), 0.3)
    for index, mask in enumerate(masks):
        write_image(tmp_path / f"{index}.png", np.repeat(1 - mask, 3, -1))
    write_transforms(tmp_path / "transforms.json", cameras, [f"{index}.png" for index in range(8)])
    flags = fit_views.parse(["--views", str(tmp_path), "--out", "x"])
    train, _, notes = run.read_views(flags, flags.views[0])
    assert notes == []
    _, (note,) = world.of_views(train.cameras, train.masks, normalize=False)
    # In a world whose views are 2.3 times as wide as this project's own.
    factor = np.tan(np.radians(33.8 / 2)) / np.tan(np.radians(70.0 / 2))
    offset = float(note.split(" from where")[0].split()[-1])
    assert offset == pytest.approx(0.8 * factor, abs=0.04) and "try --normalize" in note
    _, (note,) = world.of_views(train.cameras, train.masks[::-1], normalize=False)
    assert "no point is inside all masks" in note


def test_a_video_of_a_turn_is_fitted_like_views(tmp_path):
    """Eight of 48 frames are fitted; renders between them agree with the remaining frames."""
    around = orbit(48, 0.3, 64)
    write_video(tmp_path / "turn.mp4", render(OBJECT, around)[0])
    options = ["--video", str(tmp_path / "turn.mp4"), "--num-views", "8", "--elevation-deg", "17.19"]
    fit_views.main([*options, "--out", str(tmp_path / "out"), "--steps", "150", *OPTIONS])
    asset = load_ply(tmp_path / "out" / "asset.ply").gaussians
    truth = render(OBJECT, around[3::6])[0]
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert notes == ["LPIPS runs on alex with random weights: a score, no term of the loss"]
    mine = render(asset, around[3::6])[0]  # between the views
    assert -10 * np.log10(((mine - truth) ** 2).mean()) > 22


def test_check_prints_a_line_per_frame_and_writes_nothing(tmp_path, capsys):
    write_views(tmp_path, CAMERAS)
    before = sorted(tmp_path.iterdir())
    fit_views.main(["--views", str(tmp_path), "--check"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[-1].endswith("8 of 8 frames are good")
    assert sorted(tmp_path.iterdir()) == before


def test_many_assets_are_fitted_as_each_is_alone(tmp_path, capsys):
    """Two have one size, one has another, and one is damaged; --resume then makes what is missing."""
    sources = {name: tmp_path / "captured" / name for name in ("a", "b/front", "large", "damaged")}
    for name in ("a", "damaged"):
        write_views(sources[name], CAMERAS)
    write_views(sources["b/front"], CAMERAS, moved)
    write_views(sources["large"], orbit(8, 0.3, 40))
    (sources["damaged"] / "3.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    options = ["--steps", "60", "--held-out", "4", *OPTIONS]
    many = ["--views", *map(str, sources.values()), "--out", str(out), "--at-once", "3", *options]
    with pytest.raises(UserError, match=r"1 of 4 failed, see above: .*damaged"):
        fit_views.main(many)
    assert "3.png" in capsys.readouterr().err and not (out / "damaged" / "report.json").exists()
    reports = {name: json.loads((out / name / "report.json").read_text()) for name in [*sources][:3]}
    assert [each["assets_fitted_together"] for each in reports.values()] == [2, 2, 1]
    alone = tmp_path / "alone"
    fit_views.main(["--views", str(sources["b/front"]), "--out", str(alone), *options])
    expected = json.loads((alone / "report.json").read_text())
    for agreement in ("training", "held_out"):
        ours, theirs = (each[agreement]["psnr"] for each in (reports["b/front"], expected))
        assert ours == pytest.approx(theirs, abs=1.0) and theirs > 20
    np.testing.assert_allclose(reports["b/front"]["world"]["center"], MOVED_BY, atol=1e-3)
    assert {path.name for path in (out / "b" / "front").iterdir()} == {path.name for path in alone.iterdir()}

    write_views(sources["damaged"], CAMERAS)
    written = (out / "a" / "report.json").stat().st_mtime_ns
    fit_views.main([*many, "--resume"])
    assert "3 of 4 are there already" in capsys.readouterr().out
    assert (out / "damaged" / "asset.ply").is_file()
    assert (out / "a" / "report.json").stat().st_mtime_ns == written


def test_many_directories_are_checked(tmp_path, capsys):
    for name in ("good", "bad"):
        write_views(tmp_path / name, CAMERAS)
    (tmp_path / "bad" / "3.png").unlink()
    with pytest.raises(UserError, match="7 of 8 frames are good; mend the others"):
        fit_views.main(["--check", "--views", str(tmp_path / "bad")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "ERROR: " in lines[3]
    with pytest.raises(UserError, match="1 of 2 failed, see above: .*bad"):
        fit_views.main(["--check", "--views", str(tmp_path / "bad"), str(tmp_path / "good")])
    said = capsys.readouterr()
    assert "8 of 8 frames are good" in said.out and "7 of 8 frames are good" in said.err


def turned(cameras: Cameras) -> Cameras:
    """Frame 2 looks at the object from a place that is 8 degrees away from where it should be."""
    cos, sin = np.cos(np.radians(8)), np.sin(np.radians(8))
    w2c = cameras.w2c.astype(np.float64)
    w2c[2] = w2c[2] @ np.array([[cos, 0, sin, 0], [0, 1, 0, 0], [-sin, 0, cos, 0], [0, 0, 0, 1]])
    return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def test_check_names_a_camera_that_is_off_by_some_degrees(tmp_path, capsys):
    write_views(tmp_path, orbit(12, 0.3, 48), turned)
    fit_views.main(["--views", str(tmp_path), "--check"])
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if "camera is" in line] == [2]
    degrees = re.search(r"remark: its camera is off: turned by ([\d.]+) degrees.* moves it so", lines[2])
    assert degrees is not None and float(degrees[1]) == pytest.approx(8, abs=1)


def test_setbacks_are_reported(tmp_path, monkeypatch):
    write_views(tmp_path / "views", CAMERAS)
    run, failures = Fit.run, [MemoryError(), FloatingPointError("the loss is nan")]

    def failing_run(fit, *args):
        if failures:
            raise failures.pop()
        run(fit, *args)

    monkeypatch.setattr(Fit, "run", failing_run)
    paths = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out")]
    fit_views.main([*paths, "--steps", "10", *OPTIONS])
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert "the loss is nan" in notes[-2] and re.search(r"at most \d+ Gaussians", notes[-1])


def test_out_of_memory_outside_of_the_steps_is_one_line(tmp_path, monkeypatch):
    write_views(tmp_path / "views", CAMERAS)

    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Fit, "set_targets", no_memory)
    with pytest.raises(UserError, match="out of memory; give fewer or smaller views"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), *OPTIONS])


def tree(directory):
    """Path -> content of the files below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("out", ["views", "held", "mine"])
def test_the_views_and_files_of_a_users_are_not_replaced(tmp_path, monkeypatch, out):
    """The directory of the views, that of the held-out ones, and one with a sheet of somebody's own."""
    write_views(tmp_path / "views", CAMERAS)
    write_views(tmp_path / "held", HELD_OUT)
    write_image(tmp_path / "mine/views.png", np.zeros((4, 4, 3)))
    monkeypatch.setattr(run, "load_job", lambda *_: 1 / 0)
    before = tree(tmp_path)
    options = ["--held-out", str(tmp_path / "held"), *OPTIONS]
    with pytest.raises(UserError, match=f"{out}/(transforms.json|views.png) is"):
        fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / out), *options])
    assert tree(tmp_path) == before


def test_an_own_output_is_not_fitted_into_itself(tmp_path):
    """Its transforms.json names renders, which are views like others."""
    write_views(tmp_path / "views", CAMERAS)
    options = ["--steps", "2", *OPTIONS]
    fit_views.main(["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), *options])
    with pytest.raises(UserError, match="out/transforms.json is what it is to read"):
        fit_views.main(["--views", str(tmp_path / "out"), "--out", str(tmp_path / "out"), *options])


def test_resuming_makes_again_what_was_made_from_something_else(tmp_path, capsys):
    write_views(tmp_path / "views", CAMERAS)
    paths = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), *OPTIONS, "--resume"]
    report = tmp_path / "out/report.json"

    def fitted(*flags):
        before = report.stat().st_mtime_ns if report.exists() else 0
        fit_views.main([*paths, *flags])
        return report.stat().st_mtime_ns != before, capsys.readouterr().out

    assert fitted("--steps", "2")[0] and not fitted("--steps", "2")[0]
    assert not fitted("--steps", "2", "--at-once", "2")[0]  # which changes nothing
    is_fitted, said = fitted("--steps", "3", "--held-out", "4")
    assert is_fitted and "made from other held_out, --steps" in said
    write_image(tmp_path / "views/0.png", np.full((SIZE, SIZE, 4), 0.7, np.float32))
    is_fitted, said = fitted("--steps", "3", "--held-out", "4")
    assert is_fitted and "made from other views" in said and json.loads(report.read_text())["num_steps"] == 3
