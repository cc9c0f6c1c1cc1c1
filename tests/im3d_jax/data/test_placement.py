"""Which objects a data set takes, and into which splits."""

import json

import numpy as np
import pytest

from im3d_jax.data import placement


def test_splits_have_their_shares():
    shares = dict(train=0.9, validation=0.04, test=0.06)
    placed = [placement.split_of(f"object {n}", shares) for n in range(20_000)]
    for name, share in shares.items():
        assert placed.count(name) / 20_000 == pytest.approx(
            share, abs=5 * np.sqrt(share * (1 - share) / 20_000)
        )
    assert placement.split_of("a", {"train": 1.0, "test": 0.0}) == "train"


def test_the_name_alone_decides_the_split():
    shares = dict(train=0.5, test=0.5)
    assert [placement.split_of(name, shares) for name in "abcd"] == ["test", "train", "train", "train"]


def test_a_variant_goes_where_its_object_goes():
    shares = dict(train=0.5, test=0.5)
    for name in ("a", "b", "kit/mug"):
        assert placement.split_of(f"{name}~12", shares) == placement.split_of(name, shares)
    assert placement.object_of("a~b~3") == "a~b" and placement.object_of("a~b") == "a~b"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_split_file_places_objects_and_their_variants(tmp_path):
    file = placement.read_split_file(
        write(tmp_path / "split.json", {"train": ["a", "b~7"], "test": ["c", "d"]})
    )
    assert file.splits == ["train", "test"]
    placed = {name: file.split_of(name) for name in ("a", "a~1", "c~2", "b~7", "b", "e")}
    assert placed == {"a": "train", "a~1": "train", "c~2": "test", "b~7": "train", "b": None, "e": None}
    assert file.without_object(["a", "c~1", "b~7", "e"]) == ["d"]


MISTAKES = {
    "json": ("{", "--split-file .*json, line 1: is not JSON"),
    "list": (["a"], "is not {split"),
    "names": ({"train": [1]}, "is not {split"),
    "split": ({"All right": ["a"]}, "'All right' cannot be a split's name"),
    "all": ({"all": ["a"]}, "'all' cannot be a split's name"),
    "two splits": ({"train": ["a", "b"], "test": ["b", "a"]}, "2 names twice, as b in train and test"),
    "one split": ({"train": ["a", "a"]}, "1 names twice, as a in train and train"),
    "empty": ({"train": [], "test": []}, "names no objects"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_split_files_are_named(mistake, tmp_path, user_error):
    content, message = MISTAKES[mistake]
    with user_error(message):
        placement.read_split_file(write(tmp_path / "split.json", content))


@pytest.mark.parametrize("content", ["{", ["a"], {"names": "a"}, {"names": []}, {"names": [1]}])
def test_files_that_are_no_selections_are_refused(content, tmp_path, user_error):
    with user_error("--selection .*(json, line 1: is not JSON|has no list)"):
        placement.read_selection(write(tmp_path / "selection.json", content))
    assert placement.read_selection(write(tmp_path / "right.json", {"names": ["a"]})) == ["a"]
