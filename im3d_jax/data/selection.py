"""Which rendered objects are worth training on: by their views, by one another, and by their captions.

Paper: 100k assets, chosen by the similarity of CLIP between image and caption (Sec. 3.1); other rules are
unspecified in the paper. Here: rules with thresholds also leave out objects that the renders show to be
empty, faint on white, flat as a sheet, or a duplicate of another. No rule sees the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from im3d_jax.data.placement import object_of
from recon_torch.views.images import to_uint8
from recon_torch.views.resizing import resize

SMALL_VIEWS, SMALL_PX = 4, 8
"""The views that duplicates are found by: so many of an object, of this side."""

COMPARED_TOGETHER = 256  # objects, with all that are kept: 100 MB of distances for 100k of those

Vectors = Float[np.ndarray, "N d"]


class Rule(StrEnum):
    """Why an object is left out. The rules apply in this order, and the first that applies is named."""

    UNREADABLE = "unreadable"
    EMPTY = "empty"
    FAINT = "faint"
    SHEET = "sheet"
    NO_CAPTION = "no caption"
    DUPLICATE = "duplicate"
    LOW_SCORE = "low score"


class Thresholds(NamedTuple):
    """The thresholds of the rules; 0 turns a rule off.

    coverage, contrast, thinnest: the least of a `Measures`.
    distance: two objects whose small views differ by less are duplicates, see `distances`.
    cosine: two objects whose CLIP embeddings have a larger cosine are duplicates.
    keep: the share of the objects that is kept of those that all other rules leave, the best ones first.
    score: the least CLIP score.
    """

    coverage: float = 0.005
    contrast: float = 0.08
    thinnest: float = 0.04
    distance: float = 0.1
    cosine: float = 0.985
    keep: float = 0.0
    score: float = 0.0


class Measures(NamedTuple):
    """What the rules know of an object's views.

    coverage: the share of the picture that it covers, in the mean over the views.
    thinnest: its coverage in the view where that is smallest, as a share of that where it is largest.
    contrast: the mean difference from white of what it covers, in the channel in which that is largest.
    small: `SMALL_VIEWS` views of `SMALL_PX` pixels, as differences from white.
    """

    coverage: float
    thinnest: float
    contrast: float
    small: UInt8[np.ndarray, " N"]


class Candidate(NamedTuple):
    """An object that may be selected.

    Attributes:
        measures: None if it could not be read; then `problem` says why.
        has_caption: whether it has a caption that is not empty.
        mesh: the SHA-256 of its mesh's file; "" if that is not known.
        score: 100 times the mean cosine of its views' embeddings and its caption's; None without a CLIP.
        embedding: the mean of its views' CLIP embeddings, a unit vector; None without a CLIP.
    """

    name: str
    measures: Measures | None
    has_caption: bool = True
    mesh: str = ""
    score: float | None = None
    embedding: Float[np.ndarray, " d"] | None = None
    problem: str = ""


class Verdict(NamedTuple):
    """Why an object is left out: by which rule, and in what respect. rule: None if it is kept."""

    rule: Rule | None
    detail: str = ""


def measure(rgb: Float[np.ndarray, "K H W 3"], alpha: Float[np.ndarray, "K H W 1"]) -> Measures:
    """Measures an object's views, in [0, 1]. rgb: over white."""
    covered = alpha.mean((1, 2, 3), dtype=np.float64)
    thinnest = covered.min() / covered.max() if covered.any() else 0.0
    contrast = (1 - rgb).max(-1).sum(dtype=np.float64) / max(alpha.sum(dtype=np.float64), 1e-9)
    chosen = [at * len(rgb) // SMALL_VIEWS for at in range(SMALL_VIEWS)]
    small = np.stack([resize(1 - rgb[view], SMALL_PX, SMALL_PX) for view in chosen])
    return Measures(float(covered.mean()), float(thinnest), float(contrast), to_uint8(small).reshape(-1))


def select(candidates: Sequence[Candidate], limits: Thresholds, needs_caption: bool) -> list[Verdict]:
    """A verdict on every candidate. needs_caption: whether one without a caption is left out.

    Of two duplicates the one with the higher score is kept or, where there are no scores, the first one.
    """
    verdicts = [_alone(each, limits, needs_caption) for each in candidates]
    left = [number for number, verdict in enumerate(verdicts) if verdict.rule is None]
    left.sort(key=lambda number: -(candidates[number].score or 0.0))
    for number, verdict in _duplicates([candidates[number] for number in left], limits).items():
        verdicts[left[number]] = verdict
    left = [number for number in left if verdicts[number].rule is None]
    scored = [number for number in left if candidates[number].score is not None]
    num_kept = max(1, round(limits.keep * len(scored))) if limits.keep else len(scored)
    for place, number in enumerate(scored):
        score = candidates[number].score or 0.0
        if place >= num_kept:
            verdicts[number] = Verdict(Rule.LOW_SCORE, f"number {place + 1} of {len(scored)}")
        elif limits.score and score < limits.score:
            verdicts[number] = Verdict(Rule.LOW_SCORE, f"{score:.2f} < {limits.score:g}")
    return verdicts


def _alone(candidate: Candidate, limits: Thresholds, needs_caption: bool) -> Verdict:
    """The verdict of the rules that look at one object only."""
    measures = candidate.measures
    if measures is None:
        return Verdict(Rule.UNREADABLE, candidate.problem)
    rules = (
        (Rule.EMPTY, "coverage", measures.coverage, limits.coverage),
        (Rule.FAINT, "contrast", measures.contrast, limits.contrast),
        (Rule.SHEET, "thinnest", measures.thinnest, limits.thinnest),
    )
    for rule, name, value, least in rules:
        if value < least:
            return Verdict(rule, f"{name} {value:.4f} < {least:g}")
    if needs_caption and not candidate.has_caption:
        return Verdict(Rule.NO_CAPTION)
    return Verdict(None)


# ---- Duplicates ----


def _duplicates(candidates: Sequence[Candidate], limits: Thresholds) -> dict[int, Verdict]:
    """The verdicts on those that are duplicates of a candidate before them, by number."""
    if not candidates:
        return {}
    groups = [object_of(each.name) for each in candidates]
    found: dict[int, Verdict] = {}
    first: dict[str, int] = {}
    for number, each in enumerate(candidates):
        original = first.setdefault(each.mesh, number) if each.mesh else number
        if (limits.distance or limits.cosine) and groups[original] != groups[number]:
            found[number] = Verdict(Rule.DUPLICATE, f"same mesh file as {candidates[original].name}")
    if limits.distance:
        small = [each.measures.small for each in candidates if each.measures]
        vectors = np.array(small, np.float32) / 255
        _compare(vectors, "distance", limits.distance, candidates, groups, found)
    if limits.cosine and candidates[0].embedding is not None:
        embeddings = [each.embedding for each in candidates if each.embedding is not None]
        _compare(np.array(embeddings, np.float32), "cosine", limits.cosine, candidates, groups, found)
    return found


def _compare(
    vectors: Vectors,
    what: str,
    limit: float,
    candidates: Sequence[Candidate],
    groups: Sequence[str],
    found: dict[int, Verdict],
) -> None:
    """Adds the duplicates by one measure to those that were found before, which do not count any more."""
    rows = [number for number in range(len(vectors)) if number not in found]
    unlike: Callable[[Vectors, Vectors], np.ndarray] = distances if what == "distance" else cosine_distances
    bound = limit if what == "distance" else 1 - limit
    pairs = near_earlier(vectors[rows], [groups[row] for row in rows], unlike, bound)
    for row, (original, value) in pairs.items():
        shown = value if what == "distance" else 1 - value
        like = f"like {candidates[rows[original]].name}: {what} {shown:.4f}"
        found[rows[row]] = Verdict(Rule.DUPLICATE, like)


def distances(a: Vectors, b: Float[np.ndarray, "M d"]) -> Float[np.ndarray, "N M"]:
    """The distance of small views, as a share of how much the plainer of the two differs from white.

    It is 0 for equal views, about 1 for unlike ones, and depends little on how large the objects are.
    """
    a_squared, b_squared = (a**2).sum(1)[:, None], (b**2).sum(1)[None]
    squared = np.maximum(a_squared + b_squared - 2 * (a @ b.T), 0)
    return np.sqrt(squared / np.maximum(np.maximum(a_squared, b_squared), 1e-12))


def cosine_distances(a: Vectors, b: Float[np.ndarray, "M d"]) -> Float[np.ndarray, "N M"]:
    """1 minus the cosine of unit vectors."""
    return 1 - a @ b.T


def near_earlier(
    vectors: Vectors,
    groups: Sequence[str],
    unlike: Callable[[Vectors, Float[np.ndarray, "M d"]], Float[np.ndarray, "N M"]],
    limit: float,
) -> dict[int, tuple[int, float]]:
    """The vectors that are near one before them which is itself near none: row -> (that one's row, distance).

    Args:
        groups: of each vector. Those of one group are not compared: they are variants of one object.
        unlike: the distances between two sets of vectors.
        limit: what is less far is near.
    """
    found: dict[int, tuple[int, float]] = {}
    kept: list[int] = []
    for start in range(0, len(vectors), COMPARED_TOGETHER):
        block = vectors[start : start + COMPARED_TOGETHER]
        earlier = list(kept)  # those before this block
        far = unlike(block, vectors[[*earlier, *range(start, start + len(block))]])
        near: Bool[np.ndarray, "N M"] = far < limit
        columns = [*earlier, *range(start, start + len(block))]
        for row in range(len(block)):
            number = start + row
            others = [
                column
                for column in np.flatnonzero(near[row, : len(earlier) + row])
                if columns[column] not in found and groups[columns[column]] != groups[number]
            ]
            if others:
                closest = min(others, key=lambda column: far[row, column])  # noqa: B023 - used at once
                found[number] = columns[closest], float(far[row, closest])
            else:
                kept.append(number)
    return found
