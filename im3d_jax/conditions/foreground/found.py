"""What was found in a picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Found(NamedTuple):
    """An object in a picture.

    Attributes:
        rgb, coverage: in [0, 1]; colours are the object's own, also at its edges.
        mask: the pixels that belong to it, however transparent they are; none if there is no object.
        doubts: on whether this is the object; each goes on after "the object" in a sentence.
        hints: what else is to be known, in the same way.
    """

    rgb: Float[np.ndarray, "H W 3"]
    coverage: Float[np.ndarray, "H W 1"]
    mask: Bool[np.ndarray, "H W"]
    doubts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
