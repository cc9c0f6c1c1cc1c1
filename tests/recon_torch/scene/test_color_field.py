"""The sparse grid of colours, against SciPy and against plain PyTorch."""

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from recon_torch.scene import color_field, color_field_cpu
from recon_torch.scene.color_field import color_grid

INSIDE = np.linalg.norm(np.indices((20, 20, 20)) - 9.5, axis=0) < 6


def test_values_are_trilinear_and_there_wherever_something_is_inside():
    grid = color_grid(INSIDE, 0.5, 16)
    assert 0 < grid.num_rows - 1 < 0.7 * 17**3
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(grid.num_rows, 3, generator=generator)
    points = (torch.rand(200, 3, generator=generator) - 0.5) * 0.6
    points = points[points.norm(dim=-1) < 0.3]
    dense = table[grid.rows].numpy()
    places = (points.numpy() / 0.5 + 1) * 8
    expected = np.stack([map_coordinates(dense[..., c], places.T, order=1) for c in range(3)], -1)
    np.testing.assert_allclose(grid.values(table, points), expected, atol=1e-5)
    # No row that is needed here is the one that all points outside share.
    corners = np.floor(places).astype(int)[:, None] + np.indices((2, 2, 2)).reshape(3, -1).T
    assert grid.rows.numpy()[tuple(np.moveaxis(corners, -1, 0))].max() < grid.num_rows - 1


def test_the_kernels_agree_with_pytorch():
    grid, found = color_grid(INSIDE, 0.5, 12), []
    for gather in (color_field_cpu.gather, color_field.gather_by_torch):
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(grid.num_rows, 3, generator=generator, dtype=torch.float64).requires_grad_()
        places = (12 * torch.rand(60, 3, generator=generator, dtype=torch.float64)).requires_grad_()
        with torch.no_grad():
            places[0], places[1] = 12.0, 3.0  # the last point, and one in the middle
        values = gather(table, grid.rows, places)
        (values * torch.rand(values.shape, generator=generator, dtype=torch.float64)).sum().backward()
        found.append((values, table.grad, places.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
