"""What `im3d batch` refuses, before it makes or replaces anything."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from im3d_jax import main
from im3d_jax.jobs import batch
from im3d_jax.jobs.making import InProcess
from im3d_jax.jobs.stop import Stop
from recon_torch import locks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]


def test_a_step_of_which_slurm_says_too_little_is_one_line(command, quick, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert command(prompts=["a", "b"]) == 2
    assert "give --shard I/N" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize("name", ["report.json/x", "asset.ply", "images/000.png", "error.json"])
def test_a_file_of_a_users_among_the_assets_is_refused_before_any_work(
    command, quick, tmp_path, name, capsys
):
    mine = tmp_path / "out/assets/000001" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert command(prompts=["a", "b"]) == 2
    assert str(mine.parent if "x" in name else mine) in capsys.readouterr().err and not quick.made
    assert mine.read_text() == "mine" and [path.name for path in (tmp_path / "out").iterdir()] == ["assets"]


def test_no_link_leads_out_of_the_batch_and_no_input_is_replaced(command, quick, pictures, tmp_path, capsys):
    (tmp_path / "far").mkdir()
    (tmp_path / "out/assets").mkdir(parents=True)
    (tmp_path / "out/assets/000001").symlink_to(tmp_path / "far")
    assert command(prompts=["a", "b"]) == 2
    assert "000001 is a symbolic link" in capsys.readouterr().err
    (tmp_path / "out/assets/000001").unlink()
    pictures[0].rename(tmp_path / "out/assets/ball.png")
    assert command(prompts=["a", {"image": "out/assets/ball.png"}]) == 2
    assert "ball.png is what it is to read" in capsys.readouterr().err and not quick.made


def test_a_shard_at_work_keeps_the_same_and_overlapping_ones_out(command, quick, monkeypatch, tmp_path):
    """While shard 0/2 makes its first asset, another thread, whose locks are its own, gives commands."""
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)
    codes = {}

    def others(show):
        quick.happens.clear()
        stop = Stop()
        with ThreadPoolExecutor(1) as thread:
            for shard in ("0/2", "2/4", "0/1", "1/2"):
                asked = batch.Batch(tmp_path / "prompts.jsonl", tmp_path / "out", shard)
                making = InProcess(lambda: quick)
                run = thread.submit(batch.run, asked, quick.settings, making, stop)
                codes[shard] = str(run.exception() or run.result())

    quick.happens = {"a": others}
    assert command("--shard", "0/2", prompts=["a", "b", "c", "d"]) == 0
    assert codes.pop("1/2") == "0" and sorted(quick.made) == ["a", "b", "c", "d"]
    assert all(f"process {os.getpid()} on" in message for message in codes.values())


@pytest.mark.parametrize(
    "prompts, flags, words",
    [
        (["a", "x"], (), "prompt"),
        (["a", "b"], ("--seed", 1), "seed"),
        (["a", {"prompt": "b", "elevation_deg": 3}], (), "given_elevation_deg"),
        (["a", "b"], ("--config.video.w_text=2.5",), r"config (config.video.w_text 1.0, now 2.5);"),
        (["a", {"prompt": "b", "image": "ball.png"}], (), "image_digest"),
    ],
)
def test_an_asset_of_something_else_is_an_error_before_any_work(
    prompts, flags, words, command, quick, pictures, tmp_path, capsys
):
    assert command(prompts=["a", "b"]) == 0
    (tmp_path / "out/job.json").unlink()  # as in batches of earlier versions
    quick.made.clear()
    assert command(*flags, prompts=prompts) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"made from another {words}" in message and "--overwrite" in message and not quick.made
    assert command(*flags, "--overwrite", prompts=prompts) == 0
    assert quick.made == (["a", "b"] if "config" in words or "seed" in words else [prompts[1]["prompt"]
                          if isinstance(prompts[1], dict) else "x"])  # fmt: skip
    assert command(*flags) == 0


@pytest.mark.parametrize(
    "prompts, flags, words, made",
    [
        (["a", "x", "c"], (), "prompts.jsonl has changed {}: entry 2 is another;", ["x", "c"]),
        (["b", "a"], (), "prompts.jsonl has changed {}: entry 1 is another;", ["b", "a"]),
        (["a"], (), "prompts.jsonl has changed {}: it has 1 entries, and had 2;", []),
        (["a", "b"], ("--seed", 1), "--seed has changed {}, from 0 to 1;", ["a", "b"]),
        (["a", "b"], ("--num-assets", 2), "--num-assets has changed {}, from 1 to 2;", ["a", "b", "b"]),
    ],
)
def test_a_job_that_has_changed_is_an_error_also_where_nothing_is_made_yet(
    prompts, flags, words, made, command, quick, tmp_path, capsys
):
    assert command(prompts=["a", "b"]) == 0
    out = tmp_path / "out"
    began = json.loads((out / "job.json").read_text())["began"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    quick.made.clear()
    assert command(*flags, prompts=prompts) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert words.format(f"since this batch began ({began})") in message and "--overwrite" in message
    assert not quick.made and before == {path: path.read_bytes() for path in before}
    assert command(*flags, "--overwrite", prompts=prompts) == 0
    assert quick.made == made
    assert command(*flags) == 0 and quick.made == made


def test_flags_that_cannot_be(command, quick, tmp_path, capsys):
    cases = {
        "--lanes: '0' is not a whole number from 1": ("--lanes", 0),
        "--num-assets: '0' is not a whole number from 1": ("--num-assets", 0),
        "--retry-seeds: '-1' is not a whole number from 0": ("--retry-seeds", -1),
        "make each larger": ("--config.fit.num_steps=1",),
        "--shard is": ("--shard", "2/2"),
    }
    for words, flags in cases.items():
        assert command(*flags, prompts=["a"]) == 2, words
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert main.run(["batch", "--out", str(tmp_path)]) == 2
    assert "--prompts FILE" in capsys.readouterr().err
