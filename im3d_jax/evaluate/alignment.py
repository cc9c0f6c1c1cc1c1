"""Brings a surface to the true one before the two are compared, where that is asked for.

A method that keeps to no scale and to no front scores badly for that alone. What an alignment makes up for is
no longer measured, so none is the default, and a result names the one that it has.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from im3d_jax.evaluate.surfaces import Triangles, sample
from recon_torch.mesh.extra import needed

NUM_POINTS, NUM_TRUTH = 2000, 20_000
COARSE_DEG, FINE_DEG = 5.0, 0.5
MOST_STEPS = 50


class Alignment(StrEnum):
    """What of a surface's place is fitted to the truth; each of them does what those before it do.

    NONE: nothing. SIZE: the centre of the bounding box, and the distance of the farthest point from it. YAW:
    the angle about the upright axis. ICP: rotation, shift and scale, to the nearest points.
    """

    NONE = "none"
    SIZE = "size"
    YAW = "yaw"
    ICP = "icp"


def to_truth(made: Triangles, truth: Triangles, alignment: Alignment) -> Float[np.ndarray, "4 4"]:
    """The matrix, of a similarity, that takes homogeneous points of a surface to the truth, with +Z up.

    Raises UserError if trimesh is not installed.
    """
    matrix = np.eye(4)
    if alignment == Alignment.NONE:
        return matrix
    matrix = _placed(truth) @ np.linalg.inv(_placed(made))
    if alignment == Alignment.SIZE:
        return matrix
    points = sample(made, NUM_POINTS, 0).points, sample(truth, NUM_TRUTH, 1).points
    center = _placed(truth)[:3, 3]
    matrix = _best_yaw(moved(points[0], matrix), points[1][:NUM_POINTS], center) @ matrix
    if alignment == Alignment.YAW:
        return matrix
    icp = needed("trimesh.registration").icp
    found, _, _ = icp(points[0], points[1], matrix, max_iterations=MOST_STEPS, reflection=False)
    return np.asarray(found, np.float64)


def moved(points: Float[np.ndarray, "*N 3"], matrix: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "*N 3"]:
    """Points, or corners of triangles, after a `to_truth`."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _placed(triangles: Triangles) -> Float[np.ndarray, "4 4"]:
    """From the ball of radius 1 at the origin to that around the centre of the surface's bounding box."""
    points = triangles.reshape(-1, 3).astype(np.float64)
    center = points.min(0) / 2 + points.max(0) / 2
    matrix = np.diag([*[np.linalg.norm(points - center, axis=-1).max()] * 3, 1.0])
    matrix[:3, 3] = center
    return matrix


def _best_yaw(
    points: Float[np.ndarray, "N 3"], truth: Float[np.ndarray, "N 3"], center: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "4 4"]:
    """The rotation about the upright axis through the centre with the least Chamfer distance."""
    trees = cKDTree(points), cKDTree(truth)

    def distance(yaw_deg: float) -> float:
        turn = _turn(yaw_deg, center)
        there, _ = trees[1].query(moved(points, turn))
        back, _ = trees[0].query(moved(truth, np.linalg.inv(turn)))
        return float(there.mean() + back.mean())

    coarse = min(np.arange(0, 360, COARSE_DEG), key=distance)
    fine = coarse + np.arange(-COARSE_DEG, COARSE_DEG + FINE_DEG, FINE_DEG)
    return _turn(min(fine, key=distance), center)


def _turn(yaw_deg: float, center: Float[np.ndarray, "3"]) -> Float[np.ndarray, "4 4"]:
    cos, sin = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    matrix = np.eye(4)
    matrix[:2, :2] = [[cos, -sin], [sin, cos]]
    matrix[:3, 3] = center - matrix[:3, :3] @ center
    return matrix
