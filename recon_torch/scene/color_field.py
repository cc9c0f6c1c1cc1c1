"""Colours in space on a sparse grid, as a sum of octaves, so that large parts get theirs first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from recon_torch.scene import color_field_cpu

OCTAVES = (4, 2, 1)  # what the number of cells is divided by
REACH_CELLS = 2  # by which a grid goes beyond where colours are asked for


class ColorGrid(NamedTuple):
    """The points of a cubic grid that have a row of their own; all others share the last row.

    Attributes:
        rows: of each point, by x, y, z.
        half_width: of the cube around the origin that the grid fills.
    """

    rows: Int[Tensor, "n n n"]
    half_width: float

    def to(self, device: torch.device) -> ColorGrid:
        return self._replace(rows=self.rows.to(device))

    @property
    def num_rows(self) -> int:
        return int(self.rows.max()) + 1

    def values(self, table: Float[Tensor, "rows C"], points: Float[Tensor, "P 3"]) -> Float[Tensor, "P C"]:
        """Trilinear; differentiable by the table, which has a value for each row, and by the points."""
        last = self.rows.shape[0] - 1
        places = ((points / self.half_width + 1) * (0.5 * last)).clamp(0, last)
        gather = color_field_cpu.gather if points.device.type == "cpu" else gather_by_torch
        return gather(table, self.rows, places)


def gather_by_torch(
    table: Float[Tensor, "rows C"], rows: Int[Tensor, "n n n"], places: Float[Tensor, "P 3"]
) -> Float[Tensor, "P C"]:
    """The same as `color_field_cpu.gather`, on any device."""
    size = rows.shape[0]
    first = places.detach().floor().clamp_max(size - 2)
    shares = torch.stack([first + 1 - places, places - first], 1)
    x, y, z = shares.unbind(-1)
    weights = x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]
    both = torch.arange(2, device=rows.device)
    corners = torch.cartesian_prod(both, both, both) + first.long()[:, None]
    found = table.index_select(0, rows[corners.unbind(-1)].flatten())
    return (found.view(len(places), 8, -1) * weights.reshape(-1, 8, 1)).sum(1)


def color_grid(inside: Bool[np.ndarray, "m m m"], half_width: float, num_cells: int) -> ColorGrid:
    """A grid with rows wherever one of the m^3 cells of the same cube is inside, and somewhat beyond."""
    ticks = (np.arange(num_cells + 1) / num_cells * len(inside)).astype(int).clip(max=len(inside) - 1)
    kept = ndimage.binary_dilation(inside, np.ones((3, 3, 3)))[np.ix_(ticks, ticks, ticks)]
    kept = ndimage.binary_dilation(kept, np.ones((3, 3, 3)), iterations=REACH_CELLS)
    rows = np.full(kept.shape, kept.sum())
    rows[kept] = np.arange(kept.sum())
    return ColorGrid(torch.from_numpy(rows), half_width)
