"""Records with what encoders and an autoencoder make of them, so that training does not run these."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from im3d_jax.autoencoders import Autoencoder
from im3d_jax.clips import Clip
from im3d_jax.conditions.text import TextEncoder
from im3d_jax.data.turntables import Record, decode_views
from recon_torch.errors import UserError

ENCODED_TOGETHER = 16  # objects


@runtime_checkable
class ImageEncoder(Protocol):
    """Makes the tokens of pictures that a backbone attends to."""

    def encode(self, rgb: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B L d"]: ...


@dataclass(frozen=True)
class Encoders:
    """What encodes records. Each part may be None: then records are left as they are in that respect.

    Attributes:
        text: encodes the captions.
        image: encodes view 0.
        codec: the autoencoder; its latents take the place of the views.
        size: side in pixels of the views that the autoencoder takes.
        clip: the clip of a config, as which the views are encoded; None: one by one.
    """

    text: TextEncoder | None = None
    image: ImageEncoder | None = None
    codec: Autoencoder | None = None
    size: int = 0
    clip: Clip | None = None

    def encode_all(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records with what the encoders make of them, several at a time."""
        records = iter(records)
        while together := list(islice(records, ENCODED_TOGETHER)):
            yield from self._encode(together)

    def _encode(self, records: list[Record]) -> list[Record]:
        added: list[dict[str, Any]] = [{} for _ in records]
        if self.text:
            text, mask = self.text.encode([record.caption for record in records])
            for row, new in enumerate(added):
                new["text"] = tuple(each[row] for each in text)
                new["text_mask"] = tuple(each[row] for each in mask)
        if self.image:
            first = np.stack([_decode(each, slice(1))[0][0] for each in records])
            for tokens, new in zip(self.image.encode(first), added, strict=True):
                new["image_tokens"] = tokens
        if self.codec:
            for record, new in zip(records, added, strict=True):
                new |= dict(latents=self._latents(self.codec, record), views=None)
        return [dataclasses.replace(record, **new) for record, new in zip(records, added, strict=True)]

    def _latents(self, codec: Autoencoder, record: Record) -> Float[np.ndarray, "F h w c"]:
        if record.size != self.size:
            raise UserError(
                f"--latents: config.size is {self.size}, the views are {record.size} px; match them"
            )
        rgb, alpha = _decode(record, slice(None))
        if self.clip:
            clip = self.clip.of_orbit(len(rgb))
            rgb, alpha = (np.asarray(clip.pictures(each[None]))[0] for each in (rgb, alpha))
        return np.asarray(codec.encode(rgb[None], alpha[None])[0])


def _decode(
    record: Record, which: slice
) -> tuple[Float[np.ndarray, "K H W 3"], Float[np.ndarray, "K H W 1"]]:
    """Some of the views: (rgb, alpha)."""
    assert record.views is not None, "records that are to be encoded have views"
    return decode_views(record.views[which], record.size)
