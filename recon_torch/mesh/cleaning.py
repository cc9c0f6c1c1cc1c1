"""Surfaces without floaters, and with no more triangles than asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recon_torch.errors import UserError
from recon_torch.mesh.extra import needed
from recon_torch.mesh.surface import Surface, joined

AGGRESSION = (5.0, 3.0, 7.0)  # of the decimation: the first that leaves no hole is taken


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
    """At most so many triangles, by quadric errors (Garland and Heckbert 1997).

    The result is closed if the surface is, where any of several tries is so.

    Raises:
        UserError: nothing is left of the surface with so few triangles.
    """
    if len(surface.triangles) <= most_triangles:
        return surface
    tries = (_decimated(surface, most_triangles, aggression) for aggression in AGGRESSION)
    best: Surface | None = None
    for each in tries:
        if not 4 <= len(each.triangles) <= most_triangles or each.volume <= 0:
            continue
        if each.is_watertight:
            return each
        best = best or each
    if best is None:
        raise UserError(f"the surface cannot be made of {most_triangles} triangles; give more --triangles")
    return best


def _decimated(surface: Surface, most_triangles: int, aggression: float) -> Surface:
    vertices, triangles = needed("fast_simplification").simplify(
        surface.vertices, surface.triangles.astype(np.int32), target_count=most_triangles, agg=aggression
    )
    return joined(Surface(np.asarray(vertices, np.float64), np.asarray(triangles, np.int64)))


def check_watertight(surface: Surface) -> None:
    """Raises UserError for a surface that has holes or edges of more than two triangles."""
    if not surface.is_watertight:
        raise UserError(
            f"the mesh of {len(surface.triangles)} triangles is not watertight; "
            "give more --triangles, or another --level"
        )
