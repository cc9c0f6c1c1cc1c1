"""A ball of Gaussians whose surface, volume and colours are known."""

import math

import numpy as np
import pytest
import torch

from recon_torch.mesh.grid import Grid
from recon_torch.raster.gaussians import SH_C0, Gaussians

RADIUS = 0.3
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9)


@pytest.fixture(scope="session")
def ball() -> Gaussians:
    """A dense shell around a ball of radius 0.3: red where x > 0, blue elsewhere."""
    count, sigma = 1500, 0.012
    height = 1 - (2 * np.arange(count) + 1) / count
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    across = np.sqrt(1 - height**2)
    means = RADIUS * np.stack([across * np.cos(angle), across * np.sin(angle), height], -1)
    colors = np.where(means[:, :1] > 0, RED, BLUE)
    return Gaussians(
        torch.from_numpy(means).float(),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), math.log(sigma)),
        torch.full((count,), 4.0),
        torch.from_numpy((colors - 0.5) / SH_C0).float(),
    )


@pytest.fixture(scope="session")
def cube() -> Grid:
    """49 points along each axis of a cube of half width 0.48."""
    return Grid(np.full(3, -0.48), 0.02, (49, 49, 49))
