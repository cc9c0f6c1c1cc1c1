"""The command: its flags, its files, and that a second run measures nothing again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from im3d_jax import config_flags, pipeline
from im3d_jax.commands import evaluate
from im3d_jax.data import objects
from im3d_jax.evaluate import suite
from im3d_jax.evaluate.truth import Objects

pytestmark = pytest.mark.slow


@pytest.fixture
def config_path(monkeypatch, perceptual, tmp_path, write_runnable):
    """A config with 4 views of 32 px and a random network, for a suite of few objects and a small LPIPS."""
    monkeypatch.setattr(suite, "PerceptualDistance", lambda *_: perceptual)
    monkeypatch.setattr(suite, "NUM_ELEVATION_OBJECTS", 2)
    return write_runnable(tmp_path)


def test_writes_tables_and_results_and_keeps_them(config_path, monkeypatch, tmp_path, capsys):
    arguments = ["--suite=tiny", "--parts=elevation", f"--out={tmp_path}", f"--config={config_path}"]
    evaluate.main(arguments)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| true views | 2 |" in table and "random backbone weights" in table
    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["index"] for row in result["elevation"]["objects"]] == [0, 1]

    monkeypatch.setattr(Objects, "render", None)
    evaluate.main(arguments)
    assert (tmp_path / "table.md").read_text() == table


def test_other_weights_have_another_digest(config_path, tmp_path):
    loaded = pipeline.load(config_flags.load(config_path))
    params = jax.tree.map(lambda leaf: leaf + 1, loaded.generator.params)
    changed = dataclasses.replace(loaded, generator=loaded.generator.with_params(params))
    one, same, other = (suite.Suite(each, 0, tmp_path, 1, 1).digest for each in (loaded, loaded, changed))
    assert one == same != other


def test_truth_is_of_the_test_split_and_from_the_given_azimuths():
    seen = Objects(seed=0, size=32, num_views=4)
    around = seen.render(1)
    ahead = seen.render(1, azimuths_rad=np.full(4, np.pi / 2))
    assert around.indices == [objects.SPLITS["test"][0]]
    assert around.captions == [objects.make_object(0, 0).caption]
    assert around.categories[0].split()[-1] in around.captions[0]
    np.testing.assert_allclose(ahead.rgb[0], np.broadcast_to(around.rgb[0, 1], ahead.rgb[0].shape), atol=1e-4)


MISTAKES = {
    "--parts views,speed": "the parts are views,assets,prompts,elevation",
    "--parts=": "the parts are",
    "--num-objects 0": "--num-objects is 0",
    "--asset-objects -1": "--asset-objects is -1",
    "--suite huge": "huge",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line(flags, tmp_path, user_error):
    with user_error(MISTAKES[flags]):
        evaluate.main([*flags.split(), "--out", str(tmp_path / "out")])


def test_parts_come_in_their_own_order():
    assert evaluate.parse_parts("elevation, views") == ["views", "elevation"]
