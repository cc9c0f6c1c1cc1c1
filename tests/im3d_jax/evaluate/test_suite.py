"""The command: its flags, its files, and that a second run measures nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from im3d_jax.commands import evaluate
from im3d_jax.data import objects
from im3d_jax.evaluate import suite, truth
from recon_torch.errors import UserError

ROOT = Path(__file__).parents[3]


class Untrained:
    """A generator of which only the weights are looked at."""

    def __init__(self, config, params=None):
        self.params = {"w": np.zeros(3, np.float32)}


@pytest.fixture
def small(monkeypatch, perceptual):
    monkeypatch.setattr(suite, "Generator", Untrained)
    monkeypatch.setattr(suite, "PerceptualDistance", lambda *_: perceptual)
    monkeypatch.setattr(suite, "NUM_ELEVATION_OBJECTS", 2)


ARGUMENTS = ["--suite", "tiny", "--parts", "elevation", "--config.size=32"]


def test_writes_tables_and_results_and_keeps_them(small, monkeypatch, tmp_path, capsys):
    config = shutil.copy(ROOT / "configs" / "tiny.py", tmp_path)
    arguments = [*ARGUMENTS, "--out", str(tmp_path), f"--config={config}"]
    evaluate.main(arguments)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| true views | 2 |" in table and "random backbone weights" in table
    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["index"] for row in result["elevation"]["objects"]] == [0, 1]

    monkeypatch.setattr(truth, "render", None)
    evaluate.main(arguments)
    assert (tmp_path / "table.md").read_text() == table


def test_other_weights_have_another_digest(small, tmp_path):
    config = suite.config_flags.load("configs/tiny.py")
    one, other = (suite.Suite(config, 1, 1, tmp_path) for _ in range(2))
    assert one.digest == other.digest
    del other.digest
    other.generator.params["w"][0] = 1
    assert one.digest != other.digest


def test_truth_is_of_the_test_split_and_from_the_given_azimuths():
    config = suite.config_flags.load("configs/tiny.py")
    suite.config_flags.override(config, "size", "32")
    around = truth.render(config, 1, azimuths_rad=np.linspace(0, 2 * np.pi, 5)[:4])
    ahead = truth.render(config, 1, azimuths_rad=np.full(4, np.pi / 2))
    assert around.indices == [objects.SPLITS["test"][0]]
    assert around.captions == [objects.make_object(config.seed, 0).caption]
    assert around.categories[0].split()[-1] in around.captions[0]
    np.testing.assert_allclose(ahead.rgb[0], np.broadcast_to(around.rgb[0, 1], ahead.rgb[0].shape), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "views,speed"], "the parts are views,assets,prompts,elevation"),
        (["--parts", ""], "the parts are"),
        (["--num-objects", "0"], "--num-objects is 0"),
        (["--asset-objects", "-1"], "--asset-objects is -1"),
        (["--suite", "huge"], "huge"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([*flags, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_parts_come_in_their_own_order():
    assert evaluate.parse_parts("elevation, views") == ["views", "elevation"]
