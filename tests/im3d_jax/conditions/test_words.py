"""Prompts as words."""

import numpy as np
import pytest

from im3d_jax.conditions.words import Vocabulary, split_words

VOCABULARY = Vocabulary(("a", "blue", "car", "red"), max_words=4)


def test_prompts_become_word_indices():
    (indices,), (mask,) = VOCABULARY.encode(["A red CAR,", "", "a shiny blue-car a red", "zebra"])
    assert indices.tolist() == [[1, 4, 3, 0], [0, 0, 0, 0], [1, 2, 3, 1], [0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert indices.dtype == np.int32 and mask.dtype == np.float32


def test_unknown_words_are_named():
    (warning,) = VOCABULARY.warnings("a Shiny red car with wheels")
    assert warning.startswith("words shiny, with, wheels are unknown")
    assert warning.endswith("it knows: a, blue, car, red")
    assert VOCABULARY.warnings("a red car") == []


def test_words_like_the_unknown_ones_are_suggested():
    (warning,) = VOCABULARY.warnings("a bleu carr, two of them")
    assert warning.endswith("left out; did you mean blue, car?")
    many = Vocabulary([f"word{letter}{other}" for letter in "abcdefgh" for other in "abcdefghij"])
    (warning,) = many.warnings("zzz")
    assert warning.endswith(", ... (80 words)") and warning.count("word") == 62


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red CAR, (blue-car)!", ["a", "red", "car", "blue", "car"]),
        (
            "the cat's 3 legs, 50% and a 3d car",
            ["the", "cat", "s", "3", "legs", "50", "and", "a", "3d", "car"],
        ),
        ("красная машина", ["красная", "машина"]),
        ("红色的汽车。", ["红色的汽车"]),
        ("गाड़ी", ["गाड़ी"]),  # its vowels are marks
        ("cafe\u0301 \uff32\uff25\uff24", ["caf\u00e9", "red"]),  # composed; as wide as Chinese
        ("a car\U0001f697\ufe0f\u200d\U0001f525+", ["a", "car", "\U0001f697\U0001f525+"]),
        ("re\u200bd\tcar\n", ["red", "car"]),
        (" ,. - ", []),
    ],
)
def test_words_are_of_any_script(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize(
    "prompt", ["красная машина", "红色的汽车", "2024", "\U0001f697", "a zebra in a hat", "a", "..."]
)
def test_nothing_is_understood_of_what_is_in_no_caption(prompt):
    assert not VOCABULARY.understands(prompt)
    unknown = [word for word in split_words(prompt) if word != "a"]
    warnings = VOCABULARY.warnings(prompt)
    assert all(word in warnings[0] for word in unknown) and len(warnings) == bool(unknown)


def test_something_is_understood_of_a_known_word():
    assert VOCABULARY.understands("eine car") and VOCABULARY.understands("RED")


def test_what_is_beyond_the_last_index_is_named():
    warnings = VOCABULARY.warnings("a red shiny car a blue red car")
    assert (
        "shiny" in warnings[0]
        and warnings[1] == "this model reads 4 words and leaves out the last 3: blue, red, car"
    )
    assert VOCABULARY.warnings("a red car a") == []


def test_long_lists_are_cut():
    (warning,) = VOCABULARY.warnings(" ".join(f"zz{number}" for number in range(500)))
    assert "zz11 and 488 more are unknown" in warning and len(warning) < 300
