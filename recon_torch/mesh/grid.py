"""A box of points around Gaussians, where fields are sampled, and the surface at which one has a level."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from scipy import ndimage

from recon_torch.errors import UserError
from recon_torch.mesh.extra import needed
from recon_torch.mesh.surface import Surface, joined
from recon_torch.raster.gaussians import Gaussians

SIGMAS = 3.0  # how far a Gaussian reaches
STRAY = 0.001  # the share of opacity beyond either end of an axis that is left out, as floaters lie there
FARTHEST = 1.2  # of the unit world; what lies beyond is no part of the object
MARGIN_CELLS = 3


class Grid(NamedTuple):
    """Points lower + cell * (i, j, k), where i, j and k count up to the shape."""

    lower: Float[np.ndarray, "3"]
    cell: float
    shape: tuple[int, int, int]


def grid_around(gaussians: Gaussians, resolution: int) -> Grid:
    """A grid around Gaussians in the unit world, with `resolution` cells along its longest side."""
    means = gaussians.means.detach().double().cpu().numpy()
    reach = SIGMAS * gaussians.scales.detach().double().max(-1).values.cpu().numpy()
    weights = gaussians.opacities.detach().double().cpu().numpy()
    lower, upper = np.empty(3), np.empty(3)
    for axis in range(3):
        order = np.argsort(means[:, axis], kind="stable")
        share = np.cumsum(weights[order]) / max(weights.sum(), 1e-30)
        kept = order[(share >= STRAY) & (share - weights[order] / max(weights.sum(), 1e-30) <= 1 - STRAY)]
        kept = kept if len(kept) else order
        lower[axis] = (means[kept, axis] - reach[kept]).min()
        upper[axis] = (means[kept, axis] + reach[kept]).max()
    lower, upper = lower.clip(-FARTHEST, FARTHEST), upper.clip(-FARTHEST, FARTHEST)
    cell = float(max((upper - lower).max(), 1e-6)) / (resolution - 2 * MARGIN_CELLS)
    shape = np.ceil((upper - lower) / cell).astype(int) + 2 * MARGIN_CELLS + 1
    return Grid(lower - MARGIN_CELLS * cell, cell, (int(shape[0]), int(shape[1]), int(shape[2])))


def surface_at(field: Float32[np.ndarray, "x y z"], level: float, grid: Grid) -> Surface:
    """The surface around all points where the field is above a level, by marching cubes (Lewiner).

    It is closed: outside of the grid there is nothing. Cavities without a way in are filled.

    Raises:
        UserError: the field is nowhere above the level.
    """
    measure = needed("skimage.measure")
    inside = ndimage.binary_fill_holes(field > level)
    if not inside.any():
        raise UserError(
            f"there is no surface: the field is nowhere above the level {level:g} (its maximum is "
            f"{field.max():.3g}); give a lower --level, or --method depth"
        )
    above = level + max(1.0, float(field.max()) - level)
    filled = np.where(inside & (field <= level), np.float32(above), field)
    padded = np.pad(filled, 1, constant_values=min(level - 1.0, float(field.min())))
    vertices, triangles, _, _ = measure.marching_cubes(padded, level)
    places = grid.lower + grid.cell * (vertices.astype(np.float64) - 1)
    surface = joined(Surface(places, triangles.astype(np.int64)))  # a point on the level has many vertices
    # skimage 0.26 runs around triangles so that they face what is larger.
    return surface if surface.volume > 0 else surface.flipped()
