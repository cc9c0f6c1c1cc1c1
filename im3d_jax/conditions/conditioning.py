"""What a backbone is told besides the noisy views, and how a prompt and a picture become that (Sec. 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
