"""Mixtures of sources: their proportions, their order, and batches of stored and procedural objects."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from im3d_jax import config_sections
from im3d_jax.data import Source, turntables, views
from im3d_jax.data.input_pipeline import Shard, check_alike, open_stream, stack_views
from im3d_jax.data.mixture import Mixture, Part
from im3d_jax.data.rendering import ProceduralRenderer, Turntable
from im3d_jax.data.sources import ProceduralSource, open_source
from im3d_jax.training_settings import DataSettings, PartSettings

WHOLE = Shard(0, 1)
SETTINGS = dict(seed=3, batch_size=8, shuffle=False, num_threads=2, buffer=2, max_corrupt=0)
WORLD = dict(seed=1, size=8, num_views=2)


class Numbers:
    """Records that say which source they are of, and their numbers in it."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return {"id": f"{self.name}{index}"}


MIXED = Mixture([Part(Numbers("a", 5), 0.25, True), Part(Numbers("b", 1000), 0.75, False)])


def ids(num_batches, shard=WHOLE, start=0, source=MIXED):
    stream = open_stream(source, shard=shard, start=start, **SETTINGS)
    batches = [[each["id"] for each in next(stream)] for _ in range(num_batches)]
    stream.close()
    return np.array(batches)


def test_every_batch_has_the_proportion():
    assert isinstance(MIXED, Source) and len(MIXED) == 1005
    batches = ids(50)
    of_a = [[int(name[1:]) for name in batch if name[0] == "a"] for batch in batches]
    assert [len(each) for each in of_a] == [2] * 50
    epochs = np.concatenate(of_a).reshape(20, 5)
    assert (np.sort(epochs) == np.arange(5)).all() and len({tuple(each) for each in epochs}) > 5
    of_b = [name for batch in batches for name in batch if name[0] == "b"]
    assert of_b == [f"b{number}" for number in range(300)]


def test_a_batch_depends_on_its_number_alone():
    batches = ids(9)
    np.testing.assert_array_equal(ids(4, start=5), batches[5:])
    shards = [ids(9, Shard(index, 2)) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards, 1), batches)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data set of three procedural objects, of which two are in training."""
    root = tmp_path_factory.mktemp("stored")
    renderer = ProceduralRenderer(3, Turntable(8, 2, None, 1))
    for name in renderer.names:
        views.write_object(root / "views" / name, *renderer.render(name))
    records = [views.read_object(path, path.name) for path in views.find_objects(root / "views")]
    turntables.write(root / "data", zip(["train", "train", "test"], records, strict=True), ["train", "test"])
    return str(root / "data")


@pytest.mark.slow
def test_a_batch_of_stored_and_procedural_objects(stored):
    mix = {"stored": PartSettings(1.0, path=stored), "shapes": PartSettings(3.0, first_object=50)}
    stream = open_stream(open_source(DataSettings(mix=mix), **WORLD), shard=WHOLE, **SETTINGS)
    examples = next(stream)
    stream.close()
    check_alike(examples)
    assert sum("rgb" in each for each in examples) == 2
    rgb, alpha = stack_views(examples)
    first = next(number for number, each in enumerate(examples) if "scene" in each)
    shapes = ProceduralSource(1, 20_050, 8, 2)
    assert examples[first]["id"] == shapes[0]["id"]
    for number, example in enumerate(examples):
        alone = stack_views([example])
        np.testing.assert_allclose(rgb[number], alone[0][0], atol=1e-6)
        np.testing.assert_allclose(alpha[number], alone[1][0], atol=1e-6)


def test_examples_of_one_batch_must_be_alike(user_error):
    rgb, latents = np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 4, 4, 4), np.float32)
    pictures = dict(id="a", rgb=rgb, alpha=rgb[..., :1])
    check_alike([pictures, dict(id="b", scene={}, size=8)])
    with user_error(r"a has latents none, b has \(2, 4, 4, 4\); build all data sets"):
        check_alike([pictures, dict(id="b", latents=latents)])
    text = tuple(np.zeros((tokens, 3)) for tokens in (4, 5))
    cached = pictures | dict(id="c", text=text)
    check_alike([cached, cached])
    with user_error(r"c has embeddings of its caption \(4, 3\) and \(5, 3\), a has none"):
        check_alike([cached, pictures])
    with user_error(r"embeddings of its caption .* d has \(4, 3\);"):
        check_alike([cached, pictures | dict(id="d", text=text[:1])])


MISTAKES = {
    "weight": (dict(mix={"a": dict(weight=0.0)}), "config.data.mix.a.weight is 0.0; give a number above 0"),
    "no weight": (dict(mix={"a": dict(path="x")}), "config.data.mix.a has no weight; set it"),
    "unknown": (dict(mix={"a": dict(weight=1.0, share=2)}), "mix.a has an unknown entry 'share'"),
    "no part": (dict(mix={"a": 3}), "config.data.mix.a is 3; it has to be a section with weight, path"),
    "no parts": (dict(mix="all"), "config.data.mix is 'all'; it has to be a section"),
    "both": (dict(path="x", mix={"a": dict(weight=1.0)}), r"have a path \(x\) and a mix"),
    "split": (dict(mix={"a": dict(weight=1.0, split="valid")}), "no split 'valid'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, user_error):
    changes, message = MISTAKES[mistake]
    with user_error(message):
        data = config_sections.settings(ConfigDict({"data": changes}), "data", DataSettings)
        open_source(data, **WORLD)
    with user_error("a part without objects"):
        Mixture([Part(Numbers("a", 0), 1, False)])
