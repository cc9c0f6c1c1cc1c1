"""`im3d evaluate views3d`, as a user calls it: its files, and what it says of what is wrong."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image

from im3d_jax.main import run


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Two boxes, of 21 views of 32 px."""
    root = tmp_path_factory.mktemp("truth")
    for name, extents in {"long": [3, 1, 2], "flat": [2, 2, 0.5]}.items():
        trimesh.creation.box(extents).export(root / f"{name}.stl")
    out = root / "truth"
    flags = ["--size=32", "--up=z", "--protocol=sv3d-static"]
    assert run(["evaluate", "truth", f"--meshes={root}", f"--out={out}", *flags]) == 0
    return out


@pytest.fixture
def methods(truth, tmp_path):
    """The true views, and the same moved by a pixel, as pictures without alpha."""
    for folder in (truth / "objects").iterdir():
        shutil.copytree(folder / "images", tmp_path / "copy" / folder.name)
        (tmp_path / "moved" / folder.name).mkdir(parents=True)
        for path in (folder / "images").iterdir():
            white = Image.new("RGBA", (32, 32), "white")
            white.alpha_composite(Image.open(path))
            moved = np.roll(np.asarray(white.convert("RGB")), 1, 1)
            Image.fromarray(moved).save(tmp_path / "moved" / folder.name / path.name)
    return tmp_path


def call(truth, methods, *flags, names=("copy", "moved"), out="out"):
    given = [f"--method={name}={methods / name}" for name in names]
    return run(["evaluate", "views3d", f"--truth={truth}", f"--out={methods / out}", *given, *flags])


def test_methods_are_compared(truth, methods, capsys):
    assert call(truth, methods) == 0
    table = (methods / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| copy, renders | 2 | 99.00 ± 0.00 [99.00, 99.00] |" in table
    assert "| copy, renders less moved, renders | 2 |" in table and "LPIPS is left out" in table
    found = json.loads((methods / "out" / "results.json").read_text())
    assert found["command"] == "views3d" and len(found["rows"]) == 4
    assert found["protocol"]["views"]["protocol"] == "sv3d-static"
    assert [len(each["scores"]["psnr"]) for each in found["per_view"]] == [20] * 4
    psnr = {(each["method"], each["score"]): each for each in found["summary"]}["moved, renders", "psnr"]
    assert 10 < psnr["interval"][0] <= psnr["mean"] <= psnr["interval"][1] < 40
    sheet = Image.open(methods / "out" / "sheet.png")
    assert sheet.height > 6 * 96


def test_what_lacks_is_named_and_counted(truth, methods, capsys):
    (methods / "copy" / "long" / "004.png").unlink()
    (methods / "moved" / "flat" / "004.png").write_bytes(b"no picture")
    shutil.copytree(methods / "moved" / "long", methods / "moved" / "stranger")
    assert call(truth, methods) == 0
    told = capsys.readouterr().err
    for words in (
        "copy, renders: left out, number of views: 1 name (long)",
        "moved, renders: left out, unreadable: 1 name (flat)",
        "moved, renders: left out, not asked for: 1 name (stranger)",
    ):
        assert f"im3d: {words}" in told and words in (methods / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "flags", "words"),
    [
        (
            lambda truth, _: (truth / "objects/flat/images/020.png").write_bytes(b""),
            (),
            "020.png was changed",
        ),
        (lambda truth, _: (truth / "truth.json").unlink(), (), "has no truth.json"),
        (lambda _, methods: shutil.rmtree(methods / "copy"), (), "is no directory"),
        (
            lambda _, methods: [path.unlink() for path in methods.glob("copy/*/007.png")],
            (),
            "nothing is left to score (copy, renders: left out, number of views: 2 names",
        ),
        (lambda *_: None, ["--f-thresholds=0.1,2"], "is not numbers above 0 and at most 1"),
        (
            lambda *_: None,
            ["--lpips-net=squeeze", "--lpips-weights=nowhere.pth"],
            "LPIPS weights nowhere.pth do not exist",
        ),
        (lambda *_: None, ["--align=all"], "--align: invalid"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(truth, methods, capsys, spoil, flags, words):
    there = methods / "truth"
    shutil.copytree(truth, there)
    spoil(there, methods)
    assert call(there, methods, *flags, names=["copy"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("im3d: error: ") and words in last
    assert not (methods / "out").exists()
