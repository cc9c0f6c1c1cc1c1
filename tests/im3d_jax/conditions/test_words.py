"""Prompts as words."""

import numpy as np

from im3d_jax.conditions.words import Vocabulary

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
