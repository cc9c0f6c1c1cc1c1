"""Marching tetrahedra: closed surfaces of the right area and volume, and gradients."""

import numpy as np
import pytest
import torch

from recon_torch.mesh.surface import Surface
from recon_torch.scene import tetrahedra
from recon_torch.scene.tetrahedra import extract

CELLS = 16


@pytest.fixture(scope="module")
def whole():
    kept = np.ones(len(tetrahedra.all_points(0.5, CELLS)), bool)
    return tetrahedra.lattice(0.5, CELLS, kept)


def surface_of(found) -> Surface:
    return Surface(found.vertices.double().numpy(), found.triangles.numpy())


def test_the_lattice_is_of_one_tetrahedron_and_fills_space(whole):
    a, b, c, d = whole.points.double()[whole.tetrahedra].unbind(1)
    volumes = (torch.linalg.cross(b - a, c - a) * (d - a)).sum(-1) / 6
    torch.testing.assert_close(volumes, torch.full_like(volumes, whole.spacing**3 / 12), rtol=1e-4, atol=0)
    inner = ~whole.is_rim
    assert whole.points[inner].abs().max() < 0.5
    # Around each inner point the tetrahedra have the volume that the lattice gives each of them.
    around = torch.zeros(len(inner), dtype=torch.float64).index_add_(
        0, whole.tetrahedra.flatten(), volumes.repeat_interleave(4)
    )
    torch.testing.assert_close(
        around[inner], torch.full_like(around[inner], 24 / 12 * whole.spacing**3), rtol=1e-4, atol=0
    )


def test_a_sphere_is_closed_and_has_its_area_and_volume(whole):
    found = extract(whole.points, whole.points.norm(dim=-1) - 0.35, whole)
    surface = surface_of(found)
    assert surface.is_watertight and surface.pieces().max() == 0
    assert surface.volume == pytest.approx(4 / 3 * np.pi * 0.35**3, rel=0.01)
    assert surface.areas.sum() == pytest.approx(4 * np.pi * 0.35**2, rel=0.01)
    np.testing.assert_allclose(np.linalg.norm(surface.vertices, axis=-1), 0.35, atol=2e-3)


def test_any_signs_give_a_closed_surface_around_what_is_inside(whole):
    """All cases of the table meet; the volume is that of the parts of tetrahedra below 0, as sampled."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.randn(len(whole.points), generator=generator)
    distances = torch.where(whole.is_rim, distances.abs() + 0.1, distances)
    surface = surface_of(extract(whole.points, distances, whole))
    assert surface.is_watertight
    shares = torch.distributions.Dirichlet(torch.ones(4)).sample((32,)).double()
    below = (shares @ distances[whole.tetrahedra].double().T < 0).double().mean()
    volume = len(whole.tetrahedra) * whole.spacing**3 / 12
    assert surface.volume == pytest.approx(below.item() * volume, rel=0.02)


def test_vertices_follow_points_and_distances():
    """Finite differences, in float64, of a lattice of a few cubes."""
    lattice = tetrahedra.lattice(0.5, 3, np.ones(len(tetrahedra.all_points(0.5, 3)), bool))
    generator = torch.Generator().manual_seed(1)
    points = lattice.points.double().requires_grad_()
    distances = torch.randn(len(points), generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, d: extract(p, d, lattice).vertices, (points, distances))


def test_only_tetrahedra_whose_points_are_kept_are_there(whole):
    points = tetrahedra.all_points(0.5, CELLS)
    kept = np.linalg.norm(points, axis=-1) < 0.3
    part = tetrahedra.lattice(0.5, CELLS, kept)
    assert part.points.norm(dim=-1).max() < 0.3 and 0 < len(part.tetrahedra) < len(whole.tetrahedra)
    inner = part.points[~part.is_rim]
    assert inner.norm(dim=-1).max() < 0.3 - 0.5 * part.spacing
    assert (part.edges_of.max(), part.tetrahedra.max()) == (len(part.edges) - 1, len(part.points) - 1)
