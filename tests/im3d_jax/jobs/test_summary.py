"""What a batch has and lacks, in summary.json and on one screen."""

import json
import os
import socket

import pytest

from im3d_jax import main
from im3d_jax.jobs import publish
from im3d_jax.jobs.index import Index
from im3d_jax.jobs.summary import Asked, read_asked
from recon_torch import locks


def make_batch(out, made, failed=()):
    """A batch in which these numbers are made, and those have failed."""
    for number in (*made, *failed):
        directory = out / "assets" / f"{number:06d}"
        directory.mkdir(parents=True)
        quality = {"verdict": "good", "reasons": [], "hints": []}
        report = {"quality": quality, "rounds": [{"psnr": 20.0}], "seconds": {"total": 30.0}}
        told, name = ({"error": "why"}, "error.json") if number in failed else (report, "report.json")
        (directory / name).write_text(json.dumps(told))
    return out


def write(out, asked=None):
    return publish.write(Index(out).refresh(), asked)


def status(out, capsys):
    """(exit code, lines) of `im3d batch --status`."""
    try:
        code = main.run(["batch", "--status", str(out)])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().out.splitlines()


def test_the_summary_names_what_is_missing(tmp_path):
    make_batch(tmp_path, made=[0, 1, 4, 11], failed=[5])  # 11 is of an earlier, larger batch
    write(tmp_path, Asked(8, 4))
    for _ in range(2):  # later calls know it from the first
        told = json.loads((tmp_path / "summary.json").read_text())
        counts = {name: told[f"num_{name}"] for name in ("asked", "shards", "assets", "failed", "missing")}
        assert counts == {"asked": 8, "shards": 4, "assets": 4, "failed": 1, "missing": 4}
        assert told["missing"] == ["000002", "000003", "000006", "000007"]
        assert "4 of the batch's 8 assets are missing; see" in write(tmp_path)


def test_a_million_missing_assets_are_counted_and_the_first_are_named(tmp_path):
    write(make_batch(tmp_path, made=[0]), Asked(1_000_000, 16))
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["num_missing"] == 999_999 and len(told["missing"]) == 1000


def test_a_screen_shows_shards_that_are_at_work_and_lost(tmp_path, capsys):
    make_batch(tmp_path, made=[0, 4, 1, 2, 6], failed=[5])
    write(tmp_path, Asked(8, 4))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / ".im3d-1-of-4.lock").write_text("")  # of a process that was killed
    with locks.hold_part(tmp_path, 3, 4):
        code, lines = status(tmp_path, capsys)
    assert code == 1
    assert lines[0] == f"{tmp_path}: 5 of 8 made (5 good, 0 suspect, 0 bad), 1 failed, 2 missing"
    rows = [line.split(maxsplit=4) for line in lines[2:4]]
    assert [row[:4] for row in rows] == [["3/4", "0", "0", "2"], ["1/4", "1", "1", "0"]]
    assert rows[0][4].startswith(f"process {os.getpid()} on {socket.gethostname()} since")
    assert rows[1][4] == "nobody works on it"
    assert lines[4:] == ["2 of 4 shards are whole", "000005 failed: why", "missing: 000003, 000007"]
    (tmp_path / ".im3d-1-of-4.lock").unlink()
    assert before == {path: path.read_bytes() for path in before}


def test_a_screen_stays_one_however_much_is_missing(tmp_path, capsys):
    make_batch(tmp_path, made=[0], failed=range(1, 200))
    write(tmp_path, Asked(100_000, 64))
    code, lines = status(tmp_path, capsys)
    assert code == 1 and len(lines) <= 24 and max(map(len, lines[1:])) <= 120
    assert "... and 56 more" in lines and "... and 191 more" in lines and lines[-1].endswith("000207, ...")


@pytest.mark.parametrize(("made", "asked", "code"), [([0, 1], Asked(2, 1), 0), ([0, 1], None, 1)])
def test_only_a_batch_that_is_known_to_be_whole_is_a_success(tmp_path, capsys, made, asked, code):
    make_batch(tmp_path, made)
    write(tmp_path, asked)
    found, lines = status(tmp_path, capsys)
    assert found == code
    assert ("0 missing" if asked else "it is not known how many were asked for") in lines[0]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"num_asked": "2", "num_shards": 1}', '{"num_asked": -1}']
)
def test_a_summary_that_does_not_say_it_is_no_answer(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    assert read_asked(tmp_path) is None


def test_a_status_of_no_batch_is_refused(tmp_path, capsys):
    assert main.run(["batch", "--status", str(tmp_path)]) == 2
    assert "no batch in" in capsys.readouterr().err
