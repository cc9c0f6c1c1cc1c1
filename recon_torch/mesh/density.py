"""The density of Gaussians on a grid: where it has a level is a surface (DreamGaussian, Sec. 3.3 there)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32

from recon_torch.kernel import FAST_MATH, kernel, run
from recon_torch.mesh.grid import SIGMAS, Grid
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.reference import rotation_matrices

THINNEST_CELLS = 0.5  # thinner Gaussians would fall between the points of the grid


def density(gaussians: Gaussians, grid: Grid) -> Float32[np.ndarray, "x y z"]:
    """The sum over Gaussians of opacity * exp(-d^2 / 2), d the distance in standard deviations.

    Standard deviations below half of a cell count as half of a cell.
    """
    scales = gaussians.scales.detach().double().cpu().clamp_min(THINNEST_CELLS * grid.cell)
    turns = rotation_matrices(gaussians.quats.detach().double().cpu())
    inverse = (turns / scales[:, None, :] ** 2) @ turns.transpose(1, 2)
    reach = SIGMAS * torch.sqrt((turns**2 * scales[:, None, :] ** 2).sum(-1))
    lower, cell = torch.from_numpy(grid.lower), grid.cell
    means = (gaussians.means.detach().double().cpu() - lower) / cell
    first = torch.ceil(means - reach / cell).clamp_min(0).long()
    last = torch.minimum(torch.floor(means + reach / cell).long(), torch.tensor(grid.shape) - 1)
    field = np.zeros(grid.shape, np.float32)
    run(
        _add_slabs,
        grid.shape[0],
        field,
        *(each.float().contiguous().numpy() for each in (means, inverse * cell**2)),
        gaussians.opacities.detach().float().cpu().contiguous().numpy(),
        first.numpy(),
        last.numpy(),
        grain=8,
    )
    return field


@kernel(fastmath=FAST_MATH)
def _add_slabs(begin, end, field, means, inverse, opacities, first, last):
    """Adds all Gaussians to the slabs x = begin ... end - 1; lengths are in cells."""
    for n in range(len(means)):
        for i in range(max(begin, first[n, 0]), min(end, last[n, 0] + 1)):
            x = np.float32(i) - means[n, 0]
            for j in range(first[n, 1], last[n, 1] + 1):
                y = np.float32(j) - means[n, 1]
                constant = (
                    inverse[n, 0, 0] * x * x
                    + inverse[n, 1, 1] * y * y
                    + np.float32(2) * inverse[n, 0, 1] * x * y
                )
                linear = np.float32(2) * (inverse[n, 0, 2] * x + inverse[n, 1, 2] * y)
                for k in range(first[n, 2], last[n, 2] + 1):
                    z = np.float32(k) - means[n, 2]
                    squared = constant + (linear + inverse[n, 2, 2] * z) * z
                    if squared < np.float32(9):
                        field[i, j, k] += opacities[n] * np.exp(np.float32(-0.5) * squared)
