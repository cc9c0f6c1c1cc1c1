"""The source of examples that the `data` section of a config names."""

from dataclasses import replace

import numpy as np
import pytest

from im3d_jax.data import objects
from im3d_jax.data.input_pipeline import stack_views
from im3d_jax.data.sources import open_source
from im3d_jax.data.turntables import TurntableSource
from im3d_jax.training_settings import DataSettings
from recon_torch.errors import UserError

DATA = DataSettings(split="validation", first_object=7)
WORLD = dict(seed=3, size=8, num_views=2)


def test_procedural_objects_come_from_the_split():
    source = open_source(DATA, **WORLD)
    first, _ = objects.SPLITS["validation"]
    example = source[1]
    assert example["id"] == f"procedural/{first + 8}"
    assert example["caption"] == objects.make_object(3, first + 8).caption
    rgb, _ = stack_views([example])
    assert rgb.shape == (1, 2, 8, 8, 3) and np.ptp(rgb) > 0.1


def test_a_path_opens_a_data_set(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        TurntableSource, "__init__", lambda self, path, **more: asked.update(path=path, **more)
    )
    source = open_source(replace(DATA, path="data/chairs"), **WORLD)
    assert isinstance(source, TurntableSource)
    assert asked == dict(path="data/chairs", split="validation", size=8, num_views=2)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no split 'valid'.* train"):
        open_source(replace(DATA, split="valid"), **WORLD)
    with pytest.raises(UserError, match="nothing"):
        open_source(replace(DATA, path=str(tmp_path / "nothing")), **WORLD)
