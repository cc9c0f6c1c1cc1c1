"""Where Gaussians take light from rays, on a grid: what the quality gates search for floaters and floors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster.gaussians import Gaussians

MOST_POINTS = 4096  # drawn from one Gaussian


def opacity_grid(gaussians: Gaussians, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
    """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z).

    Each Gaussian spreads its opacity times its mean shadow over points that are drawn from itself, as many
    as its shadow has cells. What lies outside of the cube counts for the nearest cell of its surface.
    """
    cell = 2 * half_width / num_cells
    x, y, z = gaussians.scales.unbind(-1)
    shadows = 2 * math.pi / 3 * (x * y + y * z + z * x) / cell**2
    counts = shadows.ceil().clamp(1, MOST_POINTS).long()
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    draws = (
        torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0)).to(x) * gaussians.scales[index]
    )
    axis = F.normalize(gaussians.quats, dim=-1)[index]
    real, imaginary = axis[:, :1], axis[:, 1:]
    turned = torch.linalg.cross(imaginary, draws)
    points = gaussians.means[index] + draws + 2 * (real * turned + torch.linalg.cross(imaginary, turned))
    cells = ((points + half_width) / cell).long().clamp(0, num_cells - 1)
    flat = (cells * cells.new_tensor([num_cells**2, num_cells, 1])).sum(-1)
    grid = torch.zeros(num_cells**3, device=x.device)
    grid.index_add_(0, flat, (gaussians.opacities * shadows / counts)[index])
    return grid.clamp_max(1).view(num_cells, num_cells, num_cells)
