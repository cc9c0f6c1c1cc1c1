"""The text encoders that a config can name."""

from __future__ import annotations

from im3d_jax.conditions.words import Vocabulary
from recon_torch.errors import UserError


def build_text(name: str, kwargs: dict):
    """What turns prompts into `Conditioning.text`: it has `encode`, `warnings` and the `words` that it knows.

    Args:
        name: "words", a `Vocabulary` for a backbone that carries its own encoder; "pretrained", see
            `encoders.TextEncoders`; "precomputed", what `im3d embed` wrote; "none" for a backbone without.
    """
    if name == "pretrained":
        from im3d_jax.conditions.encoders import TextEncoders  # needs the extra "hosted"

        return TextEncoders(kwargs["encoders"])
    if name == "precomputed":
        from im3d_jax.conditions.precomputed import PrecomputedText

        return PrecomputedText(kwargs["path"])
    if name == "words":
        return Vocabulary(tuple(kwargs["words"]), kwargs["max_words"])
    if name == "none":
        return NoText()
    raise UserError(f"config.text.name: no {name!r}; there is words, pretrained, precomputed, none")


class NoText:
    """For backbones that take no text: prompts only serve to draw the image."""

    words = ()

    def warnings(self, prompt: str) -> list[str]:
        return []

    def encode(self, prompts: list[str]) -> tuple[tuple, tuple]:
        return (), ()
