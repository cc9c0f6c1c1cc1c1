"""`im3d dataset`, from objects to the records of training: resumed, split, encoded; what is skipped."""

import shutil

import numpy as np
import pytest
import trimesh

from im3d_jax import config_flags, main
from im3d_jax.autoencoders import patches
from im3d_jax.commands import dataset
from im3d_jax.conditions.encoders import ImageEncoder, PretrainedText
from im3d_jax.data import mesh_rendering, objects, procedural, views
from im3d_jax.data.turntables import TurntableSource, read_splits
from recon_torch.errors import UserError
from recon_torch.views import cameras
from recon_torch.views.images import read_image

pytestmark = pytest.mark.slow

SIZE, VIEWS, OBJECTS, SEED = 16, 4, 6, 3
FIRST = objects.SPLITS["train"][0]
PROCEDURAL = [
    "--procedural",
    str(OBJECTS),
    "--size",
    str(SIZE),
    "--num-views",
    str(VIEWS),
    "--seed",
    str(SEED),
]


def run(*arguments):
    dataset.main([str(each) for each in arguments])


def build(rendered, out, *more, split="train=1"):
    run("build", "--views", rendered, "--out", out, "--split", split, *more)
    return TurntableSource(out)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Directories of procedural objects. Not to be changed."""
    out = tmp_path_factory.mktemp("rendered")
    run("render", *PROCEDURAL, "--out", out)
    return out


@pytest.fixture
def copied(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "views")


def files(directory):
    """{path: (content, time of writing)} of all files below."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


# ---- Rendering ----


def test_records_are_the_procedural_objects(rendered, tmp_path):
    source = build(rendered, tmp_path / "data")
    assert len(source) == OBJECTS
    for number in range(OBJECTS):
        truth = procedural.turntables(SEED, [FIRST + number], size=SIZE, num_views=VIEWS)
        example = source[number]
        assert example["id"] == f"train-00000/{number}/{FIRST + number:08d}"
        assert example["caption"] == truth.captions[0]
        assert example["elevation_rad"] == pytest.approx(truth.elevation_rad[0], abs=1e-4)
        np.testing.assert_allclose(example["rgb"], truth.views.rgb[0], atol=1.01 / 255)
        np.testing.assert_allclose(example["alpha"], truth.views.alpha[0], atol=0.51 / 255)


def test_rendering_continues_where_it_stopped(copied, capsys):
    before = files(copied)
    lost = copied / f"{FIRST + 2:08d}"
    shutil.rmtree(lost)
    run("render", *PROCEDURAL, "--out", copied)
    after = files(copied)
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    new = {path.relative_to(copied).parts[0] for path in after if after[path][1] != before[path][1]}
    assert new == {lost.name}
    assert "1 objects rendered, 5 were there" in capsys.readouterr().out
    with pytest.raises(UserError, match="was begun with num_views 4, now it is 2"):
        run("render", *PROCEDURAL, "--num-views", 2, "--out", copied)


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / f"{FIRST:08d}").mkdir()
    (tmp_path / f"{FIRST:08d}" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"cannot write .*{FIRST:08d}.*; choose another place"):
        run("render", *PROCEDURAL, "--out", tmp_path)
    assert (tmp_path / f"{FIRST:08d}" / "notes.txt").read_text() == "mine"


def test_parts_are_disjoint_and_cover_all_objects(rendered, tmp_path):
    names = []
    for part in range(2):
        out = tmp_path / str(part)
        run("render", *PROCEDURAL, "--out", out, "--part", f"{part}/2")
        names += [path.name for path in out.iterdir() if path.is_dir()]
    assert sorted(names) == sorted(path.name for path in rendered.iterdir() if path.is_dir())
    assert len(set(names)) == OBJECTS


@pytest.fixture
def meshes(tmp_path):
    """Two meshes in folders, one of them without a caption, and a file that is none; and their captions."""
    directory = tmp_path / "meshes"
    for name, shape in {"a/box": trimesh.creation.box((1, 2, 3)), "b": trimesh.creation.icosphere()}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shape.export(directory / f"{name}.glb")
    (directory / "c.obj").write_text("nothing")
    (tmp_path / "captions.csv").write_text('a/box,"a box, grey"\nother,a cat\n')
    return directory


def test_meshes_become_records(meshes, tmp_path, capsys):
    out = tmp_path / "views"
    settings = ["--size", SIZE, "--num-views", VIEWS, "--seed", SEED, "--captions", tmp_path / "captions.csv"]
    run("render", "--meshes", meshes, "--out", out, *settings)
    printed = capsys.readouterr()
    assert "2 objects rendered, 0 were there, 1 skipped" in printed.out
    assert "im3d: skipped c: " in printed.err and "2 of 3 meshes have no caption" in printed.err
    source = build(out, tmp_path / "data")
    examples = [source[0], source[1]]
    assert [each["caption"] for each in examples] == ["a box, grey", ""]
    assert all(0 <= each["elevation_rad"] <= np.pi / 4 for each in examples)
    assert examples[0]["elevation_rad"] != examples[1]["elevation_rad"]
    orbit = cameras.orbit(VIEWS, examples[0]["elevation_rad"], SIZE)
    rgba, _ = mesh_rendering.render(mesh_rendering.load_mesh(meshes / "a/box.glb"), orbit)
    np.testing.assert_allclose(examples[0]["alpha"], rgba[..., 3:], atol=0.51 / 255)
    over_white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    np.testing.assert_allclose(examples[0]["rgb"], over_white, atol=1.01 / 255)


def test_meshes_with_names_in_conflict_are_refused(meshes, tmp_path):
    shutil.copy(meshes / "b.glb", meshes / "a.glb")
    with pytest.raises(UserError, match="a mesh and a folder called a;"):
        run("render", "--meshes", meshes, "--out", tmp_path / "views")
    shutil.copy(meshes / "b.glb", meshes / "c.glb")
    with pytest.raises(UserError, match="differ only in their suffix"):
        run("render", "--meshes", meshes, "--out", tmp_path / "views")
    assert not (tmp_path / "views").exists()


# ---- Building ----


def spoil(rendered):
    """Makes three of the objects unfit."""
    first, second, third, *_ = sorted(path for path in rendered.iterdir() if path.is_dir())
    (first / "metadata.json").unlink()
    (second / "images/001.png").write_text("no picture")
    frames = (third / "transforms.json").read_text().replace('"h": 16', '"h": 17')
    (third / "transforms.json").write_text(frames)


def test_unfit_objects_are_named_and_skipped(copied, tmp_path, capsys):
    spoil(copied)
    source = build(copied, tmp_path / "data", "--max-skipped", 3)
    printed = capsys.readouterr()
    assert [source[n]["id"][-8:] for n in range(3)] == [f"{FIRST + n:08d}" for n in (3, 4, 5)]
    assert "3 in train; 3 skipped" in printed.out
    for number, why in enumerate(["it has no caption", "cannot read", "is 16x16 px"]):
        assert f"im3d: skipped {FIRST + number:08d}: " in printed.err and why in printed.err
    with pytest.raises(UserError, match=r"more than --max-skipped 2 .*: 00020000: it has no caption"):
        build(copied, tmp_path / "more", "--max-skipped", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "views"]


def test_objects_of_another_size_are_skipped(copied, tmp_path, capsys):
    rgba = np.zeros((2, SIZE, SIZE, 4))
    rgba[:, 4:12, 4:12] = 1
    views.write_object(copied / "zz", rgba, cameras.orbit(2, 0.1, SIZE), "", 0.1)
    assert len(build(copied, tmp_path / "data")) == OBJECTS
    assert "zz: it has 2 views of 16 px, the first object 4 views of 16 px" in capsys.readouterr().err


def test_splits_hold_each_object_once(rendered, tmp_path):
    build(rendered, tmp_path / "data", split="train=0.5,validation=0.2,test=0.3")
    counts = read_splits(tmp_path / "data")
    assert sum(counts.values()) == OBJECTS
    sources = [TurntableSource(tmp_path / "data", split) for split, count in counts.items() if count]
    names = [source[n]["id"][-8:] for source in sources for n in range(len(source))]
    assert sorted(names) == [f"{FIRST + n:08d}" for n in range(OBJECTS)]


def test_what_encoders_make_is_stored(rendered, tmp_path, clip, clip_vision):
    text = dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)
    vision = clip_vision(24)
    (tmp_path / "config.py").write_text(
        "from configs import tiny\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        f"    config.size = {SIZE}\n"
        "    config.backbone.kwargs.latent_shape = (4, 4, 64)\n"
        f"    config.text = dict(name='pretrained', kwargs=dict(encoders=({text!r},)))\n"
        f"    config.image_encoder.path = {vision!r}\n"
        "    return config\n"
    )
    source = build(rendered, tmp_path / "data", "--embed", "--latents", f"--config={tmp_path / 'config.py'}")
    plain = build(rendered, tmp_path / "plain")
    encoder, image_encoder, codec = PretrainedText([text]), ImageEncoder(vision), patches.Patches(4)
    for number in (0, 5):
        example, pictures = source[number], plain[number]
        embeddings, mask = encoder.encode([pictures["caption"]])
        np.testing.assert_allclose(example["text"][0], embeddings[0][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(example["text_mask"][0], mask[0][0])
        tokens = image_encoder.encode(pictures["rgb"][:1])[0]
        np.testing.assert_allclose(example["image_tokens"], tokens, rtol=1e-3, atol=1e-3)
        latents = codec.encode(pictures["rgb"], pictures["alpha"])
        np.testing.assert_allclose(example["latents"], latents, atol=1e-3)
        assert "rgb" not in example
    assert source.metadata["text_encoders"] == [encoder.encoders[0].digest]
    assert source.metadata["autoencoder"] == config_flags.load("configs/tiny.py").autoencoder.to_dict()


# ---- Looking, and mistakes ----


def test_a_contact_sheet_has_a_row_for_each_object(rendered, tmp_path, capsys):
    source = build(rendered, tmp_path / "data")
    run("show", tmp_path / "data", "--out", tmp_path / "sheet.png", "--objects", 3)
    sheet = read_image(tmp_path / "sheet.png")
    tile = 96
    assert sheet.shape[0] == 3 * (tile + 2) + 2
    left = sheet.shape[1] - VIEWS * (tile + 2)
    shown = sheet[2 : 2 + tile : 6, left : left + tile : 6]  # the first view, whose pixels are 6 wide
    alpha = source[0]["alpha"][0]
    np.testing.assert_allclose(shown, source[0]["rgb"][0] - 0.25 * (1 - alpha), atol=0.51 / 255)
    printed = capsys.readouterr().out
    assert f"{OBJECTS} in train" in printed and f"{VIEWS} views of {SIZE} px" in printed
    assert all(source[n]["caption"] in printed for n in (0, 2, 5))


MISTAKES = {
    "command": (["bake"], "im3d dataset has no 'bake'; it has render, build, show"),
    "split": (["build", "--views", "x", "--out", "y", "--split", "train=0.5"], "shares that make 1"),
    "views": (["build", "--views", "nothing", "--out", "y"], "no directory nothing"),
    "encoders": (["build", "--views", "x", "--out", "y", "--embed"], "names no encoders to cache"),
    "part": (["render", "--procedural", "3", "--out", "y", "--part", "3/3"], "not I/N"),
    "size": (["render", "--procedural", "3", "--out", "y", "--size", "1"], "--size must be from 8"),
    "source": (["render", "--out", "y"], "one of the arguments --meshes --procedural is required"),
    "meshes": (["render", "--meshes", "nothing", "--out", "y"], "no meshes .* below nothing"),
    "data": (["show", "nothing", "--out", "y"], "no data set in nothing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, tmp_path, monkeypatch):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        dataset.main(arguments)
    assert not list(tmp_path.iterdir())


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(dataset, "LOG_EVERY_S", 0)
    assert list(dataset.progress("abc", 5, initial=2)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/s")[0].rsplit(" ", 1)[0] for line in lines] == [f"objects {n}/5" for n in (3, 4, 5)]
    assert lines[-1].endswith("ETA 00:00")


def test_help_and_errors_come_from_the_command_line(capsys):
    assert main.run(["dataset", "--help"]) == 0
    assert "im3d dataset build --views" in capsys.readouterr().out
    assert main.run(["dataset", "show", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("im3d: error: the following arguments are required: --out")
