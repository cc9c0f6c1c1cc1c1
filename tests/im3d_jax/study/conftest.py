"""A small study of two methods, with real videos and a prompt that would break a careless page."""

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import imageio_ffmpeg
import pytest
import sqlalchemy as sa

from im3d_jax.evaluate.outputs.names import key_of
from im3d_jax.study import FILES, STUDY, annotators, drawing, plan, sources

HOSTILE = "</script><script>document.title='gone'</script><img src=x onerror=alert(1)> & ${left_1}"
KEY = key_of(HOSTILE)


def made_up(num_prompts=6, num_checks=2, **changes):
    """A study without files: `ours` is left in items of even numbers, and right in the others."""
    videos, items, checks = {}, [], []
    for number in range(num_prompts):
        for method in ("ours", "base"):
            videos[f"{method}{number}"] = plan.Video(method, f"p{number}", f"{method}{number}.mp4", "0" * 64)
        for question in plan.QUESTIONS:
            sides = [f"ours{number}", f"base{number}"][:: 1 if len(items) % 2 == 0 else -1]
            items.append(plan.Item(f"q{len(items):05d}", f"p{number}", question, *sides))
    for number in range(num_checks):
        checks.append(plan.Item(f"q9{number:04d}", "p0", "quality", "ours0", "base0", "right"))
    settings = dict(seed=3, answers_per_item=5, check_every=5, num_annotators=10)
    return plan.Study(
        **settings | changes,
        methods=["ours", "base"],
        pairs=[["ours", "base"]],
        questions=plan.QUESTIONS,
        prompts={f"p{number}": plan.Prompt(f"prompt {number}") for number in range(num_prompts)},
        videos=videos,
        items=items,
        checks=checks,
    )


def write_test_video(path, size="32x32", seconds=0.25):
    source = f"testsrc2=size={size}:rate=24:duration={seconds}"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "lavfi", "-i", source]
    subprocess.run([*ffmpeg, "-pix_fmt", "yuv420p", str(path)], check=True)


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A video of six frames."""
    path = tmp_path_factory.mktemp("video") / "turntable.mp4"
    write_test_video(path)
    return path


@pytest.fixture(scope="session")
def source(video):
    """A method's name and prompts -> its turntables."""

    def make(name, *prompts):
        turntables = {key_of(prompt): sources.Turntable(prompt, (video,)) for prompt in prompts}
        return sources.Source(name, turntables)

    return make


@pytest.fixture(scope="session")
def directory(tmp_path_factory, source):
    """A whole study in its directory."""
    path = tmp_path_factory.mktemp("study")
    (path / FILES).mkdir()
    found = [source("ours", HOSTILE, "a blue car"), source("base", HOSTILE, "a blue car")]
    settings = drawing.Settings(num_annotators=10, check_share=0.25)
    plan.write(drawing.draw(found, {}, settings, path / FILES), path / STUDY)
    annotators.write(path / "annotators.csv", 10)
    return path


@pytest.fixture(scope="session")
def postgresql():
    """The URL of a PostgreSQL server: IM3D_TEST_POSTGRESQL, or a server that is started for the tests."""
    if given := os.environ.get("IM3D_TEST_POSTGRESQL"):
        yield given
        return
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian keeps what is not for PATH
    found = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    if found is None:
        pytest.skip("needs IM3D_TEST_POSTGRESQL or PostgreSQL")
    owner = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses root
    with tempfile.TemporaryDirectory(prefix="im3d-postgresql-") as home, socket.socket() as free:
        if owner:
            shutil.chown(home, owner)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def call(program, *arguments):
            command = [Path(found).with_name(program), "-D", f"{home}/data", *arguments]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(command, user=owner, cwd=home, check=True, **quiet)

        call("initdb", "--username=im3d", "--auth=trust", "--encoding=UTF8", "--no-sync")
        call("pg_ctl", "-w", "-o", f"-F -p {port} -k {home} -h 127.0.0.1", "start")
        yield f"postgresql://im3d@127.0.0.1:{port}/postgres"
        call("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture
def postgresql_url(postgresql):
    """The URL of an empty schema, in transactions that by themselves see nothing of those beside them."""
    schema = f"im3d_test_{uuid.uuid4().hex}"
    server = sa.create_engine(sa.make_url(postgresql).set(drivername="postgresql+psycopg"))
    with server.begin() as connection:
        connection.execute(sa.schema.CreateSchema(schema))
    settings = f"-csearch_path={schema} -cdefault_transaction_isolation=serializable"
    url = sa.make_url(postgresql).update_query_dict({"options": settings})
    yield url.render_as_string(hide_password=False)
    with server.begin() as connection:
        connection.execute(sa.schema.DropSchema(schema, cascade=True))
    server.dispose()
