"""Surfaces without floaters, and with no more triangles than asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon_torch.errors import UserError
from recon_torch.mesh.extra import needed
from recon_torch.mesh.surface import Surface, joined

GAP = 1e-4  # between parts that meet, by the size of the object


class Cleaned(NamedTuple):
    """A surface, and how many pieces are left out of it."""

    surface: Surface
    num_floaters: int


def without_floaters(surface: Surface, least_share: float) -> Cleaned:
    """Leaves out pieces whose share of the area is less; the largest piece stays in any case."""
    pieces = surface.pieces()
    areas = np.bincount(pieces, surface.areas)
    kept = areas >= min(least_share * areas.sum(), areas.max())
    return Cleaned(surface.part(kept[pieces]), int((~kept).sum()))


def decimated(surface: Surface, most_triangles: int) -> Surface:
    """At most so many triangles, by quadric errors (Garland and Heckbert 1997). Closed if the surface is.

    Raises:
        UserError: nothing is left of the surface with so few triangles.
    """
    if len(surface.triangles) <= most_triangles:
        return surface
    vertices, triangles = needed("fast_simplification").simplify(
        surface.vertices, surface.triangles.astype(np.int32), target_count=most_triangles
    )
    few = _apart(Surface(np.asarray(vertices, np.float64), np.asarray(triangles, np.int64)))
    if not 4 <= len(few.triangles) <= most_triangles or few.volume <= 0:
        raise UserError(f"the surface cannot be made of {most_triangles} triangles; give more --triangles")
    return few


def _apart(surface: Surface) -> Surface:
    """A closed surface with four or six triangles at an edge, where parts meet, as one with two at each.

    Decimation brings thin parts together. Other surfaces are only joined.
    """
    manifold3d = needed("manifold3d")
    corners = manifold3d.Mesh64(surface.vertices, surface.triangles.astype(np.uint64))
    solid = manifold3d.Manifold(corners)
    if solid.status() != manifold3d.Error.NoError or solid.is_empty():
        return joined(surface)
    found = solid.to_mesh64()
    apart = Surface(found.vert_properties[:, :3].copy(), found.tri_verts.astype(np.int64))
    # Tools join vertices of equal place, so those of parts that meet must not have the same.
    _, which, counts = np.unique(apart.vertices, axis=0, return_inverse=True, return_counts=True)
    meet = counts[which.reshape(-1)] > 1
    apart.vertices[meet] -= GAP * np.ptp(apart.vertices, axis=0).max() * apart.normals()[meet]
    return apart


def check_watertight(surface: Surface) -> None:
    """Raises UserError for a surface that has holes or edges of more than two triangles."""
    if not surface.is_watertight:
        raise UserError(
            f"the mesh of {len(surface.triangles)} triangles is not watertight; "
            "give more --triangles, or another --level"
        )
