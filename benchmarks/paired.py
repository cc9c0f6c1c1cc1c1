"""Differences between two recipes over the same meshes, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # of the bootstrap


class Difference(NamedTuple):
    """mean: of the meshes' differences. low, high: its 95% interval by bootstrap over meshes. ahead: share of
    the meshes whose difference is above 0."""

    mean: float
    low: float
    high: float
    ahead: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f}), {self.ahead:.0%} ahead"


def difference(first: Mapping[str, list[float]], second: Mapping[str, list[float]]) -> Difference:
    """First minus second. Each gives a mesh the values of its seeds, in the same order, which are paired.

    Seeds of a mesh are averaged first: meshes are what the result is to hold for, so they are what is drawn.
    """
    both = sorted(first.keys() & second.keys())
    by_mesh = np.array([np.mean(np.subtract(first[name], second[name])) for name in both])
    draws = np.random.default_rng(0).integers(len(both), size=(DRAWS, len(both)))
    low, high = np.quantile(by_mesh[draws].mean(1), [0.025, 0.975])
    return Difference(float(by_mesh.mean()), float(low), float(high), float((by_mesh > 0).mean()))
