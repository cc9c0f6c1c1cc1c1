"""Mistakes on the command line of `im3d dataset` are one line, and leave nothing behind."""

import pytest

from im3d_jax import main
from im3d_jax.commands import dataset
from recon_torch.errors import UserError

MISTAKES = {
    "command": (["bake"], "im3d dataset has no 'bake'; it has render, caption, select, build, show"),
    "split": (["build", "--views", "x", "--out", "y", "--split", "train=0.5"], "shares that make 1"),
    "no share": (["build", "--views", "x", "--out", "y", "--split", "train=nan"], "shares that make 1"),
    "views": (["build", "--views", "nothing", "--out", "y"], "no directory nothing"),
    "encoders": (["build", "--views", "x", "--out", "y", "--embed"], "names no encoders to cache"),
    "part": (["render", "--procedural", "3", "--out", "y", "--part", "3/3"], "not I/N"),
    "size": (
        ["render", "--procedural", "3", "--out", "y", "--size", "1"],
        "--size: '1' is not a whole",
    ),
    "source": (["render", "--out", "y"], "one of the arguments --meshes --procedural is required"),
    "meshes": (["render", "--meshes", "nothing", "--out", "y"], "no meshes .* below nothing"),
    "data": (["show", "nothing", "--out", "y"], "no data set in nothing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, tmp_path, monkeypatch):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        dataset.main(arguments)
    assert not list(tmp_path.iterdir())


def test_help_and_errors_come_from_the_command_line(capsys):
    assert main.run(["dataset", "--help"]) == 0
    assert "im3d dataset build --views" in capsys.readouterr().out
    assert main.run(["dataset", "show", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("im3d: error: the following arguments are required: --out")
