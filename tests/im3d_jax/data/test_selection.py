"""The rules of selection, on views and scores that were made by hand."""

import numpy as np
import pytest

from im3d_jax.data import selection
from im3d_jax.data.selection import Candidate, Measures, Rule, Thresholds, measure, select

NOTHING = Thresholds(0, 0, 0, 0, 0, 0, 0)


def views_of(widths, color=(0.2, 0.5, 0.9), size=16):
    """Views of a rectangle of half the height and these widths in pixels, over white."""
    alpha = np.zeros((len(widths), size, size, 1), np.float32)
    for view, width in enumerate(widths):
        alpha[view, 4:12, :width] = 1
    return (1 - alpha * (1 - np.float32(color))).astype(np.float32), alpha


def test_measures_of_rectangles():
    rgb, alpha = views_of([8, 2, 8, 2])
    found = measure(rgb, alpha)
    assert found.coverage == pytest.approx((8 * 8 + 8 * 2) / 2 / 256)
    assert found.thinnest == pytest.approx(2 / 8)
    assert found.contrast == pytest.approx(0.8)
    assert found.small.shape == (4 * 8 * 8 * 3,)
    first = found.small.reshape(4, 8, 8, 3)[0]
    inside = np.rint(255 * np.array([0.8, 0.5, 0.1]))
    np.testing.assert_allclose(first[4, 1], inside, atol=1)  # away from the edges, where filters differ
    np.testing.assert_array_equal(first[4, 7], [0, 0, 0])


def test_an_object_that_covers_nothing_has_no_measures_above_zero():
    rgb, alpha = views_of([0, 0])
    assert measure(rgb, alpha)[:3] == (0.0, 0.0, 0.0)


def measures(coverage=0.2, thinnest=0.5, contrast=0.6, small=0):
    return Measures(coverage, thinnest, contrast, np.full(12, small, np.uint8))


def rules(candidates, limits, needs_caption=False):
    return [verdict.rule for verdict in select(candidates, limits, needs_caption)]


def test_each_rule_has_its_threshold():
    candidates = [
        Candidate("good", measures()),
        Candidate("empty", measures(coverage=0.004)),
        Candidate("faint", measures(contrast=0.07)),
        Candidate("sheet", measures(thinnest=0.03)),
        Candidate("mute", measures(), has_caption=False),
        Candidate("broken", None, problem="no picture"),
    ]
    limits = NOTHING._replace(coverage=0.005, contrast=0.08, thinnest=0.04)
    expected = [None, Rule.EMPTY, Rule.FAINT, Rule.SHEET]
    assert rules(candidates, limits) == [*expected, None, Rule.UNREADABLE]
    assert rules(candidates, limits, True) == [*expected, Rule.NO_CAPTION, Rule.UNREADABLE]
    assert rules(candidates, NOTHING) == [None] * 5 + [Rule.UNREADABLE]
    verdicts = select(candidates, limits, False)
    assert verdicts[1].detail == "coverage 0.0040 < 0.005" and verdicts[5].detail == "no picture"


def scored(*scores):
    return [Candidate(str(number), measures(), score=score) for number, score in enumerate(scores)]


def test_the_best_share_or_what_is_above_a_threshold():
    candidates = scored(20.0, 30.0, 10.0, 40.0, 25.0)
    low = Rule.LOW_SCORE
    assert rules(candidates, NOTHING._replace(keep=0.4)) == [low, None, low, None, low]
    assert rules(candidates, NOTHING._replace(keep=0.01)) == [low, low, low, None, low]
    assert rules(candidates, NOTHING._replace(keep=1.0)) == [None] * 5
    assert rules(candidates, NOTHING._replace(score=25.0)) == [low, None, low, None, None]
    assert select(candidates, NOTHING._replace(keep=0.4), False)[4].detail == "number 3 of 5"


def test_the_share_is_of_what_the_rules_leave():
    candidates = [
        *scored(20.0, 30.0),
        *(Candidate(f"e{n}", measures(coverage=0.0), score=50.0) for n in range(8)),
    ]
    limits = NOTHING._replace(coverage=0.1, keep=0.5)
    assert rules(candidates, limits)[:2] == [Rule.LOW_SCORE, None]


def test_duplicates_by_mesh_views_and_embedding():
    unit = np.eye(3, dtype=np.float32)
    near = np.float32([1, 0.05, 0]) / np.linalg.norm([1, 0.05, 0])
    candidates = [
        Candidate("first", measures(small=100), mesh="aa", score=1.0, embedding=unit[0]),
        Candidate("same", measures(small=200), mesh="aa", score=3.0, embedding=unit[1]),
        Candidate("alike", measures(small=102), mesh="bb", score=0.5, embedding=unit[2]),
        Candidate("close", measures(small=50), mesh="cc", score=0.7, embedding=near),
    ]
    limits = NOTHING._replace(distance=0.1, cosine=0.99)
    found = select(candidates, limits, False)
    # The better of each pair stays: "same" for its mesh; then nothing is left that "alike" is near to.
    assert [verdict.rule for verdict in found] == [Rule.DUPLICATE, None, None, None]
    assert found[0].detail == "same mesh file as same"
    alone = [each._replace(mesh="") for each in candidates]
    found = select(alone, limits, False)
    assert [verdict.rule for verdict in found] == [None, None, Rule.DUPLICATE, Rule.DUPLICATE]
    assert found[2].detail == f"like first: distance {2 / 102:.4f}"
    assert found[3].detail == f"like first: cosine {near[0]:.4f}"
    assert rules(alone, NOTHING) == [None] * 4


def test_variants_of_an_object_are_not_its_duplicates():
    candidates = [
        Candidate(name, measures(small=100), mesh="aa") for name in ("mug", "mug~1", "mug~2", "cup")
    ]
    limits = NOTHING._replace(distance=0.1)
    assert rules(candidates, limits) == [None, None, None, Rule.DUPLICATE]


def test_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 30), np.float32), rng.random((4, 30), np.float32)
    for i in range(5):
        for j in range(4):
            largest = max(np.linalg.norm(a[i]), np.linalg.norm(b[j]))
            expected = np.linalg.norm(a[i].astype(float) - b[j]) / largest
            assert selection.distances(a, b)[i, j] == pytest.approx(expected, abs=1e-5)
            assert selection.cosine_distances(a, b)[i, j] == pytest.approx(1 - a[i] @ b[j], abs=1e-5)


def test_blocks_find_what_a_loop_over_pairs_finds(monkeypatch):
    monkeypatch.setattr(selection, "COMPARED_TOGETHER", 7)
    rng = np.random.default_rng(1)
    vectors = rng.random((60, 2), np.float32)
    groups = [str(number % 25) for number in range(60)]
    found = selection.near_earlier(vectors, groups, selection.distances, 0.15)
    kept, expected = [], {}
    for number in range(60):
        far = {k: float(selection.distances(vectors[[number]], vectors[[k]])[0, 0]) for k in kept}
        near = {k: d for k, d in far.items() if d < 0.15 and groups[k] != groups[number]}
        if near:
            expected[number] = min(near, key=lambda k: near[k])
        else:
            kept.append(number)
    assert {number: original for number, (original, _) in found.items()} == expected
    assert 10 < len(expected) < 50
