"""The contract of text encoders, and those that a config can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from im3d_jax.registry import Registry

Embeddings = tuple[Float[np.ndarray, "B _ _"] | Int[np.ndarray, "B _"], ...]
"""From each encoder: embeddings [B, L, d], or word indices [B, L] that the backbone embeds itself."""

Masks = tuple[Float[np.ndarray, "B _"], ...]
"""For each encoder a mask [B, L]: 1 at the tokens that the backbone attends to."""


@runtime_checkable
class TextEncoder(Protocol):
    """What turns prompts into `Conditioning.text` and `Conditioning.text_mask`.

    Attributes:
        words: the words that it knows, in the order of their indices, with which weights are trained; empty
            for an encoder that reads any text.
    """

    words: Sequence[str]

    def encode(self, prompts: Sequence[str]) -> tuple[Embeddings, Masks]:
        """The text of B prompts and its masks; "" is the empty prompt, which guidance asks for."""

    def warnings(self, prompt: str) -> list[str]:
        """A sentence on each thing in a prompt that is not encoded, such as words beyond the last token."""

    def understands(self, prompt: str) -> bool:
        """Whether anything of a prompt that tells what to make is encoded."""


class NoText:
    """The text encoder of a backbone that takes no text: prompts only serve to draw the image."""

    words = ()

    def encode(self, prompts: Sequence[str]) -> tuple[Embeddings, Masks]:
        return (), ()

    def warnings(self, prompt: str) -> list[str]:
        return []

    def understands(self, prompt: str) -> bool:
        return True  # to draw the image is what the prompt is for


TEXT_ENCODERS = Registry(
    key="config.text.name",
    attribute="TextEncoder",
    ours={
        "words": "im3d_jax.conditions.words:Vocabulary",
        "pretrained": "im3d_jax.conditions.encoders:PretrainedText",
        "precomputed": "im3d_jax.conditions.precomputed:PrecomputedText",
        "none": "im3d_jax.conditions.text:NoText",
    },
)


def build_text(name: str, kwargs: Mapping[str, Any]) -> TextEncoder:
    """The text encoder that a config names. Raises UserError as `Registry.build` does."""
    return TEXT_ENCODERS.build(name, kwargs, TextEncoder)
