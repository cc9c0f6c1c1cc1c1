"""From a prompt or a picture to files, with random weights and a fit in this process, and what is refused."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from im3d_jax import config_flags, main
from im3d_jax.conditions import text_to_image
from recon_torch import outputs
from recon_torch.fit import quality
from recon_torch.formats.ply import load_ply
from recon_torch.views import rigidity
from recon_torch.views.directory import load_views
from recon_torch.views.images import read_image
from recon_torch.views.transforms import read_transforms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]

CHANGES = """
    config.backbone.kwargs.attention_levels = (0,)
    config.video.update(num_steps=3, w_image=2.0, w_text=3.0)
    config.rounds.update(at_steps=(8, 14), num_steps=2)
    config.fit.update(num_gaussians=200, num_steps=20, lpips_net="alex")
    config.turntable.update(num_frames=4, size=32)
    config.export.page = True
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, write_runnable):
    return write_runnable(tmp_path_factory.mktemp("config"), CHANGES)


def command(config_path, *arguments):
    return main.run(["generate", f"--config={config_path}", *map(str, arguments)])


@pytest.fixture(scope="module")
def asset(config_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("prompt") / "asset"
    assert (
        command(config_path, "--prompt", "a red mushroom with a beige stem", "--out", out, "--save-views")
        == 0
    )
    return out


def test_all_files_are_there(asset):
    views = {"views_0", "views_1", "views_2", "images"}
    files = {"asset.ply", "asset.html", "turntable.mp4", "views.png", "transforms.json", "report.json"}
    assert {path.name for path in asset.iterdir()} == files | views | {outputs.MARKER}
    for folder in (asset, *(asset / f"views_{number}" for number in range(3))):
        cameras, paths = read_transforms(folder / "transforms.json")
        assert len(cameras) == len(paths) == 4 and cameras.width == 32
        assert all(read_image(folder / path).shape[:2] == (32, 32) for path in paths)
    report = json.loads((asset / "report.json").read_text())
    assert len(load_ply(asset / "asset.ply").gaussians.means) == report["num_gaussians"]


def test_the_report_has_what_the_design_lists(asset, config_path):
    report = json.loads((asset / "report.json").read_text())
    assert report["network_calls"] == 3 + 2 * 2 * 2
    assert report["network_evaluations"] == 3 * report["network_calls"]
    assert (report["text_to_image_calls"], report["text_to_image_evaluations"]) == (2, 4)
    assert report["config_digest"] == config_flags.config_digest(config_flags.load(config_path))
    assert report["seed"] == 0 and report["prompt"] == "a red mushroom with a beige stem"
    assert report["not_understood"] == []
    assert report["versions"]["jax"] == version("jax") and "CPU" in report["device"]
    assert 0 <= report["elevation_deg"] <= 45
    assert [each["until_step"] for each in report["rounds"]] == [8, 14, 20]
    assert all(
        np.isfinite([each[name] for name in ("psnr", "ssim", "lpips")]).all() for each in report["rounds"]
    )
    stages = {"text_to_image", "video", "elevation", "fit", "renoise_denoise", "inspect", "export"}
    assert report["seconds"].keys() == stages | {"total"}
    assert report["seconds"]["total"] >= sum(report["seconds"][name] for name in stages) - 0.1  # rounding
    assert any("random weights" in note for note in report["notes"])


def test_the_files_show_the_elevation_that_was_estimated(asset):
    report = json.loads((asset / "report.json").read_text())
    cameras, _ = read_transforms(asset / "transforms.json")
    heights = cameras.positions[:, 2]
    np.testing.assert_allclose(heights, 2 * np.sin(np.deg2rad(report["elevation_deg"])), atol=1e-4)


def test_an_image_is_view_0_of_several_assets_that_share_a_worker(config_path, tmp_path, local_client):
    rows, columns = np.mgrid[:60, :60]
    inside = np.hypot(rows - 20, columns - 30) < 15
    picture = np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "ball.png")
    before = local_client.started
    arguments = ("--image", tmp_path / "ball.png", "--num-assets", 2, "--seed", 5, "--out", tmp_path / "out")
    assert command(config_path, *arguments, "--save-views") == 0
    assert local_client.started == before + 1
    for number in range(2):
        folder = tmp_path / "out" / f"{number:04d}"
        report = json.loads((folder / "report.json").read_text())
        assert report["seed"] == 5 + number and report["image"] == str(tmp_path / "ball.png")
        assert report["text_to_image_calls"] == 0 and "text_to_image" not in report["seconds"]
        view = np.asarray(Image.open(folder / "views_0" / "images" / "000.png"), float)
        np.testing.assert_allclose(view[16, 16], [200, 30, 40, 255], atol=2)
        assert (view[0, :, 3] == 0).all()
    assert (tmp_path / "out/0000/asset.ply").read_bytes() != (tmp_path / "out/0001/asset.ply").read_bytes()


def test_pictures_from_several_sides_are_views_of_the_fit(config_path, tmp_path):
    """Of the 4 views, the back is view 2; at 30 degrees there is none, so that picture comes after them."""
    inside = np.hypot(*(np.mgrid[:60, :60] - 30)) < 15
    arguments = ["--out", tmp_path / "out", "--save-views", "--elevation-deg", 10]
    colours = {180: [40, 30, 200], 0: [200, 30, 40], 30: [30, 160, 40]}
    for azimuth_deg, colour in colours.items():
        picture = np.where(inside[..., None], colour, 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{azimuth_deg}.png")
        arguments += ["--image", tmp_path / f"{azimuth_deg}.png", "--azimuth-deg", azimuth_deg]
    assert command(config_path, *arguments, "--config.image.weight=2") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["image"] == str(tmp_path / "0.png")
    assert report["sides"] == [
        {"image": str(tmp_path / f"{each}.png"), "azimuth_deg": float(each)} for each in (30, 180)
    ]
    assert report["network_calls"] == 2 * (3 + 2 * 2 * 2)
    for folder in ("views_0", "views_2"):
        cameras, paths = read_transforms(tmp_path / "out" / folder / "transforms.json")
        assert len(cameras) == 5
        for view, azimuth_deg in {2: 180, 4: 30}.items():
            pixel = np.asarray(Image.open(tmp_path / "out" / folder / paths[view]), float)[16, 16]
            np.testing.assert_allclose(pixel, [*colours[azimuth_deg], 255], atol=2)
            x, y, _ = cameras.positions[view]
            assert np.rad2deg(np.arctan2(y, x)) % 360 == pytest.approx(azimuth_deg, abs=1e-3)


def test_the_same_seed_makes_the_same_bytes(asset, config_path, tmp_path, capsys):
    prompt = "a shiny RED mushroom with a beige stem"  # one word that it does not know changes nothing
    assert command(config_path, "--prompt", prompt, "--out", tmp_path, "--save-views") == 0
    for name in ("asset.ply", "turntable.mp4", "views.png", "views_2/images/003.png"):
        assert (tmp_path / name).read_bytes() == (asset / name).read_bytes(), name
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "shiny" in warning and "mushroom" in warning.partition("it knows")[2]


def test_bad_assets_are_tried_again_and_the_best_stays(config_path, tmp_path, monkeypatch):
    """Verdicts of four tries; the third is the first that is not bad, and ends it."""
    verdicts, judged = iter(["bad", "bad", "suspect", "good"]), []
    # Whether the object moves is told by the first views: later ones follow a fit, which does not move.
    monkeypatch.setattr(rigidity, "excursions", lambda cameras, masks: (judged.append(masks), "found")[1])

    def inspect(*_, excursions, **__):
        assert excursions == "found"
        verdict = next(verdicts)
        return {
            "verdict": verdict,
            "reasons": ["why"],
            "hints": [],
            "numbers": {},
        }

    monkeypatch.setattr(quality, "inspect", inspect)
    arguments = ("--prompt", "a red car", "--seed", 4, "--retry-seeds", 5)
    assert command(config_path, *arguments, "--out", tmp_path / "retried", "--save-views") == 0
    report = json.loads((tmp_path / "retried" / "report.json").read_text())
    assert report["quality"]["verdict"] == "suspect" and report["seed"] == 2004 and report["seconds"]
    assert [(each["seed"], each["verdict"]) for each in report["tries"]] == [
        (4, "bad"), (1004, "bad"), (2004, "suspect"),
    ]  # fmt: skip
    assert command(config_path, "--prompt", "a red car", "--seed", 2004, "--out", tmp_path / "direct") == 0
    masks = [load_views(tmp_path / "retried" / f"views_{number}").masks for number in (0, 2)]
    np.testing.assert_allclose(judged[2], masks[0], atol=0.003)
    assert np.abs(judged[2] - masks[1]).max() > 0.01
    first, again = ((tmp_path / name / "asset.ply").read_bytes() for name in ("retried", "direct"))
    assert first == again
    hidden = [path.name for path in (tmp_path / "retried").iterdir() if path.name.startswith(".")]
    assert hidden == [outputs.MARKER] and (tmp_path / "retried" / "views_2").is_dir()


def test_no_try_is_better_than_the_first_by_being_later(config_path, tmp_path, monkeypatch):
    judged = iter([["why"], ["why", "what"]])
    empty = {"verdict": "bad", "hints": [], "numbers": {}}
    monkeypatch.setattr(quality, "inspect", lambda *_, **__: empty | {"reasons": next(judged)})
    assert command(config_path, "--prompt", "a car", "--retry-seeds", 1, "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seed"] == 0 and [each["seed"] for each in report["tries"]] == [0, 1000]


def test_a_radiance_field_goes_through_the_rounds(config_path, tmp_path):
    settings = ("fit.representation=nerf", "export.page=False", "gates.view_shape=2.0")
    settings = tuple(f"--config.{each}" for each in settings)
    assert command(config_path, *settings, "--prompt", "a red car", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["until_step"] for each in report["rounds"]] == [8, 14, 20]
    assert report["num_gaussians"] == 0 and report["quality"]["verdict"] == "bad"
    assert {"asset.safetensors", "turntable.mp4"} < {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "asset.ply").exists()


def test_a_mesh_goes_through_the_rounds(config_path, tmp_path):
    settings = ("fit.representation=mesh", "fit.mesh_cells=8", "fit.mesh_colors=8", "mesh.texture=64")
    settings = tuple(f"--config.{each}" for each in settings)
    assert command(config_path, *settings, "--prompt", "a red car", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["until_step"] for each in report["rounds"]] == [8, 14, 20]
    assert report["mesh"]["files"] == ["mesh.glb"] and report["mesh"]["texture_px"] == 64
    assert {"mesh.glb", "mesh.json", "turntable.mp4"} < {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "asset.ply").exists()


def bad_cases(tmp_path, config_path):
    (tmp_path / "file").write_text("")
    for name in (
        "holidays/images/000.png",
        "taken/report.json/x",
        "file_images/images",
        "two/0001/asset.ply",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/0001").symlink_to(tmp_path / "holidays")
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((20, 20, 3), 255, np.uint8)).save(blank)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(config_flags.load(config_path).weights).read_bytes()[:-100])
    out, prompt = ("--out", tmp_path / "out"), ("--prompt", "a red car")
    return {
        "no image at": ("--image", tmp_path / "none.png", *out),
        "shows no object": ("--image", blank, *out),
        "cannot read": ("--image", tmp_path / "file", *out),
        "--prompt is empty": ("--prompt", "  ", *out),
        "2 images, 0 of azimuth-deg": ("--image", blank, "--image", blank, *out),
        "1 image, 2 of azimuth-deg": ("--image", blank, "--azimuth-deg", 0, "--azimuth-deg", 90, *out),
        "are at one azimuth-deg": (*2 * ("--image", blank, "--azimuth-deg", 0), *out),
        "no image is at azimuth-deg 0": ("--image", blank, "--azimuth-deg", 180, *out),
        "--azimuth-deg: 'left' is not a number from -360": ("--image", blank, "--azimuth-deg", "left", *out),
        "--azimuth-deg is of an --image": (*prompt, "--azimuth-deg", 0, *out),
        "5 images, and config.num_views is 4": (
            *[each for n in range(5) for each in ("--image", blank, "--azimuth-deg", 10 * n)],
            *out,
        ),
        "nothing to make": out,
        "cannot be made": (*prompt, "--out", tmp_path / "file" / "out"),
        "unknown config key 'vidio.num_steps'": (*prompt, *out, "--config.vidio.num_steps=3"),
        "is cut off": (*prompt, *out, f"--config.weights={damaged}"),
        "no weights at": (*prompt, *out, "--config.weights=none.safetensors"),
        "make each larger": (*prompt, *out, "--config.fit.num_steps=10"),
        "--num-assets: '0' is not a whole number from 1": (*prompt, *out, "--num-assets", 0),
        "--num-assets: '1e9' is not a whole number from 1": (*prompt, *out, "--num-assets", "1e9"),
        "--retry-seeds: '-1' is not a whole number from 0": (*prompt, *out, "--retry-seeds", -1),
        "--seed: '4294967296' is not a whole number from 0 to 2147483647": (*prompt, *out, "--seed", 2**32),
        "--elevation-deg: 'nan' is not a number between": (*prompt, *out, "--elevation-deg", "nan"),
        "config.fit.max_gaussians is -5; give": (*prompt, *out, "--config.fit.max_gaussians=-5"),
        "config.turntable.size is 0; give": (*prompt, *out, "--config.turntable.size=0"),
        "config.elevation.deg is 120.0; give": (*prompt, *out, "--config.elevation.deg=120"),
        "config.mesh.formats is empty": (*prompt, *out, "--mesh", "--config.mesh.formats=()"),
        "config.export.page: pages show Gaussians": (*prompt, *out, "--config.fit.representation=nerf"),
        "give one of gaussians, nerf": (*prompt, *out, "--config.fit.representation=voxels"),
        "the asset is a mesh already": (*prompt, *out, "--mesh", "--config.fit.representation=mesh"),
        "name those of the mesh in config.mesh.formats": (
            *(*prompt, *out, "--config.fit.representation=mesh"),
            "--config.export.formats=('spz',)",
        ),
        "config.size 64 makes latents": (*prompt, *out, "--config.size=64"),
        "images/000.png is not of an earlier run": (*prompt, "--out", tmp_path / "holidays"),
        "report.json is a directory": (*prompt, "--out", tmp_path / "taken"),
        "images is no directory": (*prompt, "--out", tmp_path / "file_images"),
        "0001/asset.ply is not": (*prompt, "--num-assets", 2, "--out", tmp_path / "two"),
        "0001 is a symbolic link": (*prompt, "--num-assets", 2, "--out", tmp_path / "linked"),
    }


def test_mistakes_are_one_line_and_leave_nothing(config_path, tmp_path, capsys):
    cases = bad_cases(tmp_path, config_path)
    files = set(tmp_path.rglob("*"))
    for words, arguments in cases.items():
        assert command(config_path, *arguments) == 2, words
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
        assert set(tmp_path.rglob("*")) == files, words


def test_the_picture_that_is_given_is_not_replaced(config_path, tmp_path, capsys):
    """A picture of the user's in the directory of images stays; one of an earlier asset's is refused."""
    inside = np.hypot(*(np.mgrid[:60, :60] - 30)) < 15
    mug = tmp_path / "z/images/mug.png"
    mug.parent.mkdir(parents=True)
    Image.fromarray(np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)).save(mug)
    before = mug.read_bytes()
    for _ in range(2):
        assert command(config_path, "--image", mug, "--out", tmp_path / "z") == 0
        assert mug.read_bytes() == before
    assert command(config_path, "--image", mug.with_name("000.png"), "--out", tmp_path / "z") == 2
    assert "000.png is what it is to read" in capsys.readouterr().err


def test_a_pipeline_draws_the_pictures_before_anything_else_loads(config_path, tmp_path, monkeypatch):
    """What it draws goes on as a picture of the user's does, and so does what is doubtful about it."""
    rows, columns = np.mgrid[:90, :90]
    disc = np.hypot(rows - 8, columns - 25) < 12
    asked = []

    def draw(path, prompts, seeds, num_steps, template, on_step):
        asked.append((path, list(prompts), list(seeds), num_steps, template.replace("{}", prompts[0])))
        return [np.where(disc[..., None], np.float32([0.8, 0.1, 0.2]), np.float32(0.6)) for _ in prompts]

    monkeypatch.setattr(text_to_image, "draw", draw)
    flags = ("--config.text_to_image.pipeline=sdxl", "--config.text_to_image.template=photo of {}")
    out = tmp_path / "out"
    assert command(config_path, *flags, "--prompt", "a red car", "--prompt", "a duck", "--out", out) == 0
    assert asked == [("sdxl", ["a red car", "a duck"], [0, 0], 2, "photo of a red car")]
    for number, prompt in enumerate(("a red car", "a duck")):
        report = json.loads((out / f"{number:04d}/report.json").read_text())
        assert report["prompt"] == prompt and report["text_to_image_calls"] == 0
        picture = np.asarray(Image.open(out / f"{number:04d}/input.png"), float)
        np.testing.assert_array_equal(picture[disc], np.tile([204, 26, 51], (disc.sum(), 1)))
        assert report["quality"]["verdict"] != "good"
        assert report["quality"]["reasons"][0].startswith("in the picture, the object touches the border")
