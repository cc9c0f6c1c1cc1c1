"""Batches make the same assets as `im3d generate`, whatever fails, stops, or runs beside them."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from im3d_jax import asset, config_flags, main, pipeline
from im3d_jax.asset import Asset
from im3d_jax.conditions import text_to_image
from im3d_jax.jobs import batch, outcomes
from im3d_jax.jobs.making import InProcess
from im3d_jax.jobs.stop import Stop
from recon_torch import locks, outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.process.client import WorkerDied, WorkerFailed
from recon_torch.views.cameras import orbit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]

CHANGES = """
    config.video.num_steps = 2
    config.rounds.update(at_steps=(2,), num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=4, lpips_net="alex")
    config.turntable.update(num_frames=2, size=32)
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, write_runnable):
    return write_runnable(tmp_path_factory.mktemp("config"), CHANGES)


@pytest.fixture
def command(config_path, tmp_path, monkeypatch):
    """Runs `im3d batch` on prompts (or what is in prompts.jsonl), into OUT. Returns the exit code."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def run(*flags, prompts=None, out=tmp_path / "out"):
        path = tmp_path / "prompts.jsonl"
        if prompts is not None:
            path.write_text("".join(json.dumps(each) + "\n" for each in prompts))
        flags = [f"--prompts={path}", f"--out={out}", f"--config={config_path}", *map(str, flags)]
        try:
            return main.run(["batch", *flags])
        except SystemExit as exit:
            return exit.code

    return run


@pytest.fixture
def quick(monkeypatch):
    """A loaded model whose assets are nothing but their reports, for tests that do not look at assets.

    Set the `verdicts` on assets, or what `happens` while one is made, by their prompts. `made` lists the
    prompts in the order in which their assets were made.
    """

    class Client:
        def close(self):
            pass

    class Quick:
        def __init__(self):
            self.verdicts, self.happens, self.made, self.config = {}, {}, [], None

        def load(self, config):
            self.config, self.settings = config, pipeline.read_settings(config)
            return self

        def warnings(self, prompt):
            return []

        def start_client(self):
            return Client()

        def make_best(self, request, client, num_retries, show):
            self.happens.get(request.prompt, lambda _: None)(show)
            self.made.append(request.prompt)
            verdict = self.verdicts.get(request.prompt, "good")
            digest = asset.file_digest(request.image)
            report = {
                **asset.origin(request, digest, config_flags.config_digest(self.config)),
                "image": request.image,
                "quality": {"verdict": verdict, "reasons": [], "hints": []},
                "rounds": [{"psnr": 20.0}],
                "seconds": {"total": 1.0},
            }
            if verdict == "bad" and num_retries:
                report["tries"] = [report | {"seed": request.seed}] * (1 + num_retries)
            write = partial(write_json, content=report)
            outputs.put(request.out, asset.ASSET, "report.json", write)
            return Asset(request.out, report, orbit(1), [])

    quick = Quick()
    monkeypatch.setattr(pipeline, "load", quick.load)
    return quick


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


@pytest.fixture
def pictures(tmp_path):
    """ball.png and a file that is no picture."""
    inside = np.hypot(*(np.mgrid[:40, :40] - 20)) < 10
    Image.fromarray(np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)).save(
        tmp_path / "ball.png"
    )
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path / "ball.png", tmp_path / "broken.png"


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


# ---- Shards ----


def test_shards_are_disjoint_and_together_all(command, quick, tmp_path):
    prompts = [f"thing {i}" for i in range(7)]
    assert command("--shard", "1/3", prompts=prompts) == 0
    assert quick.made == ["thing 1", "thing 4"]
    assert command("--shard", "2/3") == command("--shard", "0/3") == 0
    assert sorted(quick.made) == prompts
    assert json.loads((tmp_path / "out/summary.json").read_text())["num_assets"] == 7


# ---- A text-to-image pipeline, and flags ----


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
