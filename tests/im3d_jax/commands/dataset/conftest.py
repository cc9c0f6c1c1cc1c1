"""What the tests of `im3d dataset` share: procedural objects that were rendered once."""

import shutil
from types import SimpleNamespace

import pytest

from im3d_jax.commands import dataset
from im3d_jax.data import objects
from im3d_jax.data.turntables import TurntableSource

SIZE, VIEWS, OBJECTS, SEED = 16, 4, 6, 3
FIRST = objects.SPLITS["train"][0]
PROCEDURAL = ["--procedural", OBJECTS, "--size", SIZE, "--num-views", VIEWS, "--seed", SEED]


def run(*arguments):
    dataset.main([str(each) for each in arguments])


def build(views, out, *more, split="train=1"):
    run("build", "--views", views, "--out", out, "--split", split, *more)
    return TurntableSource(out)


@pytest.fixture(scope="session")
def world():
    """What is rendered; `run(*arguments)`, and `build(views, out)`, which opens the data set that it made."""
    sizes = dict(size=SIZE, views=VIEWS, objects=OBJECTS, seed=SEED, first=FIRST, procedural=PROCEDURAL)
    return SimpleNamespace(run=run, build=build, **sizes)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Directories of procedural objects. Not to be changed."""
    out = tmp_path_factory.mktemp("rendered")
    run("render", *PROCEDURAL, "--out", out)
    return out


@pytest.fixture
def copied(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "views")
