"""What a batch began as, and which later calls are the same job."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from im3d_jax.jobs import job, prompt_files
from im3d_jax.jobs.index import Index
from im3d_jax.jobs.job import Job, read_job
from recon_torch.errors import UserError

LINES = ['"a duck"', '{"image": "pics/a.png", "seed": 3}', '{"prompt": "b", "elevation_deg": 20}']


def write(folder, lines, name="prompts.jsonl"):
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    (folder / "pics/a.png").touch()
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def read(path, num_assets=1, seed=0):
    return read_job(prompt_files.read(path), path, num_assets, seed)


def keep(out, path, num_assets=1, seed=0, overwrite=False):
    with Index(out).held():
        job.keep(out, read(path, num_assets, seed), path, overwrite)
    return json.loads((out / "job.json").read_text())


def test_the_file_says_what_was_asked_for(tmp_path):
    told = keep(tmp_path, write(tmp_path, LINES), num_assets=2, seed=5)
    entries = [["a duck", [], None, None, []], ["", ["pics/a.png"], 3, None, []], ["b", [], None, 20.0, []]]
    lines = [json.dumps(each).encode() for each in entries]
    assert told.pop("began").startswith("20")
    assert told == {
        "num_entries": 3,
        "digest": hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest(),
        "entries": "".join(hashlib.sha256(line).hexdigest()[:8] for line in lines),
        "num_assets": 2,
        "seed": 5,
    }


def test_the_same_prompts_are_the_same_job_wherever_and_however_they_are_written(tmp_path, monkeypatch):
    path = write(tmp_path / "here", LINES)
    began = keep(tmp_path, path)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    same = [*LINES[:2], '{"elevation_deg": 20.0, "prompt": "b", "seed": null}']
    for each in (path, tmp_path / "there/prompts.jsonl", write(tmp_path / "here", same, "b.jsonl")):
        assert keep(tmp_path, each) == began
    assert keep(tmp_path, Path("prompts.jsonl")) == began


def test_a_seed_counts_only_where_an_entry_names_none(tmp_path):
    path = write(tmp_path, [LINES[1]])
    assert keep(tmp_path, path, seed=1) == keep(tmp_path, path, seed=2)
    assert keep(tmp_path, write(tmp_path, [LINES[1], LINES[0]]), seed=3)["seed"] == 3
    with pytest.raises(UserError, match="--seed has changed .*, from 3 to 4"):
        keep(tmp_path, write(tmp_path, [LINES[1], LINES[0]]), seed=4)


def test_more_assets_of_the_only_entry_are_more_at_the_end(tmp_path):
    keep(tmp_path, write(tmp_path, LINES[:1]), num_assets=2)
    path = write(tmp_path, LINES)
    assert keep(tmp_path, path, num_assets=3)["num_assets"] == 3
    for number in (2, 4):
        with pytest.raises(UserError, match="--num-assets has changed"):
            keep(tmp_path, path, num_assets=number)


def test_overwriting_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(job.time, "strftime", lambda _: "2026-01-01 00:00:00")
    keep(tmp_path, write(tmp_path, LINES))
    monkeypatch.setattr(job.time, "strftime", lambda _: "2026-02-02 00:00:00")
    assert keep(tmp_path, write(tmp_path, LINES), overwrite=True)["began"] == "2026-01-01 00:00:00"
    path = write(tmp_path, LINES[1:])
    assert keep(tmp_path, path, overwrite=True)["began"] == "2026-02-02 00:00:00"
    assert keep(tmp_path, path)["num_entries"] == 2


def test_of_two_that_begin_together_the_second_is_refused(tmp_path):
    paths = [write(tmp_path, [line], f"{i}.jsonl") for i, line in enumerate(LINES)]
    for path in paths:
        job.check(tmp_path, read(path), path, False)
    with ThreadPoolExecutor(3) as threads:
        errors = [each.exception() for each in [threads.submit(keep, tmp_path, path) for path in paths]]
    assert sum(error is None for error in errors) == 1
    assert all("entry 1 is another" in str(error) for error in errors if error)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"began": 3}', None])
def test_a_damaged_file_is_written_anew_with_a_warning(tmp_path, content, capsys):
    path = write(tmp_path, LINES)
    began = keep(tmp_path, path)
    damaged = json.dumps(began | {"num_entries": 7}) if content is None else content
    (tmp_path / "job.json").write_text(damaged)
    other = write(tmp_path, LINES[1:])
    job.check(tmp_path, read(other), other, False)
    assert capsys.readouterr().err == ""
    assert Job(**keep(tmp_path, other)).num_entries == 2
    assert (error := capsys.readouterr().err).count("\n") == 1 and "job.json is damaged" in error


def test_a_file_of_a_users_is_not_replaced(tmp_path):
    (tmp_path / "job.json").write_text("mine")
    with pytest.raises(UserError, match="job.json is not of an earlier run"):
        keep(tmp_path, write(tmp_path, LINES))
    assert (tmp_path / "job.json").read_text() == "mine"
