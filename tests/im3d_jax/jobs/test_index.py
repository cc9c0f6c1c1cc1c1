"""The table of a batch, read with pyarrow and compared with the reports as plain JSON has them."""

import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from pyarrow import parquet

from im3d_jax import main
from im3d_jax.jobs import index, publish, rows, storage
from im3d_jax.jobs.index import Index
from im3d_jax.jobs.publish import Publisher
from recon_torch import locks
from recon_torch.errors import UserError


def make_report(number, **changes):
    """A report whose numbers follow from `number`."""
    return {
        "prompt": f"thing {number}",
        "image_digest": "",
        "seed": number,
        "given_elevation_deg": None if number % 2 else 0.1 * number,
        "config_digest": "abc",
        "image": "",
        "quality": {"verdict": ("good", "bad")[number % 2], "reasons": ["why"] * (number % 3), "hints": []},
        "rounds": [{"psnr": 1.0}, {"until_step": 9, "psnr": 20 + number / 7, "ssim": 1 / (number + 1)}],
        "node": f"node{number % 2}",
        "seconds": {"fit": 0.1 * number, "total": 1.5 * number},
    } | changes


def put(out, number, told, name="report.json"):
    directory = out / "assets" / f"{number:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(told))
    return directory / name


@pytest.fixture
def out(tmp_path):
    """A batch of 20 assets, of which each fifth has failed."""
    for number in range(20):
        told = {"prompt": "x", "image": "a.png", "seed": 3, "error": f"why {number}", "node": "n"}
        failed = number % 5 == 4
        put(
            tmp_path,
            number,
            told if failed else make_report(number),
            f"{'error' if failed else 'report'}.json",
        )
    (tmp_path / "assets/000002/asset.html").touch()
    return tmp_path


def write(out):
    index = Index(out).refresh()
    with index.held():
        index.write()
    return index


@pytest.fixture
def reads(monkeypatch):
    """The paths of what is read of reports."""
    found = []

    def spy(path, *arguments, **keywords):
        found.append(os.path.relpath(path, os.path.dirname(os.path.dirname(path))))
        return open(path, *arguments, **keywords)

    monkeypatch.setattr(rows, "open", spy, raising=False)
    return found


def test_the_table_says_what_the_reports_say(out):
    write(out)
    rows = {row["path"]: row for row in parquet.read_table(out / "index.parquet").to_pylist()}
    assert list(rows) == [f"assets/{number:06d}" for number in range(20)]
    for path, row in rows.items():
        failed = (out / path / "error.json").exists()
        file = out / path / ("error.json" if failed else "report.json")
        told = json.loads(file.read_text())
        assert (row["name"], row["size"]) == (path[7:], file.stat().st_size)
        assert row["mtime_ns"] == file.stat().st_mtime_ns
        assert {key: row[key] for key in ("prompt", "image", "seed", "node")} == {
            key: told[key] for key in ("prompt", "image", "seed", "node")
        }
        assert row["has_page"] == (path == "assets/000002")
        if failed:
            assert (row["verdict"], row["error"], row["psnr"]) == ("failed", told["error"], None)
            continue
        assert (row["verdict"], row["reasons"]) == (told["quality"]["verdict"], told["quality"]["reasons"])
        assert {"until_step": 9, "psnr": row["psnr"], "ssim": row["ssim"]} == told["rounds"][-1]
        assert {"total": row["seconds"], "fit": row["seconds_fit"]} == told["seconds"]
        for key in ("image_digest", "given_elevation_deg", "config_digest"):
            assert row[key] == told[key]


def test_rows_come_back_as_they_were_and_nothing_is_read_again(out, reads):
    before = write(out).rows
    assert len(reads) == 20
    again = Index(out).refresh()
    assert again.rows == before and len(reads) == 20
    assert [row.name for row in again.in_order()] == [f"{number:06d}" for number in range(20)]


def test_only_what_has_changed_is_read_again(out, reads):
    write(out)
    reads.clear()
    put(out, 0, make_report(0, prompt="another prompt"))
    times = (out / "assets/000001/report.json").stat()
    os.utime(out / "assets/000001/report.json", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    shutil.rmtree(out / "assets/000002")
    put(out, 30, make_report(30))
    (out / "assets/000004/error.json").unlink()
    put(out, 4, make_report(4))  # it has failed before
    (out / "assets/000005/asset.html").touch()
    (out / "assets/000006").rename(out / "assets/000031")
    rows = Index(out).refresh().rows
    changed = (0, 1, 4, 30, 31)
    assert sorted(reads) == [f"{number:06d}/report.json" for number in changed]
    assert rows["000000"].prompt == "another prompt" and rows["000004"].verdict == "good"
    assert rows["000005"].has_page and not rows["000001"].has_page
    assert "000002" not in rows and "000006" not in rows and rows["000031"].prompt == "thing 6"


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("name,verdict\n000000,good\n"),
    "another table": lambda path: parquet.write_table(pa.table({"name": ["000000"]}), path),
    "another version": lambda path: parquet.write_table(
        parquet.read_table(path).replace_schema_metadata({"im3d.index": "0"}), path
    ),
    "another type": lambda path: parquet.write_table(
        parquet.read_table(path).set_column(0, "name", pa.array(range(20))), path
    ),
    "no column": lambda path: parquet.write_table(parquet.read_table(path).drop_columns(["size"]), path),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_anew(out, damage, reads, capsys):
    before = write(out).rows
    DAMAGES[damage](out / "index.parquet")
    reads.clear()
    assert main.run(["batch", "--summarize", str(out)]) == 0
    assert len(reads) == 20 and capsys.readouterr().err == ""
    assert index.load(out / "index.parquet") == before


def test_no_damaged_byte_changes_a_row(out):
    """Some bytes, such as those of statistics, say nothing of the rows; with any other the table is none."""
    before = write(out).rows
    whole = (out / "index.parquet").read_bytes()
    found = []
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (out / "index.parquet").write_bytes(damaged)
        found.append(index.load(out / "index.parquet"))
    assert all(rows in (None, before) for rows in found) and found.count(None) > len(found) / 2


def test_rows_that_lead_elsewhere_or_cannot_be_are_not_taken(out):
    rows = write(out).in_order()
    put(out / "elsewhere", 0, make_report(0))
    unsound = [
        rows[0]._replace(name="../elsewhere/assets/000000"),
        rows[1]._replace(verdict="<script>"),
        rows[2]._replace(scores={}),
        rows[3]._replace(seconds={}),
    ]
    table = index.to_table([*unsound, *rows[5:]])
    parquet.write_table(table, out / "index.parquet")
    assert sorted(index.load(out / "index.parquet")) == [row.name for row in rows[5:]]
    assert Index(out).refresh().in_order() == rows


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": [{"psnr": 1e999}]},
        {"rounds": [{"psnr": "20"}]},
        {"rounds": [{"psnr": 10**400}]},
        {"seconds": {"total": float("nan")}},
        {"tries": []},
        {"quality": {"verdict": "none", "reasons": [], "hints": []}},
    ],
)
def test_a_report_that_is_not_whole_has_no_row(tmp_path, changes):
    put(tmp_path, 0, make_report(0, **changes))
    assert Index(tmp_path).refresh().rows == {}
    put(tmp_path, 0, {"error": "why"}, "error.json")
    assert Index(tmp_path).refresh().rows["000000"].error == "why"


def test_what_is_strange_in_a_report_does_not_spoil_the_table(tmp_path):
    strange = {
        "psnr": 20.0,
        "seconds_fit": 1.0,
        "name": 2.0,
        "a b": 3.0,
        "x" * 99: 4.0,
        "ssim": math.inf,
        "lpips": {},
    }
    put(tmp_path, 0, make_report(0, rounds=[strange], seed=2**70, prompt="half \ud800", node=None))
    put(tmp_path, 1, make_report(1, prompt=None, image=["x"], seconds={"total": 1, "total_": 2, "fit": "3"}))
    before = write(tmp_path).rows
    assert before["000000"].scores == {"psnr": 20.0}
    assert (before["000000"].seed, before["000000"].prompt) == (None, "half ?")
    assert before["000001"].seconds == {"total": 1.0, "total_": 2.0}
    assert index.load(tmp_path / "index.parquet") == before


def test_deep_json_and_pipes_are_passed_over(tmp_path):
    put(tmp_path, 0, make_report(0)).write_text("[" * 100_000)
    (tmp_path / "assets/000001").mkdir()
    os.mkfifo(tmp_path / "assets/000001/report.json")
    assert Index(tmp_path).refresh().rows == {}


# ---- Several writers ----


def test_no_row_is_lost_among_several_writers(tmp_path):
    """Three shards, whose locks are their own as those of processes are, write the table after each asset.

    None of them looks at the whole directory, so that each row of another must have come through the table.
    """
    (tmp_path / "assets").mkdir()
    together = threading.Barrier(3)

    def shard(number):
        own = Index(tmp_path).refresh()
        together.wait()
        for made in range(number, 24, 3):
            put(tmp_path, made, make_report(made))
            own.look(f"{made:06d}")
            with own.held():
                own.write()

    with ThreadPoolExecutor(3) as shards:
        list(shards.map(shard, range(3)))
    found = parquet.read_table(tmp_path / "index.parquet").to_pylist()
    assert [row["name"] for row in found] == [f"{number:06d}" for number in range(24)]
    assert [row["prompt"] for row in found] == [f"thing {number}" for number in range(24)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".im3d.json", "assets", "index.parquet"]


def test_the_newer_of_two_rows_stays_whoever_writes_last(out):
    late = Index(out).refresh()
    put(out, 0, make_report(0, prompt="another"))
    write(out)
    with late.held():
        late.write()
    assert late.rows["000000"].prompt == "another"
    assert index.load(out / "index.parquet")["000000"].prompt == "another"


def test_a_driver_adds_rows_that_it_has_from_elsewhere(out):
    own = Index(out).refresh()
    row = rows.read(out / "assets/000000")._replace(name="000077")
    own.add(row)
    with own.held():
        own.write()
    assert index.load(out / "index.parquet")["000077"] == row


# ---- While the job runs ----


def names(out):
    return sorted(index.load(out / "index.parquet") or {})


def test_table_summary_and_gallery_are_written_while_assets_are_made(out, monkeypatch):
    now = 0.0
    monkeypatch.setattr(publish.time, "monotonic", lambda: now)
    publisher = Publisher(Index(out).refresh(), period_s=60.0)
    publisher.tell("000000")
    assert not (out / "index.parquet").exists()
    now = 61.0
    put(out, 40, make_report(40))
    publisher.tell("000040")
    assert "000040" in names(out)
    assert json.loads((out / "summary.json").read_text())["num_assets"] == 17
    assert "thing 40" in (out / "gallery.html").read_text()
    now = 100.0
    put(out, 41, make_report(41))
    publisher.tell("000041")
    assert "000041" not in names(out)
    now = 122.0
    publisher.write_if_due()
    assert "000041" in names(out)


def test_what_is_in_the_way_of_the_table_does_not_end_a_batch(out, monkeypatch, capsys):
    def refuse(path):
        raise UserError(f"cannot write {path} (No space left on device); choose another place")

    publisher = Publisher(Index(out).refresh(), period_s=0.0)
    monkeypatch.setattr(index, "replacing", refuse)
    publisher.tell("000000")
    assert (
        "index.parquet (No space left on device)" in (error := capsys.readouterr().err)
        and error.count("\n") == 1
    )


def test_another_writer_is_not_waited_for_until_the_end(out, monkeypatch, capsys):
    publisher = Publisher(Index(out).refresh(), period_s=0.0)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)
    holder = os.open(out / storage.LOCK, os.O_RDWR | os.O_CREAT)
    locks.lock_file(holder)
    publisher.tell("000000")
    assert not (out / "index.parquet").exists() and capsys.readouterr().err == ""
    monkeypatch.setattr(publish, "PATIENCE_S", 0.0)
    assert "in use by another process" in publisher.finish()
    os.close(holder)
    assert "gallery.html" in publisher.finish() and len(names(out)) == 20
