"""The tiny model's own words: their vocabulary, and an encoder that is trained with the network."""

from __future__ import annotations

import difflib
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int

from im3d_jax.conditions.text import Embeddings, Masks
from recon_torch.ranges import Range

MAX_SHOWN = 60
"""So many known words are listed in a warning."""

MAX_NAMED = 12
"""So many words that are left out are named in a warning."""

FUNCTION_WORDS = {
    "a",
    "an",
    "and",
    "at",
    "by",
    "for",
    "from",
    "in",
    "is",
    "it",
    "of",
    "on",
    "or",
    "the",
    "to",
    "with",
}
"""Words that alone do not say what to make."""


class WordEncoder(nn.Module):
    """Word and position embeddings, and one transformer layer."""

    vocabulary: int
    dim: int
    num_heads: int = 4

    @nn.compact
    def __call__(self, words: Int[Array, "B L"], mask: Float[Array, "B L"]) -> Float[Array, "B L d"]:
        x = nn.Embed(self.vocabulary, self.dim, name="words")(words)
        x += self.param("positions", nn.initializers.normal(0.02), (words.shape[1], self.dim))[None]
        y = nn.LayerNorm(name="norm1")(x)
        allowed = (mask > 0)[:, None, None, :]
        x += nn.MultiHeadDotProductAttention(self.num_heads, name="attention")(y, y, mask=allowed)
        y = nn.LayerNorm(name="norm2")(x)
        x += nn.Dense(self.dim, name="ff_out")(nn.gelu(nn.Dense(4 * self.dim, name="ff_in")(y)))
        return nn.LayerNorm(name="norm_out")(x)


@dataclass(frozen=True)
class Vocabulary:
    """The text encoder of a backbone that embeds word indices itself, by a `WordEncoder`.

    Index 0 is the empty prompt and padding.
    """

    words: Sequence[str]
    max_words: Annotated[int, Range(1, 4096)] = 16

    def __post_init__(self):
        object.__setattr__(self, "words", tuple(self.words))  # a config read from JSON has a list

    def encode(self, prompts: Sequence[str]) -> tuple[Embeddings, Masks]:
        """Word indices ([B, L] int32,) and their mask ([B, L] float32,), with L = `max_words`.

        Unknown words and those beyond the last index are left out.
        """
        indices = np.zeros((len(prompts), self.max_words), np.int32)
        mask = np.zeros((len(prompts), self.max_words), np.float32)
        mask[:, 0] = 1
        lookup = {word: i + 1 for i, word in enumerate(self.words)}
        for row, prompt in enumerate(prompts):
            found = [lookup[word] for word in split_words(prompt) if word in lookup][: self.max_words]
            indices[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return (indices,), (mask,)

    def warnings(self, prompt: str) -> list[str]:
        """Names the words that the encoder was not trained on, and those beyond the last index."""
        words = split_words(prompt)
        unknown = [word for word in words if word not in self.words]
        beyond = [word for word in words if word in self.words][self.max_words :]
        warnings = []
        if unknown:
            near = [each for word in unknown for each in difflib.get_close_matches(word, self.words, n=2)]
            hint = f"did you mean {_listed(near)}?" if near else self._known()
            warnings.append(f"words {_listed(unknown)} are unknown to this model and left out; {hint}")
        if beyond:
            text = f"this model reads {self.max_words} words and leaves out the last {len(beyond)}"
            warnings.append(f"{text}: {_listed(beyond)}")
        return warnings

    def understands(self, prompt: str) -> bool:
        """Whether the encoder knows a word that is more than an article or the like."""
        return any(word in self.words and word not in FUNCTION_WORDS for word in split_words(prompt))

    def _known(self) -> str:
        shown = ", ".join(self.words[:MAX_SHOWN])
        return f"it knows: {shown}" + (
            f", ... ({len(self.words)} words)" if len(self.words) > MAX_SHOWN else ""
        )


def split_words(text: str) -> list[str]:
    """The words of a prompt or a caption, in lower case: letters and digits of any script.

    Punctuation separates words. Runs of symbols are words, so that an emoji is not passed over.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return ["".join(run) for kind, run in itertools.groupby(_visible(text), _kind) if kind is not None]


def _visible(text: str) -> Iterator[str]:
    """The characters without those that only join or vary the ones before them."""
    symbol = False
    for character in text:
        category = unicodedata.category(character)
        if category != "Cf" and not (symbol and category.startswith("M")):
            symbol = category.startswith("S")
            yield character


def _kind(character: str) -> str | None:
    """What runs of a character a word is made of; None for spaces and punctuation."""
    category = unicodedata.category(character)
    if category[0] in "LMN":
        return "letters"
    return None if category[0] in "PZ" or category == "Cc" else "symbols"


def _listed(words: Sequence[str]) -> str:
    """The words, each once; of many the first ones."""
    words = list(dict.fromkeys(words))
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    return ", ".join(words[:MAX_NAMED]) + more
