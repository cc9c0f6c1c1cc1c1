"""`im3d dataset words`: the vocabulary of captions."""

import pytest

from im3d_jax.commands.dataset.words import vocabulary

pytestmark = pytest.mark.slow


def test_words_of_enough_captions():
    captions = ["A red-red mug", "a blue mug", "the Red chair", ""]
    assert vocabulary(captions, 2) == ["a", "mug", "red"]
    assert vocabulary(captions, 1) == ["a", "blue", "chair", "mug", "red", "the"]


def test_the_words_of_a_data_set_are_written_one_on_each_line(world, rendered, tmp_path, capsys, user_error):
    source = world.build(rendered, tmp_path / "data")
    world.run("words", tmp_path / "data", "--out", tmp_path / "words.txt", "--min-count", 1)
    expected = sorted({word for n in range(len(source)) for word in source[n]["caption"].split()})
    assert (tmp_path / "words.txt").read_text().splitlines() == expected
    assert f"{len(expected)} words of {len(source)} captions" in capsys.readouterr().out
    world.run("words", tmp_path / "data", "--out", tmp_path / "words.txt", "--min-count", 2)
    (tmp_path / "words.txt").write_text("mine")
    with user_error("words.txt is not of an earlier run"):
        world.run("words", tmp_path / "data", "--out", tmp_path / "words.txt")
    (tmp_path / "words.txt").unlink()
    with user_error("no word is in 99 of .* lower --min-count"):
        world.run("words", tmp_path / "data", "--out", tmp_path / "words.txt", "--min-count", 99)
