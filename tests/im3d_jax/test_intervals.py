"""Intervals by bootstrap."""

import numpy as np
from scipy.stats import binom

from im3d_jax.intervals import bootstrap


def test_the_bootstrap_of_zeros_and_ones_is_binomial():
    values = np.repeat([0.0, 1.0], [30, 70])
    low, high = bootstrap(values, 200_000, 0)
    exact = binom(100, 0.7).ppf([0.025, 0.975]) / 100
    np.testing.assert_allclose(
        [low, high], exact, atol=0.0101
    )  # of a step, where a percentile is on its edge
    assert bootstrap(values, 1000, 1) == bootstrap(values, 1000, 1)
    assert bootstrap(np.array([0.4]), 100, 0) == [0.4, 0.4]
