"""The splits of a data set."""

import numpy as np
import pytest

from im3d_jax.data import building


def test_splits_have_their_shares():
    shares = dict(train=0.9, validation=0.04, test=0.06)
    placed = [building.split_of(f"object {n}", shares) for n in range(20_000)]
    for name, share in shares.items():
        assert placed.count(name) / 20_000 == pytest.approx(
            share, abs=5 * np.sqrt(share * (1 - share) / 20_000)
        )
    assert building.split_of("a", {"train": 1.0, "test": 0.0}) == "train"


def test_the_name_alone_decides_the_split():
    shares = dict(train=0.5, test=0.5)
    assert [building.split_of(name, shares) for name in "abcd"] == ["test", "train", "train", "train"]
