"""What is said of prompts and pictures, and what it makes of the verdict."""

import numpy as np
import pytest

from im3d_jax import inputs
from im3d_jax.asset import Picture
from im3d_jax.conditions.words import Vocabulary

VOCABULARY = Vocabulary(("a", "car", "red", "with"))
IN_IT = "in the picture, the object"
CLEAR = Picture(np.ones((4, 4, 3)), np.ones((4, 4, 1)), "")
DOUBTFUL = CLEAR._replace(doubts=("may be cut off",), hints=("has a frame",))


def quality(verdict, *reasons):
    return {
        "verdict": verdict,
        "reasons": list(reasons),
        "hints": ["two faces?"],
        "numbers": {"coverage": 0.2},
    }


@pytest.mark.parametrize(
    ("prompt", "picture", "reasons", "hints"),
    [
        ("a red car", None, [], []),
        ("", CLEAR, [], []),
        ("a dog with a hat", None, ["nothing of the prompt was understood"], []),
        ("собака", None, ["nothing of the prompt was understood"], []),
        ("собака", CLEAR, [], ["nothing of the prompt was understood"]),
        ("a shiny red car", None, [], ["the prompt was understood in part (see not_understood)"]),
        ("", DOUBTFUL, [f"{IN_IT} may be cut off"], [f"{IN_IT} has a frame"]),
    ],
)  # fmt: skip
def test_doubts_about_inputs(prompt, picture, reasons, hints):
    seen = inputs.look(prompt, [picture] if picture else [], VOCABULARY)
    assert (seen.reasons, seen.hints) == (reasons, hints)
    assert seen.not_understood == VOCABULARY.warnings(prompt)


@pytest.mark.parametrize(
    ("gates", "doubts", "verdict"),
    [
        ("good", [], "good"),
        ("good", ["in the picture ..."], "suspect"),
        ("suspect", ["in the picture ..."], "suspect"),
        ("bad", ["in the picture ..."], "bad"),
    ],
)
def test_doubtful_inputs_make_a_good_asset_suspect(gates, doubts, verdict):
    judged = inputs.judge(quality(gates, "floaters"), inputs.Inputs(doubts, ["a hint"], []))
    assert judged == {
        "verdict": verdict,
        "reasons": [*doubts, "floaters"],
        "hints": ["a hint", "two faces?"],
        "numbers": {"coverage": 0.2},
    }
