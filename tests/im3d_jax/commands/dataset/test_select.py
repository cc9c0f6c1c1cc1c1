"""`im3d dataset select`: the names, the table and the sheet; resumed, with CLIP and without."""

import csv
import json
import shutil

import numpy as np
import pytest

from im3d_jax.commands.dataset import select
from im3d_jax.data import views
from im3d_jax.data.clip import Clip
from im3d_jax.data.measured import Measured, MeasuredFile
from im3d_jax.data.selection import Measures
from recon_torch.views import cameras
from recon_torch.views.images import read_image, to_uint8, write_image

pytestmark = pytest.mark.slow

RULES_OFF = ["--min-distance", "0", "--max-cosine", "0", "--min-thinnest", "0", "--min-coverage", "0"]


def write(root, name, widths, color, caption="a thing", more=None):
    rgba = np.zeros((4, 16, 16, 4))
    for view, width in enumerate(widths):
        rgba[view, 4:12, 2 : 2 + width, 3] = 1
    rgba[..., :3] = color
    views.write_object(root / name, rgba, cameras.orbit(4, 0.1, 16), caption, 0.1, more)


@pytest.fixture
def objects(tmp_path):
    """A thing of each kind, and a file that is no picture."""
    root = tmp_path / "views"
    write(root, "good/red", [9, 8, 9, 8], (0.8, 0.1, 0.1), "a cat", {"mesh_sha256": "11"})
    write(root, "good/red~1", [9, 8, 9, 8], (0.8, 0.1, 0.1), "a cat", {"mesh_sha256": "11"})
    write(root, "good/blue", [9, 8, 9, 8], (0.1, 0.1, 0.8), "", {"mesh_sha256": "22"})
    write(root, "copy", [5, 8, 5, 8], (0.1, 0.9, 0.8), "cat", {"mesh_sha256": "11"})
    write(root, "twin", [9, 8, 9, 8], (0.1, 0.11, 0.8), "b")
    write(root, "faint", [9, 8, 9, 8], (0.97, 0.97, 0.97), "b")
    write(root, "paper", [9, 0, 9, 0], (0.5, 0.5, 0.1), "b")
    write(root, "nothing", [0, 0, 0, 0], (0, 0, 0), "b")
    write(root, "broken", [9, 8, 9, 8], (0.5, 0.1, 0.7), "b")
    (root / "broken/images/002.png").write_text("no picture")
    return root


def table(out):
    with (out / "scores.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def chosen(out):
    return json.loads((out / "selection.json").read_text())


def test_rules_decide_without_a_clip(world, objects, tmp_path, capsys):
    out = tmp_path / "out"
    world.run("select", "--views", objects, "--out", out)
    rules = {name: row["rule"] for name, row in table(out).items()}
    expected = dict(copy="", twin="duplicate", faint="faint", paper="sheet", nothing="empty")
    expected |= {"good/blue": "", "good/red": "duplicate", "good/red~1": "duplicate", "broken": "unreadable"}
    assert rules == expected
    assert table(out)["good/red"]["detail"] == "same mesh file as copy"
    assert table(out)["twin"]["detail"].startswith("like good/blue: distance 0.0")
    assert chosen(out)["names"] == ["copy", "good/blue"]
    said = "2 of 9 objects are kept; 1 unreadable, 1 empty, 1 faint, 1 sheet, 3 duplicate"
    assert said in capsys.readouterr().out
    assert read_image(out / "sheet.png").shape[0] == 2 + 98 * (2 + 1 + 1 + 1 + 3)


def test_clip_decides_with_its_scores(world, objects, tmp_path, whole_clip, capsys):
    out = tmp_path / "out"
    arguments = ["--views", objects, "--model", whole_clip, "--out", out, "--keep", 0.5, *RULES_OFF]
    world.run("select", *arguments, "--min-contrast", 0, "--views-per-object", 2, "--batch-size", 3)
    clip, rows, scores = Clip(whole_clip), table(out), {}
    for name in ("good/red", "good/red~1", "copy", "twin", "faint", "paper", "nothing"):
        pictures = to_uint8(views.read_pictures(objects / name, 2))
        text, _ = clip.embed_captions([rows[name]["caption"]])
        cosines = np.concatenate([clip.embed_pictures([picture]) for picture in pictures]) @ text[0]
        scores[name] = 100 * cosines.mean()
        assert float(rows[name]["score"]) == pytest.approx(scores[name], abs=2e-3)
    assert rows["good/blue"]["rule"] == "no caption" and rows["good/blue"]["score"] == ""
    best = sorted(scores, key=lambda name: -scores[name])[:4]  # round(0.5 * 7), to even
    assert sorted(best) == chosen(out)["names"]
    assert "4 of 9 objects are kept; 1 unreadable, 1 no caption, 3 low score" in capsys.readouterr().out
    data = tmp_path / "data"
    shutil.rmtree(objects / "nothing")
    source = world.build(objects, data, "--selection", out / "selection.json")
    assert len(source) == len([name for name in best if name != "nothing"])


class Busy(Clip):
    """A CLIP that counts what it sees, and is interrupted after some calls."""

    calls, stop_after = 0, 99

    def embed_pictures(self, pictures):
        if Busy.calls == Busy.stop_after:
            raise KeyboardInterrupt
        Busy.calls += 1
        return super().embed_pictures(pictures)


def test_an_interrupted_run_goes_on(world, objects, tmp_path, whole_clip, monkeypatch):
    arguments = ["--views", objects, "--model", whole_clip, "--views-per-object", 2, "--batch-size", 2]
    world.run("select", *arguments, "--out", tmp_path / "whole")
    monkeypatch.setattr(select, "Clip", Busy)
    monkeypatch.setattr(Busy, "stop_after", 3)
    with pytest.raises(KeyboardInterrupt):
        world.run("select", *arguments, "--out", tmp_path / "out")
    (cache,) = (tmp_path / "out").glob("measured-*.jsonl")
    with cache.open("a") as file:
        file.write('{"name": "torn')
    monkeypatch.setattr(Busy, "stop_after", 99)
    monkeypatch.setattr(Busy, "calls", 0)
    world.run("select", *arguments, "--out", tmp_path / "out")
    assert Busy.calls == 8 - 3
    for name in ("scores.csv", "selection.json", "sheet.png", cache.name):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    picture = objects / "twin/images/001.png"
    write_image(picture, 0.9 * read_image(picture))
    monkeypatch.setattr(Busy, "calls", 0)
    world.run("select", *arguments, "--out", tmp_path / "out", "--min-contrast", 0.01)
    assert Busy.calls == 1  # of the object that has changed


def test_lines_hold_what_was_measured(tmp_path):
    small, embedding = np.arange(12, dtype=np.uint8), np.float32([0.6, -0.8])
    measured = Measured("a/b", "00", Measures(0.1, 0.2, 0.3, small), 21.5, embedding, True)
    with MeasuredFile(tmp_path / "file.jsonl") as file:
        file.add(measured)
    with MeasuredFile(tmp_path / "file.jsonl") as file:
        found = file.found["a/b"]
    assert (found.name, found.source, found.score, found.cut_off) == ("a/b", "00", 21.5, True)
    assert found.measures[:3] == (0.1, 0.2, 0.3)
    np.testing.assert_array_equal(found.measures.small, small)
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-3)


MISTAKES = {
    "share": (["--keep", 2], "--keep: '2' is not a number from 0 to 1"),
    "both": (["--keep", 0.5, "--min-score", 3], "not allowed with argument"),
    "model": (["--keep", 0.5], "need a --model"),
    "negative": (["--min-distance", -1], "--min-distance: '-1' is not a number from 0 to 1"),
    "strict": (["--min-coverage", 0.9], "no object is left of 9; .*scores.csv says why"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, world, objects, tmp_path, user_error):
    arguments, message = MISTAKES[mistake]
    with user_error(message):
        world.run("select", "--views", objects, "--out", tmp_path / "out", *arguments)
