"""What a backbone is told besides the noisy views, and how a prompt and a picture become that (Sec. 3.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from recon_torch import export, masks
from recon_torch.errors import UserError

PLAIN_BORDER = 0.5  # share of the border that has one colour where the background is plain


class Conditioning(NamedTuple):
    """Conditions of B assets.

    image: latent of the conditioning image, which is view 0; image_mask: 1 where there is one.
    text: for each text encoder either embeddings [B, L, d] or, for a backbone with an encoder of its own,
    word indices [B, L]; text_mask: 1 at the words. The empty prompt is what its encoder makes of "".
    image_tokens: the image as an image encoder sees it, for a backbone that attends to it; elevation_rad: the
    cameras' elevation, for one that is told it. None where the backbone does not ask.
    """

    image: Float[Array, "B h w c"]
    image_mask: Float[Array, " B"]
    text: tuple[Array, ...]
    text_mask: tuple[Float[Array, "B L"], ...]
    image_tokens: Float[Array, "B L d"] | None = None
    elevation_rad: Float[Array, " B"] | None = None


class WordEncoder(nn.Module):
    """The tiny model's text encoder, trained with it: word and position embeddings, a transformer layer."""

    vocabulary: int
    dim: int
    num_heads: int = 4

    @nn.compact
    def __call__(self, words, mask):
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
    """Words of a `WordEncoder`; index 0 is the empty prompt and padding."""

    words: tuple[str, ...]
    max_words: int = 16

    def warnings(self, prompt: str) -> list[str]:
        """Names the words of `prompt` that the encoder was not trained on, if there are any."""
        unknown = [word for word in _split(prompt) if word not in self.words]
        known = ", ".join(self.words)
        message = f"words {', '.join(unknown)} are unknown to this model and left out; it knows: {known}"
        return [message] if unknown else []

    def encode(self, prompts: list[str]) -> tuple[tuple[np.ndarray], tuple[np.ndarray]]:
        """Word indices ([B, L] int32,) and mask ([B, L] float32,); no unknown words, none beyond L."""
        indices = np.zeros((len(prompts), self.max_words), np.int32)
        mask = np.zeros((len(prompts), self.max_words), np.float32)
        mask[:, 0] = 1
        lookup = {word: i + 1 for i, word in enumerate(self.words)}
        for row, prompt in enumerate(prompts):
            found = [lookup[word] for word in _split(prompt) if word in lookup][: self.max_words]
            indices[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return (indices,), (mask,)


def build_text(name: str, kwargs: dict):
    """What turns prompts into `Conditioning.text`: it has `encode`, `warnings` and the `words` that it knows.

    Args:
        name: "words", a `Vocabulary` for a backbone that carries its own encoder; "pretrained", see
            `encoders.TextEncoders`; "precomputed", what `im3d embed` wrote; "none" for a backbone without.
    """
    if name == "pretrained":
        from im3d_jax.encoders import TextEncoders  # needs the extra "hosted"

        return TextEncoders(kwargs["encoders"])
    if name == "precomputed":
        from im3d_jax.embed import PrecomputedText

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


def _split(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def no_conditions(model, text, batch: int) -> Conditioning:
    """No image and the empty prompt, for B assets. model: a backbone. text: see `build_text`."""
    encoded = jax.tree.map(jnp.asarray, text.encode([""] * batch))
    return model.empty_conditioning(batch)._replace(text=encoded[0], text_mask=encoded[1])


def drop(
    conditioning: Conditioning,
    empty: Conditioning,
    keep_image: Float[Array, " B"],
    keep_text: Float[Array, " B"],
) -> Conditioning:
    """Replaces the conditions of the assets whose keep is 0 by none, for training and for guidance.

    empty: one asset's conditions of no image and the empty prompt.
    """

    def choose(keep, values, nothing):
        keep = keep.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(keep > 0, values, nothing.astype(values.dtype))

    tokens = conditioning.image_tokens
    return conditioning._replace(
        image_mask=conditioning.image_mask * keep_image.astype(jnp.float32),
        text=tuple(choose(keep_text, *each) for each in zip(conditioning.text, empty.text, strict=True)),
        text_mask=tuple(
            choose(keep_text, *each) for each in zip(conditioning.text_mask, empty.text_mask, strict=True)
        ),
        image_tokens=None if tokens is None else choose(keep_image, tokens, jnp.zeros_like(tokens)),
    )


def load_image(
    path: str | Path, size: int, fill: float, background_tolerance: float, mask_weights: str = ""
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size 1"]]:
    """A user's picture as view 0, see `place`. Raises UserError also if the file cannot be read."""
    return place(export.read_image(path), str(path), size, fill, background_tolerance, mask_weights)


def place(
    picture: Float[np.ndarray, "H W C"],
    name: str,
    size: int,
    fill: float,
    background_tolerance: float,
    mask_weights: str = "",
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size 1"]]:
    """A picture as view 0: its object over white, centred, as large as those of the training views.

    The object is where alpha says; without alpha, where colours differ from the plain background; without
    a plain background, where IS-Net says.

    Args:
        picture: RGB or RGBA in [0, 1]. name: what errors call it.
        size: side of the square result in pixels.
        fill: share of the picture's side that the object's longer side gets.
        background_tolerance: difference from the background in [0, 1] that makes a pixel foreground.
        mask_weights: IS-Net's .onnx file, see `masks.isnet_masks`; "" for none.

    Returns (rgb, alpha), float32 in [0, 1]. Raises UserError if the picture holds no foreground, or has
    neither alpha nor a plain background and there are no mask weights.
    """
    rgb, alpha = picture[..., :3], picture[..., 3:]
    if not alpha.size or alpha.min() > 0.99:
        alpha = _foreground(rgb, name, background_tolerance, mask_weights)
    rows, columns = (np.flatnonzero(alpha[..., 0].max(axis) > 0.5) for axis in (1, 0))
    if not rows.size:
        raise UserError(f"{name} shows no object; give one with alpha or on a plain background")
    middle = np.array([rows[0] + rows[-1] + 1, columns[0] + columns[-1] + 1]) / 2
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    premultiplied = np.concatenate([rgb * alpha, alpha], -1)
    cut = _cut_square(premultiplied, middle, side / fill, size)
    return cut[..., :3] + 1 - cut[..., 3:], cut[..., 3:]


def _foreground(rgb: np.ndarray, name: str, tolerance: float, mask_weights: str) -> np.ndarray:
    """Foreground [H, W, 1] of a picture without alpha, which may touch much of the border."""
    background = masks.plain_background(rgb, tolerance, PLAIN_BORDER)
    if background is not None:
        return masks.threshold_masks(rgb[None], background, tolerance)[0]
    if not mask_weights:
        raise UserError(f"{name} has neither a plain background nor alpha; cut the object out as RGBA")
    return masks.isnet_masks(rgb[None], mask_weights)[0]


def _cut_square(picture: np.ndarray, middle: np.ndarray, side: float, size: int) -> np.ndarray:
    """The square [size, size, C] of `side` pixels around `middle` (row, column), empty beyond the picture."""
    corner = np.floor(middle - side / 2).astype(int)
    extent = int(np.ceil(side)) + 1
    first, last = np.maximum(corner, 0), np.minimum(corner + extent, picture.shape[:2])
    window = np.zeros((extent, extent, picture.shape[-1]), np.float32)
    inside = tuple(slice(a, b) for a, b in zip(first - corner, last - corner, strict=True))
    window[inside] = picture[first[0] : last[0], first[1] : last[1]]
    top, left = middle - side / 2 - corner
    box = (left, top, left + side, top + side)
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BOX, box=box))
        for channel in np.moveaxis(window, -1, 0)
    ]
    return np.stack(channels, -1).clip(0, 1)
