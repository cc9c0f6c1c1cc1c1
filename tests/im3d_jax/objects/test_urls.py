"""URLs are told from paths, and refused where they can name nothing."""

from pathlib import Path

import pytest

from im3d_jax import main
from im3d_jax.objects import urls
from im3d_jax.objects.urls import Url, beside, parse


def test_parts_of_a_url():
    url = parse("S3://bucket/some/run.jsonl/")
    assert (url, str(url)) == (Url("s3", "bucket/some/run.jsonl"), "s3://bucket/some/run.jsonl")
    assert (url.name, url.suffix, str(url.parent / "x")) == ("run.jsonl", ".jsonl", "s3://bucket/some/x")
    assert urls.path_or_url("a/b") == Path("a/b") and urls.path_or_url("gs://b/c") == Url("gs", "b/c")


def test_names_beside_a_file():
    folder = parse("s3://bucket/sets/one")
    assert beside(folder, "a.png") == "s3://bucket/sets/one/a.png"
    assert beside(folder, "../two/a.png") == "s3://bucket/sets/two/a.png"
    assert (
        beside(folder, "gs://other/a.png") == beside(Path("here"), "gs://other/a.png") == "gs://other/a.png"
    )
    assert beside(folder, "/disk/a.png") == "/disk/a.png"
    assert beside(Path("here"), "a.png") == "here/a.png"
    assert beside(parse("memory://x/y"), "../a.png") == "memory://x/a.png"
    assert urls.absolute("s3://b/a") == "s3://b/a" and urls.absolute("a") == f"{Path.cwd()}/a"


@pytest.mark.parametrize(
    "text, words",
    [
        ("s4://bucket/x", "unknown scheme 's4'; give one such as s3:"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/../x", "no plain URL"),
        ("zip://x::s3://bucket/y", "no plain URL"),
        ("s3://bucket/a\nb", "no plain URL"),
    ],
)
def test_what_is_no_url_is_refused(text, words, user_error):
    with user_error(words):
        parse(text)


def test_pictures_do_not_lead_out_of_a_bucket(user_error):
    with user_error("leads out of s3://bucket/a"):
        beside(parse("s3://bucket/a"), "../../../other/x.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt=a", "--out=s3://bucket/a"],
        ["fit", "--views=a", "--out=s3://bucket/a"],
        ["render", "--asset=a", "--out=gs://bucket/a"],
        ["export", "a", "--to=s3://bucket/a.spz"],
        ["mesh", "a", "--out=s3://bucket/a"],
        ["view", "a", "--html=s3://bucket/a.html"],
        ["train", "--config=configs/tiny.py", "--workdir=gs://bucket/a"],
        ["train-elevation", "--workdir=gs://bucket/a"],
        ["dataset", "render", "--out=s3://bucket/a"],
        ["embed", "--prompts=a.txt", "--out=s3://bucket/a"],
        ["convert", "unet3d", "--from=a", "--to=s3://bucket/a"],
        ["plan", "--json=s3://bucket/a"],
        ["evaluate", "compare", "a", "b", "--out=s3://bucket/a"],
        ["study", "new", "--out=s3://bucket/a"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_write_to_disks_refuse_urls(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(arguments) == 2
    error = capsys.readouterr().err
    assert "is a URL, and this is a path of this machine" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
