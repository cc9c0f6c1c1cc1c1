"""Batches in an object store: the same objects as files on a disk, whatever fails, is killed, or comes twice.

Most run against a process that speaks S3. Assets are stand-ins of a few small files.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from im3d_jax import asset, main, pipeline
from im3d_jax.asset import Asset
from im3d_jax.asset_kinds import ASSET
from im3d_jax.jobs import index, object_storage
from im3d_jax.jobs.index import Index
from im3d_jax.objects import leases, store
from im3d_jax.objects.leases import Times
from im3d_jax.objects.store import ObjectStore
from im3d_jax.objects.urls import parse
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.views.cameras import orbit

s3fs = pytest.importorskip("s3fs")
QUICK = Times(beat_s=0.5, expiry_s=4.0, late_s=3.0, turn_s=0.05)  # S3 tells whole seconds


class StandIn:
    """A model whose assets are a few small files. `happens` while one is made, by its prompt."""

    def __init__(self, settings):
        self.settings, self.happens, self.made = settings, {}, []

    def warnings(self, prompt):
        return []

    def start_client(self):
        return self

    def close(self):
        pass

    def make_best(self, request, client, num_retries, show):
        self.happens.get(request.prompt, lambda: None)()
        self.made.append(request.out.name)
        report = {
            **asset.origin(request, asset.images_digest(request), self.settings.config_digest),
            "image": Path(request.image).name,
            "quality": {"verdict": "good", "reasons": [], "hints": []},
            "rounds": [{"psnr": 20.0}],
            "seconds": {"total": 1.0},
        }
        with outputs.owned(request.out) as staging:
            (staging / "asset.ply").write_text(request.prompt * 1000)
            (staging / "images").mkdir()
            for number in range(2 if request.prompt == "two" else 3):
                (staging / f"images/{number:03d}.png").write_text(f"{request.prompt} {number}")
            write_json(staging / "report.json", report)
            outputs.replace(staging, request.out, ASSET, "report.json")
        return Asset(request.out, report, orbit(1), [])


@pytest.fixture
def model(monkeypatch):
    """What `im3d batch` loads."""
    loaded = StandIn(None)

    def load(config):
        loaded.settings = pipeline.read_settings(config)
        return loaded

    monkeypatch.setattr(pipeline, "load", load)
    return loaded


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits for minutes."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(leases, "TIMES", QUICK)
    monkeypatch.setattr(store, "PAUSE_S", 0.01)
    monkeypatch.setattr(store, "LONGEST_PAUSE_S", 0.01)


@pytest.fixture
def command(tmp_path, bucket):
    """Runs `im3d batch` on prompts, by default into a URL. Returns the exit code."""

    def run(*flags, prompts=None, out=f"{bucket}/run"):
        path = tmp_path / "prompts.jsonl"
        if prompts is not None:
            path.write_text("".join(json.dumps(each) + "\n" for each in prompts))
        try:
            return main.run(["batch", f"--prompts={path}", f"--out={out}", *flags])
        except SystemExit as exit:
            return exit.code

    return run


def objects(url):
    """Name -> content of what lies below a URL."""
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    found = fs.find(path)
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in found}


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def put(url, content=b"somebody's"):
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    fs.pipe_file(path, content)


# ---- The same as on a disk ----

TIMED = ("index.parquet", "job.json")


def fail():
    raise UserError("this cannot be made")


def test_the_objects_are_the_files_of_a_local_batch(command, model, bucket, tmp_path, capsys):
    prompts = ["a", {"prompt": "two", "seed": 3}, "<b>", "fails"]
    model.happens["fails"] = fail
    assert command(prompts=prompts, out=tmp_path / "out") == 1
    capsys.readouterr()
    assert command(prompts=prompts) == 1
    local, there = files(tmp_path / "out"), objects(f"{bucket}/run")
    assert local.keys() == there.keys()
    assert {name: local[name] for name in local if name not in TIMED} == {
        name: there[name] for name in there if name not in TIMED
    }
    printed = capsys.readouterr()
    assert f"{bucket}/run: shard 0/1: 3 made (3 good), 1 failed" in printed.out
    assert f"see {bucket}/run/gallery.html" in printed.out and "/tmp" not in printed.out

    assert main.run(["batch", "--summarize", f"{bucket}/run"]) == 0
    assert objects(f"{bucket}/run").keys() == local.keys()
    model.made.clear()
    model.happens.clear()
    assert command() == 0 and model.made == ["000003"]
    after = objects(f"{bucket}/run")
    assert "assets/000003/error.json" not in after and "assets/000003/report.json" in after
    capsys.readouterr()
    assert main.run(["batch", "--status", f"{bucket}/run"]) == 0
    assert capsys.readouterr().out.startswith(f"{bucket}/run: 4 of 4 made (4 good")


def test_shards_on_machines_that_share_nothing_else(command, model, bucket, tmp_path):
    prompts = [f"thing {number}" for number in range(4)]
    assert [command("--shard", f"{number}/2", prompts=prompts) for number in range(2)] == [0, 0]
    there = objects(f"{bucket}/run")
    (tmp_path / "index.parquet").write_bytes(there["index.parquet"])
    assert sorted(index.load(tmp_path / "index.parquet")) == [f"{number:06d}" for number in range(4)]
    assert json.loads(there["summary.json"])["num_missing"] == 0
    assert all(f"thing {number}".encode() in there["gallery.html"] for number in range(4))


def test_reports_that_the_table_knows_are_not_read_again(command, model, bucket, monkeypatch):
    assert command(prompts=["a", "b", "c"]) == 0
    put(
        f"{bucket}/run/assets/000001/report.json",
        objects(f"{bucket}/run")["assets/000000/report.json"] + b" ",
    )
    read, reads = ObjectStore.read, []

    def spy(self, name, *arguments):
        reads.append(name)
        return read(self, name, *arguments)

    monkeypatch.setattr(ObjectStore, "read", spy)
    with object_storage.opened(parse(f"{bucket}/run")) as place:
        found = Index(place).refresh().rows
    assert reads == ["assets/000001/report.json"] and found["000001"].prompt == "a" and len(found) == 3


def test_a_table_that_lost_a_race_is_mended(command, model, bucket):
    assert command(prompts=["a"]) == 0
    old = objects(f"{bucket}/run")["index.parquet"]
    assert command(prompts=["a", "b"]) == 0
    put(f"{bucket}/run/index.parquet", old)
    model.made.clear()
    assert command() == 0 and model.made == []
    with object_storage.opened(parse(f"{bucket}/run")) as place:
        assert len(Index(place)._load()) == 2  # noqa: SLF001


# ---- What fails ----


@pytest.fixture
def uploads(monkeypatch):
    """Names that are uploaded; those that `fails` says so of raise an error, as often as it counts."""
    made, fails = [], {}
    put_file = ObjectStore.put

    def spy(self, path, name):
        def attempt():
            made.append(name)
            for part, left in fails.items():
                if part in name and left > 0:
                    fails[part] -= 1
                    raise OSError("reduce your request rate")
            return put_file(self, path, name)

        return self._call("write", name, attempt)  # noqa: SLF001

    monkeypatch.setattr(ObjectStore, "put", spy)
    return made, fails


def test_an_upload_that_fails_twice_is_made(command, model, bucket, uploads):
    made, fails = uploads
    fails["000000/asset.ply"] = 2
    assert command(prompts=["a"]) == 0
    own = [name for name in made if name.startswith("assets/")]
    assert own.count("assets/000000/asset.ply") == 3
    assert own[0] == "assets/000000/.im3d.json" and own[-1] == "assets/000000/report.json"


def test_an_upload_that_fails_for_good_is_a_failure_and_the_batch_goes_on(
    command, model, bucket, uploads, capsys
):
    made, fails = uploads
    fails["000001/asset.ply"] = 99
    assert command(prompts=["a", "b", "c"]) == 1
    there = objects(f"{bucket}/run")
    error = json.loads(there["assets/000001/error.json"])["error"]
    assert error.startswith(
        f"cannot write {bucket}/run/assets/000001/asset.ply: reduce your request rate; tried"
    )
    assert {name for name in there if "/000001/" in name} == {
        "assets/000001/.im3d.json", "assets/000001/error.json"
    }  # fmt: skip
    assert "assets/000002/report.json" in there
    fails.clear()
    model.made.clear()
    assert command() == 0 and model.made == ["000001"]


def test_five_failed_uploads_in_a_row_stop_the_batch(command, model, bucket, uploads, capsys):
    uploads[1]["assets/"] = 10**6
    assert command(prompts=[f"thing {number}" for number in range(9)]) == 1
    assert "5 assets failed in a row, the last with: cannot write" in capsys.readouterr().err
    assert len(model.made) == 5


def test_an_asset_that_is_made_again_leaves_nothing_of_the_old_one(command, model, bucket, uploads):
    assert command(prompts=["three"]) == 0
    put(f"{bucket}/run/assets/000000/notes.txt")
    put(f"{bucket}/run/mine/images/000.png")
    assert command("--overwrite", prompts=["two"]) == 0
    there = objects(f"{bucket}/run")
    assert {name for name in there if name.startswith("assets/")} == {
        f"assets/000000/{name}"
        for name in (
            ".im3d.json",
            "asset.ply",
            "images/000.png",
            "images/001.png",
            "notes.txt",
            "report.json",
        )
    }
    assert there["assets/000000/notes.txt"] == there["mine/images/000.png"] == b"somebody's"
    noted = json.loads(there["assets/000000/.im3d.json"])["made_by_im3d"]["generate"]
    assert set(noted) == {"asset.ply", "images/000.png", "images/001.png", "report.json"}


@pytest.mark.parametrize("name", ["assets/000000/asset.ply", "index.parquet", "gallery.html"])
def test_objects_of_others_are_not_replaced(name, command, model, bucket, capsys):
    put(f"{bucket}/run/{name}")
    assert command(prompts=["a"]) == 2
    error = capsys.readouterr().err
    assert f"{bucket}/run/{name} is not of an earlier run" in error and error.count("\n") == 1
    assert objects(f"{bucket}/run") == {name: b"somebody's"} and not model.made


def test_an_object_that_somebody_has_changed_is_not_replaced(command, model, bucket, capsys):
    assert command(prompts=["a"]) == 0
    time.sleep(1.1)
    put(f"{bucket}/run/assets/000000/asset.ply")
    assert command("--overwrite", prompts=["b"]) == 2
    assert "asset.ply was changed since it was made" in capsys.readouterr().err
    assert objects(f"{bucket}/run")["assets/000000/asset.ply"] == b"somebody's"


# ---- Killed ----

KILLED = """
import os, signal, sys
from im3d_jax import main, pipeline
from im3d_jax.objects.store import ObjectStore
sys.path.insert(0, {folder!r})
import test_object_storage as test
put = ObjectStore.put

def killed(self, path, name):
    if name == "assets/000001/report.json":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, path, name)

ObjectStore.put = killed
pipeline.load = lambda config: test.StandIn(pipeline.read_settings(config))
main.run(["batch", *sys.argv[1:]])
"""


def test_killed_before_the_report_and_resumed_once(command, model, bucket, tmp_path):
    prompts = ["a", "b", "c"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    script = textwrap.dedent(KILLED.format(folder=str(Path(__file__).parent)))
    flags = [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={bucket}/run"]
    killed = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = objects(f"{bucket}/run")
    assert "assets/000001/asset.ply" in there and "assets/000001/report.json" not in there
    assert any(name.startswith(leases.FOLDER) for name in there)
    assert command() == 0 and model.made == ["000001", "000002"]
    assert not any(name.startswith(leases.FOLDER) for name in objects(f"{bucket}/run"))


# ---- Twice ----


def test_a_second_driver_is_refused_and_shards_that_overlap_are(command, model, bucket, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('"a"\n"b"\n"c"\n"d"\n')
    with object_storage.opened(parse(f"{bucket}/run")) as place, place.hold((1, 2), lambda: None):
        assert place.at_work().keys() == {(1, 2)}
        for shard in ("0/1", "3/4", "1/2"):
            assert command("--shard", shard) == 2
            error = capsys.readouterr().err
            assert f"{bucket}/run is in use by process {os.getpid()} on" in error and "since" in error
        assert command("--shard", "0/2") == 0
        with pytest.raises(SystemExit, match="1"):
            main.run(["batch", "--status", f"{bucket}/run"])
        assert f"process {os.getpid()} on" in capsys.readouterr().out
    assert command() == 0


def test_nothing_is_kept_once_the_batch_is_another_process_s(bucket, monkeypatch, user_error):
    @contextlib.contextmanager
    def held(store, name, is_rival, lost):
        lost()
        yield "key"

    monkeypatch.setattr(leases, "held", held)
    heard = []
    with object_storage.opened(parse(f"{bucket}/run")) as place, place.hold((0, 1), lambda: heard.append(1)):
        outputs.put(place.out / "assets/000000", ASSET, "report.json", lambda path: path.write_text("{}"))
        with user_error("run is another process's now"):
            place.keep(place.out / "assets/000000")
    assert heard and objects(bucket) == {}


# ---- What is read from a store ----


@pytest.fixture
def ball(bucket, tmp_path):
    """The URL of a folder with a picture, and its content."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "ball.png")
    content = (tmp_path / "ball.png").read_bytes()
    put(f"{bucket}/sets/pictures/ball.png", content)
    return f"{bucket}/sets", content


def test_prompts_and_their_pictures_come_from_a_store(command, model, ball, bucket, tmp_path):
    folder, content = ball
    prompts = [{"image": "pictures/ball.png"}, {"image": f"{folder}/pictures/ball.png", "seed": 3}]
    put(f"{folder}/prompts.jsonl", "\n".join(map(json.dumps, prompts)).encode())
    seen = []
    make_best, digest = model.make_best, hashlib.sha256(content).hexdigest()

    def spy(request, *arguments, **options):
        seen.append(request.image)
        return make_best(request, *arguments, **options)

    model.make_best = spy
    assert command(f"--prompts={folder}/prompts.jsonl") == 0
    assert seen == [f"{folder}/pictures/ball.png"] * 2
    report = json.loads(objects(f"{bucket}/run")["assets/000000/report.json"])
    assert report["image_digest"] == digest
    # The same files on a disk are the same job.
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/ball.png").write_bytes(content)
    prompts[1] = prompts[0] | {"seed": 3}
    assert command(prompts=prompts) == 0 and len(seen) == 2


def test_pictures_that_are_not_there_are_named_with_their_line(command, model, ball, capsys):
    folder, _ = ball
    lines = {
        '{"image": "none.png"}': f"no image at {folder}/none.png",
        '{"image": "/disk/none.png"}': "no image at /disk/none.png",
        '{"image": "s4://x/none.png"}': "unknown scheme",
        '{"image": "pictures/ball.png"}\n{"imag": ""}': "unknown key 'imag'",
    }
    for number, (line, words) in enumerate(lines.items()):
        put(f"{folder}/{number}.jsonl", line.encode())
        assert command(f"--prompts={folder}/{number}.jsonl") == 2
        error = capsys.readouterr().err
        assert f"{folder}/{number}.jsonl, line " in error and words in error and error.count("\n") == 1
    put(f"{folder}/broken.jsonl", b'{"prompt"')
    for name, words in {"broken": ", line 1", "none": "there is nothing at"}.items():
        assert command(f"--prompts={folder}/{name}.jsonl") == 2
        error = capsys.readouterr().err
        assert f"{folder}/{name}.jsonl" in error and words in error and "im3d_" not in error


def test_pictures_are_no_assets(command, model, ball, bucket, capsys):
    put(f"{bucket}/run/assets/ball.png", ball[1])
    assert command(prompts=[{"image": f"{bucket}/run/assets/ball.png"}]) == 2
    assert "ball.png lies where assets are written" in capsys.readouterr().err


# ---- What is refused before anything is loaded ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out={bucket}-of-another/run"], "the bucket .*-of-another does not exist"),
        (["--out=s4://x/y"], "unknown scheme 's4'"),
        (["--status={bucket}/none"], "no batch in s3://.*/none; give what"),
        (["--summarize={bucket}/none"], "no batch in s3://.*/none; give what"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(flags, words, command, model, bucket, capsys):
    assert command(*[flag.format(bucket=bucket) for flag in flags], prompts=["a"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1 and not model.made
    assert objects(bucket) == {}


def test_a_store_that_nobody_may_write_to(command, model, bucket, monkeypatch, capsys):
    def refuse(self, *arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", refuse)
    assert command(prompts=["a"]) == 2
    error = capsys.readouterr().err
    assert "no permission (Access Denied); check the credentials" in error and error.count("\n") == 1
    assert model.settings is None


def test_a_store_that_does_not_answer(command, model, bucket, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert command(prompts=["a"]) == 2
    error = capsys.readouterr().err
    assert (
        "Could not connect to the endpoint" in error and "tried 3 times" in error and error.count("\n") == 1
    )


def test_help_does_not_import_a_store():
    script = (
        "import sys; from im3d_jax import main\n"
        "try: main.run(['batch', '--help'])\nfinally: print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--out DIR|URL" in found
    assert not {"fsspec", "s3fs", "jax"} & set(found.splitlines()[-1].split())
