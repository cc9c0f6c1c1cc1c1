"""Text encoders by name: ours, and those of a user's module."""

import numpy as np
import pytest

from im3d_jax.conditions.text import NoText, TextEncoder, build_text
from im3d_jax.conditions.words import Vocabulary
from recon_torch.errors import UserError

USERS = """
    import numpy as np

    class TextEncoder:
        words = ()

        def __init__(self, width=3):
            self.width = width

        def encode(self, prompts):
            text = np.stack([np.full((2, self.width), len(prompt), np.float32) for prompt in prompts])
            return (text,), (np.ones(text.shape[:2], np.float32),)

        def warnings(self, prompt):
            return []

        def understands(self, prompt):
            return True
"""


def test_our_text_encoders_satisfy_the_contract():
    words = build_text("words", {"words": ["a", "b"], "max_words": 4})
    assert words == Vocabulary(("a", "b"), 4)
    assert isinstance(words, TextEncoder)
    none = build_text("none", {})
    assert isinstance(none, NoText) and isinstance(none, TextEncoder)
    assert none.encode(["a prompt"]) == ((), ())


def test_a_users_text_encoder_is_built_by_the_name_of_its_module(user_module):
    (text,), (mask,) = build_text(user_module(USERS), {"width": 5}).encode(["", "abc"])
    assert text.shape == (2, 2, 5) and mask.shape == (2, 2)
    np.testing.assert_array_equal(text[1], 3)


def test_mistakes_are_one_line(user_module):
    with pytest.raises(UserError, match="config.text.name: no 'wrds'; did you mean 'words'"):
        build_text("wrds", {})
    with pytest.raises(UserError, match="config.text.name: words needs the argument words; add it"):
        build_text("words", {})
    with pytest.raises(UserError, match="config.text.name: none takes no argument path; remove it"):
        build_text("none", {"path": "x"})
    lacking = user_module(USERS.replace("def warnings", "def complaints"))
    with pytest.raises(UserError, match="user_pkg.part lacks warnings of the TextEncoder contract"):
        build_text(lacking, {})
