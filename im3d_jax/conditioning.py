"""Conditioning: what a backbone is told besides the noisy views, and how a prompt becomes that (Sec. 3.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Conditioning(NamedTuple):
    """Conditions of B assets.

    image: latent of the conditioning image, which is view 0; image_mask: 1 where there is one.
    text: for each text encoder either embeddings [B, L, d] or, for a backbone with an encoder of its own, word
    indices [B, L]; text_mask: 1 at the words. The empty prompt is one word of index 0 or of zeros.
    """

    image: Float[Array, "B h w c"]
    image_mask: Float[Array, " B"]
    text: tuple[Array, ...]
    text_mask: tuple[Float[Array, "B L"], ...]


class WordEncoder(nn.Module):
    """The tiny model's text encoder: word and position embeddings and one transformer layer, trained with it."""

    vocabulary: int
    dim: int
    num_heads: int = 4

    @nn.compact
    def __call__(self, words, mask):
        x = nn.Embed(self.vocabulary, self.dim, name="words")(words)
        x += self.param("positions", nn.initializers.normal(0.02), (words.shape[1], self.dim))
        y = nn.LayerNorm(name="norm1")(x)
        allowed = (mask > 0)[:, None, None, :]
        x += nn.MultiHeadDotProductAttention(self.num_heads, name="attention")(y, y, mask=allowed)
        y = nn.LayerNorm(name="norm2")(x)
        x += nn.Dense(self.dim, name="ff_out")(nn.gelu(nn.Dense(4 * self.dim, name="ff_in")(y)))
        return nn.LayerNorm(name="norm_out")(x)


@dataclass(frozen=True)
class Vocabulary:
    """Words of a `WordEncoder`; index 0 is the empty prompt and padding."""

    words: tuple[str, ...]
    max_words: int = 16

    def unknown(self, prompt: str) -> list[str]:
        """The words of `prompt` that the encoder was not trained on."""
        return [word for word in _split(prompt) if word not in self.words]

    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Word indices [B, L] int32 and mask [B, L] float32. Unknown words are left out, those beyond L cut."""
        indices = np.zeros((len(prompts), self.max_words), np.int32)
        mask = np.zeros((len(prompts), self.max_words), np.float32)
        mask[:, 0] = 1
        lookup = {word: i + 1 for i, word in enumerate(self.words)}
        for row, prompt in enumerate(prompts):
            found = [lookup[word] for word in _split(prompt) if word in lookup][: self.max_words]
            indices[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return indices, mask


def _split(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def drop(conditioning: Conditioning, keep_image: Float[Array, " B"], keep_text: Float[Array, " B"]) -> Conditioning:
    """Replaces the conditions of the assets whose keep is 0 by none, for training and for guidance."""

    def empty(text):
        return text * keep_text.reshape(-1, *[1] * (text.ndim - 1)).astype(text.dtype)

    keep_image, keep_text = keep_image.astype(jnp.float32), keep_text.astype(jnp.float32)
    first = jnp.zeros_like(conditioning.text_mask[0]).at[:, 0].set(1)
    masks = tuple(jnp.where(keep_text[:, None] > 0, mask, first) for mask in conditioning.text_mask)
    text = tuple(empty(text) for text in conditioning.text)
    return Conditioning(conditioning.image, conditioning.image_mask * keep_image, text, masks)
