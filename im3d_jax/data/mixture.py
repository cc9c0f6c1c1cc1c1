"""One source of several, whose examples stand in a fixed proportion in every stretch of the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from im3d_jax.data import Example, Source
from recon_torch.errors import UserError


class Part(NamedTuple):
    """A source of a mixture.

    weight: its share of the examples, in proportion to the other weights.
    shuffle: whether its examples come in a new order in every epoch of it, or in its own order.
    """

    source: Source
    weight: float
    shuffle: bool


class Mixture:
    """Examples of several sources. A `Source`, in which they stand one source after another.

    `order` says in which order they are trained on: it takes from each source by its weight, however large
    the source is, and begins a source anew when it has come to its end.
    """

    def __init__(self, parts: Sequence[Part]):
        """Raises UserError for a weight that is not positive, and for a source without examples."""
        for part in parts:
            if not (np.isfinite(part.weight) and part.weight > 0):
                raise UserError(f"a mixture has a part of weight {part.weight}; give weights above 0")
            if not len(part.source):
                raise UserError("a mixture has a part without objects; leave it out")
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part.source) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number].source[int(index - self._starts[number])]

    def order(self, seed: int) -> grain.MapDataset:
        """The endless order of the indices, any place of which is found without those before it."""
        orders = []
        for number, (source, _, shuffle) in enumerate(self.parts):
            start = int(self._starts[number])
            own = grain.MapDataset.range(start, start + len(source)).seed(seed + number)
            orders.append((own.shuffle() if shuffle else own).repeat())
        return grain.MapDataset.mix(orders, weights=[part.weight for part in self.parts])
