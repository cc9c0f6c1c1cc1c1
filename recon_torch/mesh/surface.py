"""Closed surfaces as triangles: their orientation, volume, borders, pieces and normals. NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse import csgraph


class Surface(NamedTuple):
    """V points and F triangles between them, whose corners run counter-clockwise seen from outside."""

    vertices: Float[np.ndarray, "V 3"]
    triangles: Int[np.ndarray, "F 3"]

    @property
    def corners(self) -> Float[np.ndarray, "F 3 3"]:
        return self.vertices[self.triangles]

    @property
    def volume(self) -> float:
        """What a closed surface holds; negative if its triangles are inside out."""
        a, b, c = np.moveaxis(self.corners.astype(np.float64), 1, 0)
        return float((a * np.cross(b, c)).sum() / 6)

    @property
    def areas(self) -> Float[np.ndarray, " F"]:
        return np.linalg.norm(self._crosses(), axis=-1) / 2

    @property
    def is_watertight(self) -> bool:
        """Whether each edge joins exactly two triangles, which run along it in opposite directions."""
        if not len(self.triangles):
            return False
        edges = self._edges()
        both = np.concatenate([edges, edges[:, ::-1]])
        _, counts = np.unique(both, axis=0, return_counts=True)
        once_each_way = len(np.unique(edges, axis=0)) == len(edges)
        return bool(once_each_way and (counts == 2).all())

    def flipped(self) -> Surface:
        return self._replace(triangles=self.triangles[:, ::-1])

    def pieces(self) -> Int[np.ndarray, " F"]:
        """The number of the connected piece that each triangle belongs to, from 0."""
        edges, count = self._edges(), len(self.vertices)
        joined = sparse.coo_matrix((np.ones(len(edges), bool), edges.T), shape=(count, count))
        labels = csgraph.connected_components(joined, directed=False)[1][self.triangles[:, 0]]
        return np.unique(labels, return_inverse=True)[1]

    def part(self, chosen: np.ndarray) -> Surface:
        """Some of the triangles, by their mask or their numbers, and the vertices that they use."""
        used, numbers = np.unique(self.triangles[chosen], return_inverse=True)
        return Surface(self.vertices[used], numbers.reshape(-1, 3))

    def normals(self) -> Float[np.ndarray, "V 3"]:
        """Unit normals of the vertices: the mean over their triangles, weighted by the angles there."""
        corners, crosses = self.corners, self._crosses()
        flat = crosses / np.maximum(np.linalg.norm(crosses, axis=-1, keepdims=True), 1e-30)
        edges = np.roll(corners, -1, 1) - corners
        edges /= np.maximum(np.linalg.norm(edges, axis=-1, keepdims=True), 1e-30)
        angles = np.arccos(np.clip(-(edges * np.roll(edges, 1, 1)).sum(-1), -1, 1))
        weighted = (flat[:, None] * angles[..., None]).reshape(-1, 3)
        numbers, count = self.triangles.ravel(), len(self.vertices)
        summed = np.stack([np.bincount(numbers, weighted[:, axis], count) for axis in range(3)], -1)
        lengths = np.linalg.norm(summed, axis=-1, keepdims=True)
        return np.where(lengths > 1e-12, summed / np.maximum(lengths, 1e-12), [0.0, 0.0, 1.0])

    def _crosses(self) -> Float[np.ndarray, "F 3"]:
        corners = self.corners.astype(np.float64)
        return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])

    def _edges(self) -> Int[np.ndarray, "edges 2"]:
        return np.concatenate(
            [self.triangles[:, [0, 1]], self.triangles[:, [1, 2]], self.triangles[:, [2, 0]]]
        )


def joined(surface: Surface) -> Surface:
    """The surface with vertices of equal place made one, without triangles that have no area then.

    Two triangles of the same vertices are a flap that holds nothing, and are left out, too.
    """
    places, numbers = np.unique(surface.vertices, axis=0, return_inverse=True)
    triangles = numbers.reshape(-1)[surface.triangles]
    a, b, c = triangles.T
    triangles = triangles[(a != b) & (b != c) & (c != a)]
    _, same, counts = np.unique(np.sort(triangles, 1), axis=0, return_inverse=True, return_counts=True)
    return Surface(places, triangles).part(counts[same.reshape(-1)] == 1)
