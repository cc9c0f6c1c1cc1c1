"""What a backbone is told besides the noisy views (Sec. 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from im3d_jax.conditions.text import TextEncoder


class Conditioning(NamedTuple):
    """The conditions of B assets.

    Attributes:
        image: latent of the conditioning image, which is view 0.
        image_mask: 1 where there is an image.
        text: of each text encoder either embeddings [B, L, d] or, for a backbone with an encoder of its own,
            word indices [B, L]. The empty prompt is what its encoder makes of "".
        text_mask: of each text encoder, 1 at the words.
        image_tokens: the image as an image encoder sees it; None for a backbone that does not attend to it.
        elevation_rad: of the cameras; None for a backbone that is not told it.
        clip: latents of a clip that begins with the image and is grey after it, zeros without an image; None
            for a backbone that is not told it, as Wan's image to video (2.1, and 2.2 A14B) is.
        sides: the same of further pictures, by the numbers of the views that they are; their `image` is that
            view. Backbones are not told these, see `generator.denoise_guided`.
    """

    image: Float[Array, "B h w c"]
    image_mask: Float[Array, " B"]
    text: tuple[Float[Array, "B L d"] | Int[Array, "B L"], ...]
    text_mask: tuple[Float[Array, "B L"], ...]
    image_tokens: Float[Array, "B L d"] | None = None
    elevation_rad: Float[Array, " B"] | None = None
    clip: Float[Array, "B F h w c"] | None = None
    sides: dict[int, Conditioning] | None = None


def no_conditions(empty: Conditioning, text: TextEncoder, prompt: str = "") -> Conditioning:
    """No image and the empty prompt, or the negative one in its place.

    empty: the backbone's `empty_conditioning`, whose text is zeros.
    """
    encoded, mask = jax.tree.map(jnp.asarray, text.encode([prompt] * empty.image.shape[0]))
    return empty._replace(text=encoded, text_mask=mask)


def drop(
    conditioning: Conditioning,
    empty: Conditioning,
    keep_image: Float[Array, " B"] | Bool[Array, " B"],
    keep_text: Float[Array, " B"] | Bool[Array, " B"],
) -> Conditioning:
    """Replaces the conditions of the assets whose keep is 0 by none, for training and for guidance.

    empty: one asset's conditions of no image and the empty prompt, see `no_conditions`.
    """

    def choose(keep, values, nothing):
        keep = keep.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(keep > 0, values, nothing.astype(values.dtype))

    def choose_text(values, nothing):
        return tuple(choose(keep_text, *each) for each in zip(values, nothing, strict=True))

    def choose_or_zeros(keep, values):
        return None if values is None else choose(keep, values, jnp.zeros_like(values))

    return conditioning._replace(
        image_mask=conditioning.image_mask * keep_image.astype(jnp.float32),
        text=choose_text(conditioning.text, empty.text),
        text_mask=choose_text(conditioning.text_mask, empty.text_mask),
        image_tokens=choose_or_zeros(keep_image, conditioning.image_tokens),
        clip=choose_or_zeros(keep_image, conditioning.clip),
    )
