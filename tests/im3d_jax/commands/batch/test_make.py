"""Batches make the same assets as `im3d generate`, whatever fails, stops, or runs beside them."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from im3d_jax import asset, main, pipeline
from im3d_jax.conditions import text_to_image
from im3d_jax.jobs import outcomes
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.process.client import WorkerDied, WorkerFailed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]


def fail(error):
    def happens(show):
        raise error

    return happens


def files(directory):
    """Path -> content below a directory, of all but the times that reports hold and what is made of these."""
    found = {}
    for path in sorted(path for path in directory.rglob("[!.]*") if path.is_file()):
        if path.name in ("index.parquet", "job.json"):  # they have times, too
            continue
        content = path.read_bytes()
        if path.name == "report.json":
            content = {name: value for name, value in json.loads(content).items() if name != "seconds"}
        found[str(path.relative_to(directory))] = content
    return found


# ---- Real assets ----


def test_assets_are_those_of_generate_whatever_the_lanes_and_shards(
    command, config_path, pictures, tmp_path, capsys
):
    ball, broken = pictures
    prompts = [
        "a red car",
        {"prompt": "a broken one", "image": "broken.png"},
        {"image": "ball.png", "seed": 7, "elevation_deg": 20},
        "a red car",
    ]
    assert command("--lanes", 2, "--save-views", prompts=prompts) == 1
    assert "3 made" in (printed := capsys.readouterr()).out and "1 failed" in printed.out
    assert printed.err.count("\n") == 5 and "[4/4" in printed.err  # a warning, a line for each
    out = tmp_path / "out"
    failure = json.loads((out / "assets/000001/error.json").read_text())
    assert "cannot read" in failure["error"] and failure["details"] == ""

    for name, flags in {
        "000000": ("--prompt", "a red car"),
        "000002": ("--image", ball, "--seed", 7, "--elevation-deg", 20),
    }.items():
        flags = ("--out", tmp_path / name, f"--config={config_path}", "--save-views", *flags)
        assert main.run(["generate", *map(str, flags)]) == 0
        assert files(out / "assets" / name) == files(tmp_path / name)
    assert files(out / "assets/000003") == files(out / "assets/000000")
    assert (out / "assets/000000/views_1/images/000.png").exists()

    shards = tmp_path / "shards"
    assert [command("--shard", f"{i}/2", "--save-views", out=shards) for i in range(2)] == [0, 1]
    assert files(shards) == files(out) | {"summary.json": (shards / "summary.json").read_bytes(),
                                          "gallery.html": (shards / "gallery.html").read_bytes()}  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.ply")}
    broken.write_bytes(ball.read_bytes())
    assert command() == 0
    assert not (out / "assets/000001/error.json").exists() and (out / "assets/000001/asset.ply").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("number, exit_code, num_made", [(signal.SIGTERM, 75, 1), (signal.SIGUSR1, 75, 2)])
def test_signals_leave_whole_assets_only(
    number, exit_code, num_made, command, local_client, monkeypatch, tmp_path
):
    """In the second asset's fit: SIGTERM gives it up, SIGUSR1 lets it end."""
    resets = []
    fit, reset = local_client.fit, local_client.reset

    def counted(self, cameras):
        resets.append(threading.current_thread())
        reset(self, cameras)

    def signalled(self, until_step, on_progress):
        if len(resets) == 3:  # one more than assets, for the start
            os.kill(os.getpid(), number)
        return fit(self, until_step, on_progress)

    monkeypatch.setattr(local_client, "reset", counted)
    monkeypatch.setattr(local_client, "fit", signalled)
    handler = signal.getsignal(number)
    assert command(prompts=["a red car"] * 3) == exit_code
    assert signal.getsignal(number) == handler
    assets = tmp_path / "out" / "assets"
    assert [path.name for path in sorted(assets.iterdir())] == [f"{i:06d}" for i in range(num_made)]
    assert all(
        {"report.json", "asset.ply"} < {each.name for each in path.iterdir()} for path in assets.iterdir()
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_assets"] == num_made


def test_a_signal_while_the_model_loads_ends_it_at_once(command, quick, monkeypatch, tmp_path):
    def load(config):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(pipeline, "load", load)
    assert command(prompts=["a"]) == 75
    assert quick.made == [] and not list(tmp_path.rglob("report.json"))


# ---- What is made, and what is not ----


def test_what_is_there_is_not_made_again(command, quick, tmp_path):
    assert command("--num-assets", 2, prompts=["a", "b"]) == 0
    assert quick.made == ["a", "a", "b", "b"]
    seeds = [json.loads(path.read_text())["seed"] for path in sorted(tmp_path.rglob("report.json"))]
    assert seeds == [0, 1, 0, 1]
    half = tmp_path / "out/assets/000002"
    (half / "report.json").unlink()
    outputs.put(half, asset.ASSET, "asset.ply", lambda path: path.write_text("half"))
    (half / ".im3d_a1b2c3d4.json").touch()
    quick.made.clear()
    assert command("--num-assets", 2) == 0
    assert quick.made == ["b"] and {path.name for path in half.iterdir()} == {"report.json", outputs.MARKER}


def test_a_lost_shard_is_missing_from_the_first_call_on(command, quick, tmp_path, monkeypatch, capsys):
    def lose(show):
        seen.append(json.loads((tmp_path / "out/summary.json").read_text()))

    seen = []
    quick.happens["a"] = lose
    assert command("--shard", "0/2", prompts=["a", "b"]) == 0
    assert "1 of the batch's 2 assets are missing" in capsys.readouterr().out
    for told, missing in ((seen[0], 2), (json.loads((tmp_path / "out/summary.json").read_text()), 1)):
        assert (told["num_asked"], told["num_shards"], told["num_missing"]) == (2, 2, missing)


def test_the_shell_of_an_interactive_allocation_makes_everything(command, quick, monkeypatch, capsys):
    for name, value in dict(STEP_ID=4294967290, PROCID=0, NTASKS=2, STEP_NUM_TASKS=2).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert command(prompts=["a", "b"]) == 0
    assert quick.made == ["a", "b"] and "shard 0/1: 2 made" in capsys.readouterr().out


def test_prompts_at_the_end_of_the_file_are_made_under_new_numbers(command, quick, tmp_path, capsys):
    assert command("--num-assets", 2, prompts=["a", "b"]) == 0
    assert command("--num-assets", 2, prompts=["a", "b", "c"]) == 0
    assert quick.made == ["a", "a", "b", "b", "c", "c"]
    assert json.loads((tmp_path / "out/assets/000005/report.json").read_text())["prompt"] == "c"
    assert command("--num-assets", 2, prompts=["a", "b", "d"]) == 2
    assert "entry 3 is another" in capsys.readouterr().err


def test_bad_assets_are_made_again_if_more_tries_are_asked_for(command, quick):
    quick.verdicts = {"b": "bad"}
    assert command(prompts=["a", "b"]) == 0 and command() == 0
    assert quick.made == ["a", "b"]
    assert command("--retry-seeds", 2) == 0 and command("--retry-seeds", 2) == 0 and command() == 0
    assert quick.made == ["a", "b", "b"]


# ---- Failures ----


def test_failures_do_not_stop_the_others_and_say_why(command, quick, tmp_path):
    errors = {
        "user": UserError("views are not finite; look at them"),
        "died": WorkerDied("the 3D worker was killed; the asset is given up", "Ouch\nBye"),
        "failed": WorkerFailed("Traceback (most recent call last):\n  somewhere\nRuntimeError: CUDA error"),
        "bug": ValueError("an image has NaN\nor infinite values"),
    }
    quick.happens = {name: fail(error) for name, error in errors.items()}
    prompts = ["a", "user", "died", "failed", "bug", "b"]
    assert command(prompts=prompts) == 1
    assert quick.made == ["a", "b"]
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("error.json"))]
    assert [each["prompt"] for each in told] == list(errors)
    assert [each["error"] for each in told] == [
        "views are not finite; look at them",
        "the 3D worker was killed; the asset is given up",
        "RuntimeError: CUDA error",
        "ValueError: an image has NaN",
    ]
    details = [each["details"] for each in told]
    assert details[:2] == ["", "Ouch\nBye"] and "somewhere" in details[2]
    assert "Traceback" in details[3] and "or infinite values" in details[3]
    quick.happens.clear()
    assert command() == 0
    assert not list(tmp_path.rglob("error.json"))


def test_five_failures_in_a_row_stop_the_shard_but_not_for_good(command, quick, capsys):
    quick.happens = {"x": fail(UserError("out of memory"))}
    prompts = ["a", *["x"] * 6, "b", "c"]
    assert command(prompts=prompts) == 1
    assert quick.made == ["a"]
    printed = capsys.readouterr()
    assert "5 assets failed in a row, the last with: out of memory" in printed.err
    assert "5 failed" in printed.out and "3 left" in printed.out
    # What failed before comes last, and is no news.
    assert command() == 1
    assert quick.made == ["a", "b", "c"]
    assert "6 failed" in capsys.readouterr().out


def test_a_disk_that_is_full_ends_the_batch(command, quick, monkeypatch, capsys):
    def write_json(path, content):
        raise UserError(f"cannot write {path} (No space left on device); choose another place")

    quick.happens = {"x": fail(UserError("no space"))}
    monkeypatch.setattr(outcomes, "write_json", write_json)
    assert command(prompts=["x", "a", "b"]) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_ends_lanes_within_their_assets(command, quick, tmp_path):
    """The asset in hand notices at its next step, as it would within `client.fit`."""

    def happens(show):
        with show("fit", 10) as bar:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                bar.update()

    quick.happens = {"x": happens}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert command(prompts=["a", "x", "b"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert quick.made == ["a"]
    assert [path.name for path in (tmp_path / "out/assets").iterdir()] == ["000000"]


# ---- Shards, and a text-to-image pipeline ----


def test_shards_are_disjoint_and_together_all(command, quick, tmp_path):
    prompts = [f"thing {i}" for i in range(7)]
    assert command("--shard", "1/3", prompts=prompts) == 0
    assert quick.made == ["thing 1", "thing 4"]
    assert command("--shard", "2/3") == command("--shard", "0/3") == 0
    assert sorted(quick.made) == prompts
    assert json.loads((tmp_path / "out/summary.json").read_text())["num_assets"] == 7


def test_pictures_of_a_pipeline_are_drawn_once_and_one_that_fails_is_alone(
    command, quick, monkeypatch, tmp_path
):
    drawn = []

    def draw(path, prompts, seeds, num_steps, template, on_step):
        if "x" in prompts:
            raise UserError("its safety checker blanked 'x'")
        drawn.extend(zip(prompts, seeds, strict=True))
        disc = (np.hypot(*(np.mgrid[:40, :40] - 20)) < 10)[..., None]
        return [np.where(disc, np.float32([0.8, 0.1, 0.2]), np.float32(1)) for _ in prompts]

    monkeypatch.setattr(text_to_image, "draw", draw)
    flags = ("--config.text_to_image.pipeline=sdxl",)
    assert command(*flags, prompts=["a", "b", "x", "b", {"prompt": "c", "seed": 5}]) == 1
    assert sorted(drawn) == [("a", 0), ("b", 0), ("c", 5)] and quick.made == ["a", "b", "b", "c"]
    error = json.loads((tmp_path / "out/assets/000002/error.json").read_text())
    assert "safety checker" in error["error"]
    pictures = {json.loads(path.read_text())["image"] for path in tmp_path.rglob("report.json")}
    assert len(pictures) == 3 and all(Path(each).is_file() for each in pictures)
    (tmp_path / "out/assets/000001/report.json").unlink()
    assert command(*flags) == 1
    assert len(drawn) == 3 and quick.made[4:] == ["b"]
