"""Deformable marching tetrahedra (DMTet, Shen et al. 2021): a lattice of tetrahedra, and the surface in it.

The lattice is body-centred cubic: the corners and the centres of cubes. Where two cubes share a face, their
centres and each edge of the face make a tetrahedron. All have one shape, which is nearly regular.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EDGES = tuple(itertools.combinations(range(4), 2))  # of a tetrahedron
FULL = 24  # tetrahedra at a point that is not at the border of the lattice


class Lattice(NamedTuple):
    """N points, T tetrahedra that turn to the right (their volume is positive), and their E edges.

    Attributes:
        edges_of: the numbers of the edges of each tetrahedron, in the order of `EDGES`.
        is_rim: the points at the border, where a surface would not be closed if they were inside.
        spacing: the side of a cube.
    """

    points: Float[Tensor, "N 3"]
    tetrahedra: Int[Tensor, "T 4"]
    edges: Int[Tensor, "E 2"]
    edges_of: Int[Tensor, "T 6"]
    is_rim: Bool[Tensor, " N"]
    spacing: float

    def to(self, device: torch.device) -> Lattice:
        points, tetrahedra, edges, edges_of, is_rim = (each.to(device) for each in self[:-1])
        return Lattice(points, tetrahedra, edges, edges_of, is_rim, self.spacing)


def all_points(half_width: float, num_cells: int) -> Float[np.ndarray, "N 3"]:
    """The corners, then the centres, of num_cells^3 cubes that fill a cube around the origin."""
    corners = np.linspace(-half_width, half_width, num_cells + 1)
    centres = (corners[1:] + corners[:-1]) / 2
    grids = (np.meshgrid(each, each, each, indexing="ij") for each in (corners, centres))
    return np.concatenate([np.stack(grid, -1).reshape(-1, 3) for grid in grids])


def lattice(half_width: float, num_cells: int, kept: Bool[np.ndarray, " all"]) -> Lattice:
    """The tetrahedra whose four points are kept.

    Args:
        half_width, num_cells: of `all_points`.
        kept: which of all these points to keep. Those without a tetrahedron are left out.
    """
    chosen = _tetrahedra(num_cells)
    chosen = chosen[kept[chosen].all(1)]
    used = np.zeros(len(kept), bool)
    used[chosen] = True
    points, tetrahedra = all_points(half_width, num_cells)[used], (used.cumsum() - 1)[chosen]
    a, b, c, d = np.moveaxis(points[tetrahedra], 1, 0)
    turns_left = (np.cross(b - a, c - a) * (d - a)).sum(-1) < 0
    tetrahedra[turns_left] = tetrahedra[turns_left][:, [0, 1, 3, 2]]
    pairs = np.sort(tetrahedra[:, EDGES], -1).reshape(-1, 2)
    keys, numbers = np.unique(pairs[:, 0] * len(points) + pairs[:, 1], return_inverse=True)
    edges = np.stack(np.divmod(keys, len(points)), -1)
    is_rim = np.bincount(tetrahedra.ravel(), minlength=len(points)) < FULL
    return Lattice(
        points=torch.from_numpy(points.astype(np.float32)),
        tetrahedra=torch.from_numpy(tetrahedra),
        edges=torch.from_numpy(edges),
        edges_of=torch.from_numpy(numbers.reshape(-1, 6)),
        is_rim=torch.from_numpy(is_rim),
        spacing=2 * half_width / num_cells,
    )


def _tetrahedra(num_cells: int) -> Int[np.ndarray, "T 4"]:
    """All of them, as numbers of `all_points`."""
    corners = np.arange((num_cells + 1) ** 3).reshape([num_cells + 1] * 3)
    centres = corners.size + np.arange(num_cells**3).reshape([num_cells] * 3)
    found = []
    for axis in range(3):
        near, far = np.moveaxis(centres, axis, 0)[:-1], np.moveaxis(centres, axis, 0)[1:]
        face = np.moveaxis(corners, axis, 0)[1:-1]
        around = face[:, :-1, :-1], face[:, 1:, :-1], face[:, 1:, 1:], face[:, :-1, 1:]
        for one, other in zip(around, around[1:] + around[:1], strict=True):
            found.append(np.stack([near, far, one, other], -1).reshape(-1, 4))
    return np.concatenate(found)


class Extracted(NamedTuple):
    """A closed surface, and the edges of the lattice that its vertices lie on."""

    vertices: Float[Tensor, "V 3"]
    triangles: Int[Tensor, "F 3"]  # counter-clockwise seen from outside
    crossed: Int[Tensor, "V 2"]


def extract(points: Float[Tensor, "N 3"], distances: Float[Tensor, " N"], lattice: Lattice) -> Extracted:
    """The surface at distance 0, differentiable by points and distances; closed but where the rim is inside.

    Args:
        points: of the lattice, which may be moved.
        distances: signed; negative inside.
    """
    inside = distances < 0
    ends = lattice.edges
    is_crossed = inside[ends[:, 0]] != inside[ends[:, 1]]
    numbers = is_crossed.cumsum(0) - 1
    crossed = ends[is_crossed]
    near, far = distances[crossed].unbind(1)
    share = (near / (near - far))[:, None]
    vertices = points[crossed[:, 0]] * (1 - share) + points[crossed[:, 1]] * share

    bits = torch.tensor([1, 2, 4, 8], device=inside.device)
    codes = (inside[lattice.tetrahedra] * bits).sum(-1)
    cut = ((codes > 0) & (codes < 15)).nonzero()[:, 0]
    table = _table().to(inside.device)[codes[cut]]
    own = numbers[lattice.edges_of[cut]]
    triangles = own.gather(1, table.clamp_min(0).flatten(1)).view(-1, 3)
    return Extracted(vertices, triangles[(table >= 0).all(-1).flatten()], crossed)


@functools.cache
def _table() -> Int[Tensor, "16 2 3"]:
    """By which corners are inside (bit i for corner i): up to two triangles, as edges of `EDGES`; else -1."""
    table = torch.full((16, 2, 3), -1)
    for code in range(1, 15):
        inside = [corner for corner in range(4) if code >> corner & 1]
        outside = [corner for corner in range(4) if not code >> corner & 1]
        if len(inside) == 2:  # a quadrangle around the tetrahedron
            (a, b), (c, d) = inside, outside
            around = [(a, c), (a, d), (b, d), (b, c)]
        else:
            around = list(itertools.product(inside, outside))
        around = around if _faces_outwards(around, inside, outside) else around[::-1]
        edges = [EDGES.index((min(pair), max(pair))) for pair in around]
        for number in range(len(edges) - 2):
            table[code, number] = torch.tensor([edges[0], edges[number + 1], edges[number + 2]])
    return table


def _faces_outwards(around: list[tuple[int, int]], inside: list[int], outside: list[int]) -> bool:
    """Whether a polygon through the middles of edges of a tetrahedron runs counter-clockwise from outside."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    a, b, c = (corners[list(pair)].mean(0) for pair in around[:3])
    return bool(np.cross(b - a, c - a) @ (corners[outside].mean(0) - corners[inside].mean(0)) > 0)
