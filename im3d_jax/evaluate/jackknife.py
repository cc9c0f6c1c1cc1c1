"""95% intervals of distances between two sets of pictures, by leaving out groups of their rows.

A bootstrap would draw some pictures twice, which these distances take for a narrower distribution. The
delete-a-group jackknife (Efron and Tibshirani 1993, ch. 11) draws none twice. The views of one object depend
on each other, so that groups are of whole rows; what is in a group is left out of both sets at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

GROUPS, LEAST_ROWS = 10, 5
ROWS_AT_ONCE = 1024

Vectors = Float[np.ndarray, "_ d"]
Groups = Int[np.ndarray, " _"]
Sums = Float[np.ndarray, "G G"]
Kernel = Callable[[Vectors, Vectors], Float[np.ndarray, "_ _"]]


def groups_of(made: Sequence[str], reference: Sequence[str]) -> tuple[Groups, Groups] | None:
    """The groups of two sets of pictures by the names of their rows, the same for a name in both.

    None where a set has too few rows to say anything of their spread.
    """
    fewest = min(len(set(made)), len(set(reference)))
    if fewest < LEAST_ROWS:
        return None
    count, number = min(GROUPS, fewest), dict[str, int]()
    for names in (sorted({*made}), sorted({*reference} - {*made})):
        number |= {name: place % count for place, name in enumerate(names)}
    made_of, reference_of = (np.array([number[name] for name in names]) for names in (made, reference))
    return made_of, reference_of


def interval(value: float, without: Float[np.ndarray, " G"], least: float = -np.inf) -> list[float]:
    """The 95% interval of a distance, of its values without each group. least: the least that it can be."""
    count = len(without)
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    half = float(scipy.stats.t.ppf(0.975, count - 1) * error)
    return [max(value - half, least), value + half]


def without_each(
    distance: Callable[[Vectors, Vectors], float],
    sets: tuple[Vectors, Vectors],
    groups: tuple[Groups, Groups],
) -> Float[np.ndarray, " G"]:
    """A distance of two sets without each group."""
    made, reference = sets
    return np.array(
        [distance(made[groups[0] != each], reference[groups[1] != each]) for each in _numbers(groups)]
    )


def mmd_without_each(
    kernel: Kernel, sets: tuple[Vectors, Vectors], groups: tuple[Groups, Groups], unbiased: bool
) -> Float[np.ndarray, " G"]:
    """The squared MMD of two sets without each group, from one pass over all pairs of vectors.

    unbiased: without the pairs of a vector with itself.
    """
    numbers = _numbers(groups)
    is_in = [(each[:, None] == numbers).astype(np.float64) for each in groups]
    left = [each.sum() - each.sum(0) for each in is_in]  # how many vectors are left
    within = [
        _left(_sums(kernel, one, one, members, members, unbiased))
        for one, members in zip(sets, is_in, strict=True)
    ]
    between = _left(_sums(kernel, sets[0], sets[1], is_in[0], is_in[1], False))
    pairs = [count * (count - unbiased) for count in left]
    return within[0] / pairs[0] + within[1] / pairs[1] - 2 * between / (left[0] * left[1])


def _numbers(groups: tuple[Groups, Groups]) -> Groups:
    return np.unique(np.concatenate(groups))


def _sums(
    kernel: Kernel,
    one: Vectors,
    other: Vectors,
    one_in: Float[np.ndarray, "_ G"],
    other_in: Float[np.ndarray, "_ G"],
    without_self: bool,
) -> Sums:
    """The sums of the kernel over all pairs, by the groups of the two vectors."""
    total = np.zeros((one_in.shape[1], other_in.shape[1]))
    for start in range(0, len(one), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        values = kernel(one[rows], other)
        if without_self:
            values[np.arange(len(values)), start + np.arange(len(values))] = 0
        total += one_in[rows].T @ values @ other_in
    return total


def _left(sums: Sums) -> Float[np.ndarray, " G"]:
    """The sums over all pairs neither of which is in a group."""
    return sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()
