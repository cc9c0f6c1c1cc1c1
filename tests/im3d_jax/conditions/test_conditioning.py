"""Dropped conditions."""

import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax.conditions import conditioning
from im3d_jax.conditions.conditioning import Conditioning


@pytest.mark.parametrize("as_words", [True, False])
def test_dropped_conditions_are_those_of_nothing(as_words):
    rng = np.random.default_rng(0)
    text = (
        np.array([[1, 4], [2, 3], [3, 0], [4, 1]], np.int32)
        if as_words
        else rng.random((4, 2, 5), np.float32)
    )
    given = Conditioning(
        rng.random((4, 2, 2, 3), np.float32), np.ones(4, np.float32), (text,), (np.ones((4, 2)),)
    )
    tokens = rng.random((4, 1, 3), np.float32)
    given = given._replace(image_tokens=tokens)
    nothing = (7 * np.ones((1, *text.shape[1:]), text.dtype),), (np.array([[1, 0]]),)
    empty = Conditioning(np.zeros((1, 2, 2, 3)), np.zeros(1), *nothing)
    kept = conditioning.drop(given, empty, jnp.array([1.0, 1, 0, 0]), jnp.array([1.0, 0, 1, 0]))
    assert kept.image_mask.tolist() == [1, 1, 0, 0]
    assert np.array_equal(kept.image, given.image)
    for row, keep_text in enumerate([1, 0, 1, 0]):
        assert np.array_equal(kept.text[0][row], text[row] if keep_text else nothing[0][0][0])
        assert kept.text_mask[0][row].tolist() == ([1, 1] if keep_text else [1, 0])
    assert kept.text[0].dtype == text.dtype
    assert np.array_equal(kept.image_tokens[:2], tokens[:2]) and not kept.image_tokens[2:].any()
