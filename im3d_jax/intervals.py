"""Intervals of means over prompts or objects, by bootstrap."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

PERCENTILES = (2.5, 97.5)
CHUNK = 1_000_000
NUM_RESAMPLES = 10_000


def bootstrap(values: Float[np.ndarray, " N"], num_resamples: int, seed: int) -> list[float]:
    """The 95% interval of a mean, by percentiles over resamples of the values with replacement.

    Efron and Tibshirani 1993, ch. 13. Of a single value both ends are that value, which says nothing.
    """
    rng, means = np.random.default_rng(seed), []
    at_once = max(1, CHUNK // len(values))
    for begin in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - begin)
        means.append(values[rng.integers(len(values), size=(count, len(values)))].mean(1))
    return [float(each) for each in np.percentile(np.concatenate(means), PERCENTILES)]
