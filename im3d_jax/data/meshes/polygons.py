"""Polygons, of .obj and .ply files, as triangles."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def triangulate(
    sizes: Int[np.ndarray, " P"], positions: Float[np.ndarray, "corners 3"]
) -> Int[np.ndarray, "F 3"]:
    """The triangles of P polygons, as indices into the corners of all.

    Convex polygons become fans, concave ones lose an ear after another. Those of fewer than three corners
    give nothing.

    Args:
        sizes: how many corners each polygon has.
        positions: of all corners, one polygon after the other.
    """
    starts = np.cumsum(sizes) - sizes
    found = [np.zeros((0, 3), np.int64)]
    order = [np.zeros(0, np.int64)]
    for size in np.unique(sizes[sizes >= 3]):
        polygons = np.flatnonzero(sizes == size)
        corners = starts[polygons][:, None] + np.arange(size)
        fan = np.stack([np.zeros(size - 2, int), np.arange(1, size - 1), np.arange(2, size)], -1)
        triangles = corners[:, fan]
        for number in np.flatnonzero(~_convex(positions[corners])) if size > 3 else ():
            triangles[number] = corners[number][_ears(positions[corners[number]])]
        found.append(triangles.reshape(-1, 3))
        order.append(np.repeat(polygons, size - 2))
    return np.concatenate(found)[np.argsort(np.concatenate(order), kind="stable")]


def _area_normals(corners: Float[np.ndarray, "*P size 3"]) -> Float[np.ndarray, "*P 3"]:
    """Normals by the polygons' areas (Newell), which dents do not turn around."""
    centred = corners - corners.mean(-2, keepdims=True)
    return np.cross(centred, np.roll(centred, -1, -2)).sum(-2)


def _turns(corners: Float[np.ndarray, "*P size 3"]) -> Float[np.ndarray, "*P size"]:
    """At each corner a number that is positive where the polygon is convex."""
    edges = np.roll(corners, -1, -2) - corners
    turns = np.cross(np.roll(edges, 1, -2), edges)
    return (turns * _area_normals(corners)[..., None, :]).sum(-1)


def _convex(corners: Float[np.ndarray, "P size 3"]) -> Bool[np.ndarray, " P"]:
    turns = _turns(corners)
    return (turns >= -1e-9 * np.abs(turns).max(-1, keepdims=True)).all(-1)


def _ears(corners: Float[np.ndarray, "size 3"]) -> Int[np.ndarray, "size-2 3"]:
    """Triangles of a concave polygon: again and again a convex corner with no other corner inside it."""
    normal = _area_normals(corners)
    left = list(range(len(corners)))
    triangles = []
    while len(left) > 3:
        for place in range(len(left)):
            ear = left[place - 1], left[place], left[(place + 1) % len(left)]
            others = [each for each in left if each not in ear]
            if _is_ear(corners[list(ear)], corners[others], normal):
                break
        else:
            place, ear = 1, (left[0], left[1], left[2])  # the polygon crosses itself: any corner will do
        triangles.append(ear)
        del left[place]
    return np.array([*triangles, left])


def _is_ear(
    ear: Float[np.ndarray, "3 3"], others: Float[np.ndarray, "rest 3"], normal: Float[np.ndarray, "3"]
) -> bool:
    edges = np.roll(ear, -1, 0) - ear
    if np.cross(edges[0], edges[1]) @ normal <= 0:
        return False
    sides = np.cross(edges[None], others[:, None] - ear[None]) @ normal
    return not (sides > 0).all(1).any()
