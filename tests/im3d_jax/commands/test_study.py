"""`im3d study` from end to end, and the one line of each mistake."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from im3d_jax import main
from tests.im3d_jax.study.conftest import write_test_video
from tests.im3d_jax.study.test_mturk import write_results


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two methods, of which the second lacks a prompt."""
    root = tmp_path_factory.mktemp("outputs")
    for method, names in {"ours": ("a_mug", "a_car"), "base": ("A mug",)}.items():
        (root / method).mkdir()
        for name in names:
            write_test_video(root / method / f"{name}.mp4")
    return root


@pytest.fixture(scope="module")
def study(outputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "study"
    given = [f"ours={outputs / 'ours'}", f"base={outputs / 'base'}"]
    assert main.run(["study", "new", *given, "--out", str(path), "--checks", "0.5"]) == 0
    return path


def test_help_loads_neither_frameworks_nor_the_extra():
    script = (
        "import sys, im3d_jax.main as m; m.run(['study', '--help']);"
        "sys.exit(any(n in sys.modules for n in ('jax', 'torch', 'numpy', 'sqlalchemy', 'starlette')))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(f"im3d study {name}" in said for name in ("new", "serve", "export", "import", "results"))


def test_a_study_by_way_of_mechanical_turk(study, tmp_path, capsys):
    from im3d_jax.study import plan

    url = "https://host/study"
    assert main.run(["study", "export", str(study), "--video-url", url, "--per-hit", "1"]) == 0
    assert "publish 5 assignments per HIT" in capsys.readouterr().out
    assert (study / "mturk/layout.html").is_file()
    write_results(tmp_path / "results.csv", plan.read(study), "flat", per_hit=1, workers=["A", "B", "C"])
    for new in (12, 0):  # an item and a check in each of two HITs, by three workers
        assert main.run(["study", "import", str(study), str(tmp_path / "results.csv")]) == 0
        assert f" {new} answers are new, {12 - new} were there" in capsys.readouterr().out
    assert main.run(["study", "results", str(study), "--min-passed", "0"]) == 0
    assert "ours against base, quality: preferred in" in capsys.readouterr().out
    found = json.loads((study / "results/results.json").read_text())
    assert found["num_answers"] == 6 and found["num_annotators"] == 3
    assert found["left_out"] == ["base lacks 1 prompt (a car) of 2"]
    assert (study / "results/figure.pdf").read_bytes().startswith(b"%PDF")


MISTAKES = {
    "new ours={o}/ours --out {t}/x": "a study compares two methods or more",
    "new ours={o}/ours base={o}/nowhere --out {t}/x": "base: .*nowhere is no directory",
    "new ours={o}/ours base={t} --out {t}/x": "base: .* has no assets of im3d, folders of pictures, videos, ",
    "new ours={o}/ours {o}/base --out {t}/x": "is not NAME=DIR",
    "new ours={o}/ours base={o}/base --out {s}": "has a study already",
    "new ours={o}/ours base={o}/base --out {t}/x --pictures {t}/none": "--pictures .* is no directory",
    "new ours={o}/ours base={t}/broken --out {t}/x": "cannot be read as a video",
    "new ours={o}/ours base={t}/others --out {t}/x": "have no prompt in common",
    "serve {t}": "has no study.json",
    "serve {s} --database sqlite:///{t}/other/answers.sqlite": "other/answers.sqlite cannot be used",
    "serve {s} --database nonsense": "--database is no URL",
    "results {s} --database sqlite:///{t}/none.sqlite": "none.sqlite does not exist",
    "export {s} --video-url http://host": "is no https:// address",
    "import {s} {t}/table.csv": "has no column WorkerId",
    "import {s} {t}/none.csv": "none.csv cannot be read",
    "nwe": "im3d study has no 'nwe'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(words, study, outputs, tmp_path, capsys):
    for name in ("broken", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/a_mug.mp4").write_bytes(b"no video")
    shutil.copy(outputs / "base/A mug.mp4", tmp_path / "others/something else.mp4")
    (tmp_path / "table.csv").write_text("prompt,winner\n")
    before = sorted(tmp_path.rglob("*"))
    argv = words.format(o=outputs, s=study, t=tmp_path).split()
    assert main.run(["study", *argv]) == 2
    told = capsys.readouterr()
    [line] = [each for each in told.err.splitlines() if not each.startswith("videos")]
    assert re.search(MISTAKES[words], line) and line.startswith("im3d: error: ")
    assert sorted(tmp_path.rglob("*")) == before
