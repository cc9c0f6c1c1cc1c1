"""How near a surface is to the true one: Chamfer distance, F-score and normal consistency.

Points are spread evenly over one surface, and the nearest point of the other is found for each: the nearest
of many samples of it tell the triangles that may hold it, on which it is then exact. The distance is never
too small, and rarely too large. So equal surfaces have a distance of 0, where a distance between samples
alone has a floor that depends on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from recon_torch.mesh.extra import needed

NUM_POINTS, NUM_SAMPLES = 10_000, 200_000
NEIGHBOURS = 8
"""Samples whose triangles are tried for each point."""
F_THRESHOLDS = (0.01, 0.02, 0.05)
"""In the world's unit, in which the object's bounding sphere has a diameter of at most 1."""

Triangles = Float[np.ndarray, "_ 3 3"]


class Samples(NamedTuple):
    """Points of a surface, and the triangles on which they lie."""

    points: Float[np.ndarray, "N 3"]
    triangle: Int[np.ndarray, " N"]


class Nearest(NamedTuple):
    """From each of N points of a surface to another surface.

    distances: to its nearest point. cosines: of the angle between the lines along the two normals, which has
        no sign, as many meshes are wound either way.
    """

    distances: Float[np.ndarray, " N"]
    cosines: Float[np.ndarray, " N"]


def compare(
    made: Triangles, truth: Triangles, thresholds: Sequence[float] = F_THRESHOLDS
) -> dict[str, float]:
    """Scores of a surface.

    `accuracy` is the mean distance from the made surface to the true one, `completeness` the one back, and
    `chamfer` the mean of the two (not their sum, and not squared). `f_T` is the harmonic mean of the shares
    of the points of either surface that are within T of the other. `normals` is the mean of the cosines both
    ways.

    Raises UserError if trimesh is not installed.
    """
    there, back = nearest(made, truth), nearest(truth, made)
    accuracy, completeness = (float(each.distances.mean()) for each in (there, back))
    scores = {
        "chamfer": (accuracy + completeness) / 2,
        "accuracy": accuracy,
        "completeness": completeness,
        "normals": float(there.cosines.mean() + back.cosines.mean()) / 2,
    }
    for threshold in thresholds:
        precision, recall = (float((each.distances <= threshold).mean()) for each in (there, back))
        total = precision + recall
        scores[f"f_{threshold:g}"] = 2 * precision * recall / total if total else 0.0
    return scores


def nearest(
    one: Triangles, other: Triangles, num_points: int = NUM_POINTS, num_samples: int = NUM_SAMPLES
) -> Nearest:
    """From points of one surface to the other."""
    closest_point = needed("trimesh.triangles").closest_point
    start, dense = sample(one, num_points, 0), sample(other, num_samples, 1)
    _, near = cKDTree(dense.points).query(start.points, k=NEIGHBOURS)
    candidates = dense.triangle[near]
    points = np.repeat(start.points, NEIGHBOURS, 0)
    on = closest_point(other[candidates.ravel()].astype(np.float64), points)
    distances = np.linalg.norm(on - points, axis=-1).reshape(candidates.shape)
    best = distances.argmin(1)
    rows = np.arange(len(best))
    normals = _normals(one)[start.triangle], _normals(other)[candidates[rows, best]]
    return Nearest(distances[rows, best], np.abs((normals[0] * normals[1]).sum(-1)))


def has_area(triangles: Triangles) -> bool:
    """Whether a surface can be sampled."""
    a, b, c = np.moveaxis(triangles.astype(np.float64), 1, 0)
    return bool(np.cross(b - a, c - a).any())


def sample(triangles: Triangles, count: int, seed: int) -> Samples:
    """Points spread evenly over triangles."""
    rng = np.random.default_rng(seed)
    a, b, c = np.moveaxis(triangles.astype(np.float64), 1, 0)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
    chosen = rng.choice(len(areas), count, p=areas / areas.sum())
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return Samples(a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen], chosen)


def _normals(triangles: Triangles) -> Float[np.ndarray, "F 3"]:
    a, b, c = np.moveaxis(triangles.astype(np.float64), 1, 0)
    crosses = np.cross(b - a, c - a)
    return crosses / np.maximum(np.linalg.norm(crosses, axis=-1, keepdims=True), 1e-30)
