"""What an earlier run wrote is replaced; a user's own files are refused by name, and never lost."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from recon_torch import locks, outputs
from recon_torch.errors import UserError
from recon_torch.files import TEMPORARY
from recon_torch.outputs import Kind

ASSET = Kind("generate", (r"asset\.ply", r"images/\d{3,}\.png", r"report\.json"))
RUN = Kind("train", ("checkpoints/", r"metrics\.jsonl", r"samples/\w+\.mp4"), grows=True)


def make(directory, kind=ASSET, **files):
    """A run of a command that writes files, by their paths with __ for / and _ for a dot."""
    with outputs.opened(directory, kind), outputs.owned(directory) as staging:
        for name, text in files.items():
            path = staging / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        outputs.replace(staging, directory, kind, "report.json")


def content(directory):
    """Path -> text of what is in a directory, without the marker."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != outputs.MARKER)
    return {path.relative_to(directory).as_posix(): path.read_text() for path in files}


def test_a_run_takes_the_place_of_an_earlier_one_and_leaves_the_rest(tmp_path):
    out = tmp_path / "new" / "out"
    make(out, asset_ply="1", images__000_png="1", images__001_png="1", report_json="1")
    theirs = {"notes.txt": "mine", "images/IMG_0001.jpg": "mine", "images/mine/000.png": "mine"}
    for name, text in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    make(out, asset_ply="2", images__000_png="2", report_json="2")
    assert content(out) == theirs | {"asset.ply": "2", "images/000.png": "2", "report.json": "2"}
    outputs.remove(out, ASSET, "report.json")
    assert content(out) == theirs and not (out / outputs.MARKER).exists()


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda out: (out / "images/007.png").write_text("mine"), "images/007.png is not of an earlier run"),
        (lambda out: (out / "asset.ply").write_text("edited"), "asset.ply .*was changed since"),
        (lambda out: shutil.rmtree(out / "images") or (out / "images").write_text(""), "images is no dir"),
        (lambda out: (out / "report.json").unlink() or (out / "report.json").mkdir(), "json is a directory"),
        (lambda out: (out / "images/008.png").symlink_to(out / "x"), "008.png is a symbolic link"),
        (
            lambda out: (
                shutil.move(out / "images", out.parent / "far")
                and (out / "images").symlink_to(out.parent / "far")
            ),
            "images is a symbolic link",
        ),
        (lambda out: (out / outputs.MARKER).write_text("{}"), "im3d.json is damaged or not ours"),
    ],
)
def test_what_is_not_ours_is_refused_by_name_before_anything_is_touched(tmp_path, prepare, problem):
    out = tmp_path / "out"
    make(out, asset_ply="1", images__000_png="1", report_json="1")
    prepare(out)
    before, names = content(tmp_path), sorted(os.walk(tmp_path))
    with pytest.raises(UserError, match=problem):
        make(out, asset_ply="2")
    with outputs.owned(tmp_path) as staging:
        (staging / "asset.ply").write_text("2")
        with pytest.raises(UserError, match=problem):  # it may come while the run is under way
            outputs.replace(staging, out, ASSET)
    assert content(tmp_path) == before and sorted(os.walk(tmp_path)) == names


def test_an_output_of_another_command_is_not_replaced(tmp_path):
    make(tmp_path, Kind("fit", ASSET.paths), asset_ply="1")
    with pytest.raises(UserError, match=r"asset.ply is of `im3d fit`"):
        make(tmp_path, asset_ply="2")


def test_inputs_are_not_replaced(tmp_path):
    make(tmp_path / "z", asset_ply="1", images__000_png="1")
    (tmp_path / "link").symlink_to(tmp_path / "z")
    (tmp_path / "z/images/mug.png").write_text("mine")
    outputs.check(tmp_path / "z", ASSET, [tmp_path / "z/images/mug.png", tmp_path / "images/000.png"])
    for given in (tmp_path / "z/images/000.png", tmp_path / "link/images/000.png"):
        with pytest.raises(UserError, match=f"{given} is what it is to read"):
            outputs.check(tmp_path / "z", ASSET, [given])


def test_no_link_leads_out_of_the_directory_that_was_named(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0001").symlink_to(tmp_path / "far")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    outputs.check(tmp_path / "link/0000", ASSET, root=tmp_path / "link")  # the user may name a link
    with pytest.raises(UserError, match=r"out/0001 is a symbolic link"):
        outputs.check(tmp_path / "out/0001/deep", ASSET, root=tmp_path / "out")


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_that_dies_between_the_renames_is_cleaned_up_by_the_next(tmp_path, monkeypatch, moved):
    """The files of both runs are known as ours, and the report does not stand for a mixture."""
    make(tmp_path, asset_ply="1", images__000_png="1", images__001_png="1", report_json="1")
    renamed, rename = [], os.replace

    def dies(source, target):
        if not Path(target).name.startswith("."):
            renamed.append(target)
            if len(renamed) > moved:
                raise KeyboardInterrupt  # no handler sees the death of a process; this is the nearest
        rename(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, asset_ply="2", images__000_png="2", report_json="2")
    monkeypatch.undo()
    assert "report.json" not in content(tmp_path) and len(content(tmp_path)) == moved
    make(tmp_path, asset_ply="3", report_json="3")
    assert content(tmp_path) == {"asset.ply": "3", "report.json": "3"}


def test_a_single_file_is_put_beside_the_others(tmp_path):
    make(tmp_path, asset_ply="1", report_json="1")
    for text in ("2", "3"):
        outputs.put(tmp_path, ASSET, "report.json", lambda path, text=text: path.write_text(text))
    (tmp_path / "input.png").write_text("mine")
    with pytest.raises(UserError, match="input.png is not of an earlier run"):
        outputs.put(tmp_path, ASSET, "input.png", lambda path: path.write_text("2"))
    assert content(tmp_path) == {"asset.ply": "1", "report.json": "3", "input.png": "mine"}
    make(tmp_path, asset_ply="4")
    assert content(tmp_path) == {"asset.ply": "4", "input.png": "mine"}


def test_errors_name_files_where_they_were_to_be(tmp_path, user_error):
    with user_error(f"cannot write {tmp_path}/images/000.png"), outputs.owned(tmp_path) as staging:
        raise UserError(f"cannot write {staging / 'images/000.png'} (No space left on device)")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: [OS error 28: No space left on device]"),
        RuntimeError("unable to resize file: File too large (27)"),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_one_line(tmp_path, user_error, error):
    """As the system, TensorStore and PyTorch say it, here as the cause of another error."""
    with user_error(f"cannot write into {tmp_path} \\("), outputs.owned(tmp_path):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the writer has failed") from cause
    with pytest.raises(RuntimeError, match="a bug"), outputs.owned(tmp_path):
        raise RuntimeError("a bug")
    assert not list(tmp_path.iterdir())


def test_what_grows_is_ours_in_a_directory_that_was_claimed(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/holiday video.mp4").write_text("mine")
    with outputs.opened(tmp_path, RUN):
        (tmp_path / "metrics.jsonl").write_text("1")
        (tmp_path / "checkpoints").mkdir()
    with outputs.opened(tmp_path, RUN):
        pass
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "samples/step.mp4"):
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is not of an earlier run"), outputs.opened(other, RUN):
            pass
        (other / name).unlink()


def test_a_directory_that_stays_empty_is_removed_with_those_above_it(tmp_path):
    for kind in (ASSET, RUN):
        with pytest.raises(ZeroDivisionError), outputs.opened(tmp_path / "a/b", kind):
            1 / 0  # noqa: B018
        assert not list(tmp_path.iterdir())
    with outputs.opened(tmp_path, RUN):  # it was there before
        pass
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_leftovers_are_cleared_where_the_run_writes(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "samples", tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        staging = locks.OwnedDirectory(TEMPORARY, folder)
        shutil.copytree(staging.path, folder / f"{TEMPORARY}dead")
        staging.cleanup()
    (tmp_path / "samples/step.mp4").touch()
    outputs.claim(tmp_path, RUN)
    with outputs.opened(tmp_path, RUN):
        assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    assert capsys.readouterr().err.count("what a killed run left") == 3
