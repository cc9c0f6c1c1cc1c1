"""The command: its flags, its files, and that a second run measures nothing again."""

import dataclasses
import json
import zlib
from argparse import Namespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from im3d_jax import config_flags, pipeline
from im3d_jax.commands import evaluate
from im3d_jax.commands.evaluate import suite as command
from im3d_jax.data import objects
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.evaluate import result_file, suite
from im3d_jax.evaluate.truth import MeshObjects, ProceduralObjects

pytestmark = pytest.mark.slow


@pytest.fixture
def config_path(monkeypatch, perceptual, tmp_path, write_runnable):
    """A config with 4 views of 32 px and a random network, for a suite of few objects and a small LPIPS."""
    monkeypatch.setattr(suite, "PerceptualDistance", lambda *_: perceptual)
    monkeypatch.setattr(suite, "NUM_ELEVATION_OBJECTS", 2)
    return write_runnable(tmp_path)


def test_writes_tables_and_results_and_keeps_them(config_path, monkeypatch, tmp_path, capsys):
    arguments = [
        "suite",
        "--suite=procedural",
        "--parts=elevation",
        f"--out={tmp_path}",
        f"--config={config_path}",
    ]
    evaluate.main(arguments)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| true views | 2 |" in table and "random backbone weights" in table
    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["index"] for row in result["elevation"]["objects"]] == [0, 1]
    assert result_file.read(tmp_path)["command"] == "suite"
    errors_deg = [row["scores"]["error_deg"] for row in result["rows"]]
    assert result["summary"][0]["mean"] == pytest.approx(np.mean(errors_deg)) and len(errors_deg) == 2

    monkeypatch.setattr(ProceduralObjects, "render", lambda *_: pytest.fail("measured again"))
    evaluate.main(arguments[1:])  # as the command was called before it had others beside it
    assert (tmp_path / "table.md").read_text() == table


def test_other_weights_have_another_digest(config_path, tmp_path):
    loaded = pipeline.load(config_flags.load(config_path))
    params = jax.tree.map(lambda leaf: leaf + 1, loaded.generator.params)
    changed = dataclasses.replace(loaded, generator=loaded.generator.with_params(params))
    objects = ProceduralObjects(0, 32, 4)
    suites = [suite.Suite(each, objects, 0, tmp_path, 1, 1) for each in (loaded, loaded, changed)]
    one, same, other = (each.digest for each in suites)
    assert one == same != other
    assert suites[0].key != suite.Suite(loaded, ProceduralObjects(1, 32, 4), 0, tmp_path, 1, 1).key


def test_truth_is_of_the_test_split_and_from_the_given_azimuths():
    seen = ProceduralObjects(seed=0, size=32, num_views=4)
    around = seen.render(1)
    ahead = seen.render(1, azimuths_rad=np.full(4, np.pi / 2))
    assert around.indices == [objects.SPLITS["test"][0]]
    assert around.captions == [objects.make_object(0, 0).caption]
    assert around.categories[0].split()[-1] in around.captions[0]
    np.testing.assert_allclose(ahead.rgb[0], np.broadcast_to(around.rgb[0, 1], ahead.rgb[0].shape), atol=1e-4)


@pytest.fixture
def tetrahedra(tmp_path):
    """Four meshes of one face each, of another colour each, and the flags that name them."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for number, name in enumerate(("a/red", "a/green", "b/blue", "b/gray")):
        color = np.eye(3)[number] if number < 3 else np.full(3, 0.5)
        lines = [f"v {x} {y} {z} {' '.join(map(str, color))}" for x, y, z in corners]
        path = tmp_path / "meshes" / f"{name}.obj"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "f 1 2 3", ""]))
    split = {"train": ["a/red", "b/gray"], "test": ["a/green", "b/blue"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "captions.csv").write_text("a/green,a green face\nb/blue,a blue face\n")
    named = {"--meshes": "meshes", "--split-file": "split.json", "--captions": "captions.csv"}
    return ["--suite=meshes", *(f"{flag}={tmp_path / name}" for flag, name in named.items())]


def test_meshes_of_the_test_split_are_measured(config_path, tetrahedra, tmp_path):
    flags = [*tetrahedra, "--parts=elevation", f"--out={tmp_path}/out", f"--config={config_path}"]
    evaluate.main(flags)
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert "meshes of files, split and captions" in result["about"][0]
    expected = [np.degrees(objects.elevation_rad(0, zlib.crc32(name))) for name in (b"a/green", b"b/blue")]
    found = [row["elevation_deg"] for row in result["elevation"]["objects"]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_objects_that_a_table_of_captions_leaves_out_are_named(tmp_path, capsys):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["b", "c"]}))
    (tmp_path / "captions.csv").write_text("a.glb;a cat\nc;\n")
    files = dict(captions=tmp_path / "captions.csv", split_file=tmp_path / "split.json", meshes=tmp_path)
    flags = Namespace(suite="meshes", up=UpAxis.Y, **files)
    found = command.load_objects(ConfigDict(dict(seed=0, size=32, num_views=4)), flags)
    assert found.captions["a"] == "a cat"
    assert "2 of 3 objects have no caption, as b" in capsys.readouterr().err


def test_true_views_of_meshes_are_those_of_the_split(tetrahedra, tmp_path, user_error):
    split = json.loads((tmp_path / "split.json").read_text())
    captions = {"a/green": "a green face"}
    meshes = MeshObjects(tmp_path / "meshes", captions, split, UpAxis.Y, seed=0, size=16, num_views=4)
    truth = meshes.render(5)
    assert truth.indices == [0, 1] and truth.captions == ["a green face", ""]
    assert truth.categories == ["a", "b"] and truth.rgb.shape == (2, 4, 16, 16, 3)
    inside = truth.alpha[..., 0] == 1
    assert (truth.rgb[0][inside[0]].argmax(-1) == 1).all() and (truth.rgb[1][inside[1]].argmax(-1) == 2).all()
    assert (truth.rgb[truth.alpha[..., 0] == 0] == 1).all()  # over white
    other = dataclasses.replace(meshes, split={"test": ["a/green", "c/gone"]})
    assert other.about != meshes.about
    before = meshes.about
    (tmp_path / "meshes/a/green.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    assert meshes.about != before
    with user_error("c/gone of the split 'test' is no mesh below"):
        other.render(1)
    with user_error("the split file has no 'train'"):
        other.render(1, objects.Split.TRAIN)


MISTAKES = {
    "--suite meshes": "--suite meshes needs --meshes and --split-file",
    "--captions captions.csv": "belong to --suite meshes",
    "--parts views,speed": "the parts are views,assets,prompts,elevation",
    "--parts=": "the parts are",
    "--num-objects 0": "--num-objects: '0' is not a whole number from 1",
    "--asset-objects -1": "--asset-objects: '-1' is not a whole number",
    "--suite huge": "huge",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line(flags, tmp_path, user_error):
    with user_error(MISTAKES[flags]):
        evaluate.main([*flags.split(), "--out", str(tmp_path / "out")])


def test_parts_come_in_their_own_order():
    assert command.parse_parts("elevation, views") == ["views", "elevation"]
