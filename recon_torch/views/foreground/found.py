"""What was found in a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

TOUCHES = 0.05  # share of a side of the picture that an object may touch without being cut off


class Found(NamedTuple):
    """An object in a picture.

    Attributes:
        rgb, coverage: in [0, 1]; colours are the object's own, also at its edges.
        mask: the pixels that belong to it, however transparent they are; none if there is no object.
        unsure: where the picture does not tell how much belongs to it, see `silhouette.unsure`; None where
            the coverage came with the picture.
        behind: the colours of the backdrop; None if there is none.
        doubts: on whether this is the object; each goes on after "the object" in a sentence.
        hints: what else is to be known, in the same way.
    """

    rgb: Float[np.ndarray, "H W 3"]
    coverage: Float[np.ndarray, "H W 1"]
    mask: Bool[np.ndarray, "H W"]
    doubts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    unsure: Bool[np.ndarray, "H W"] | None = None
    behind: Float[np.ndarray, "H W 3"] | None = None


def with_border(found: Found) -> Found:
    """Adds whether the object is cut off: it touches the border at some sides, but not all of them."""
    sides = [np.rot90(found.mask, turns)[0].mean() > TOUCHES for turns in range(4)]
    if not any(sides):
        return found
    if all(sides):
        return found._replace(hints=(*found.hints, "fills the picture up to the border on all sides"))
    return found._replace(doubts=(*found.doubts, "touches the border of the picture and may be cut off"))
