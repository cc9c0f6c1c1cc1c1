"""`im3d evaluate truth`, as a user calls it."""

import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from im3d_jax.main import run


@pytest.fixture
def meshes(tmp_path):
    for name in ("a/box", "a/bar", "b/slab"):
        path = tmp_path / "meshes" / f"{name}.stl"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box([1, 2, 3]).export(path)
    return tmp_path / "meshes"


def call(meshes, out, *flags):
    return run(["evaluate", "truth", f"--meshes={meshes}", "--size=32", "--up=z", f"--out={out}", *flags])


def names(out):
    return [item["name"] for item in json.loads((out / "truth.json").read_text())["objects"]]


def test_meshes_of_a_split_are_frozen_once(meshes, tmp_path, capsys):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["a/bar"], "test": ["b/slab", "a/box"]}))
    out = tmp_path / "out"
    assert call(meshes, out, f"--split-file={split}", "--protocol=sv3d-dynamic") == 0
    assert "2 objects, sv3d-dynamic, 32 px" in capsys.readouterr().out
    assert names(out) == ["a__box", "b__slab"]
    views = sorted((out / "objects" / "a__box" / "images").iterdir())
    assert len(views) == 21 and Image.open(views[0]).mode == "RGBA"
    given = np.asarray(Image.open(out / "inputs" / "a__box.png"))
    np.testing.assert_array_equal(given, np.asarray(Image.open(views[-1])))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert call(meshes, out, "--protocol=sv3d-dynamic") == 2
    assert "is frozen; choose another --out" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_so_many_are_taken_evenly(meshes, tmp_path):
    assert call(meshes, tmp_path / "two", "--num-objects=2") == 0
    assert names(tmp_path / "two") == ["a__bar", "b__slab"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-objects=4"], "--num-objects 4: there are 3"),
        (["--split-file=SPLIT", "--split=val"], "has no split 'val'"),
        (["--split-file=SPLIT"], "a/mug of the split 'test' is no mesh below"),
        (["--size=16"], "--size: '16' is not a whole number from 32 to 4096"),
        (["--protocol=sv3d"], "--protocol: invalid"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(meshes, tmp_path, capsys, flags, words):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"test": ["a/mug"]}))
    assert call(meshes, tmp_path / "new", *(flag.replace("SPLIT", str(split)) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_is_not_ours_is_not_replaced(meshes, tmp_path, capsys):
    own = tmp_path / "out" / "objects" / "a__box" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert call(meshes, tmp_path / "out") == 2
    assert "objects/a__box is not of an earlier run" in capsys.readouterr().err
    assert own.read_text() == "mine"
