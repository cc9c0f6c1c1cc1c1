"""Surfaces from fields whose level sets are known in closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from recon_torch.mesh import cleaning, density, depth, fusion, grid, sights
from recon_torch.mesh.grid import Grid
from recon_torch.mesh.surface import Surface, joined
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.reference import rotation_matrices
from recon_torch.views.cameras import orbit

TETRAHEDRON = Surface(
    np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


def gaussian(scales=(0.1, 0.1, 0.1), mean=(0.0, 0.0, 0.0), quat=(1.0, 0, 0, 0), opacity=0.8) -> Gaussians:
    return Gaussians(
        torch.tensor([mean]),
        torch.tensor([quat]),
        torch.tensor([scales]).log(),
        torch.tensor([math.log(opacity / (1 - opacity))]),
        torch.zeros(1, 3),
    )


def points(cube: Grid) -> np.ndarray:
    axes = [cube.lower[i] + cube.cell * np.arange(cube.shape[i]) for i in range(3)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def sphere_field(cube: Grid, radius: float, center=(0.0, 0.0, 0.0)) -> np.ndarray:
    return (radius - np.linalg.norm(points(cube) - center, axis=-1)).astype(np.float32)


def test_density_is_the_formula(cube):
    """float64 NumPy, for a Gaussian that is long, turned and off the middle."""
    one = gaussian((0.05, 0.1, 0.15), (0.05, -0.1, 0.02), (0.8, 0.3, -0.4, 0.2))
    turn = rotation_matrices(one.quats.double())[0].numpy()
    local = (points(cube) - one.means[0].numpy()) @ turn / one.scales[0].double().numpy()
    squared = (local**2).sum(-1)
    expected = np.where(squared < 9, 0.8 * np.exp(-squared / 2), 0)
    found = density.density(one, cube)
    near = abs(squared - 9) > 1e-3
    np.testing.assert_allclose(found[near], expected[near], atol=2e-5)


def test_a_gaussian_is_a_sphere_of_the_radius_of_its_level(cube):
    """opacity exp(-r^2 / 2 s^2) = level, solved for r."""
    surface = grid.surface_at(density.density(gaussian(), cube), 0.3, cube)
    radius = 0.1 * math.sqrt(2 * math.log(0.8 / 0.3))
    np.testing.assert_allclose(np.linalg.norm(surface.vertices, axis=-1), radius, atol=2e-3)
    assert surface.is_watertight and surface.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)
    outward = (surface.normals() * surface.vertices).sum(-1) / np.linalg.norm(surface.vertices, axis=-1)
    assert outward.min() > 0.95


def test_a_surface_at_the_border_is_closed_and_a_cavity_filled(cube):
    field = np.minimum(sphere_field(cube, 0.6), -sphere_field(cube, 0.2))  # a shell that leaves the cube
    surface = grid.surface_at(field, 0.0, cube)
    assert surface.is_watertight and surface.pieces().max() == 0
    assert np.linalg.norm(surface.vertices, axis=-1).min() > 0.4


def test_no_surface_is_an_error(cube, user_error):
    with user_error("nowhere above the level 5"):
        grid.surface_at(sphere_field(cube, 0.3), 5.0, cube)


def test_fused_depth_of_a_sphere_is_the_sphere(cube):
    """Depth by the formula for rays and a sphere; behind the front nothing is known, and is inside."""
    cameras, radius = sights.sphere(24, 96), 0.3
    columns, rows = np.meshgrid(np.arange(96) + 0.5, np.arange(96) + 0.5)
    focal = cameras.intrinsics_px[0, 0, 0]
    rays = np.stack([(columns - 48) / focal, (rows - 48) / focal, np.ones((96, 96))], -1)
    # |t ray - (0, 0, 2)| = radius
    a, b = (rays**2).sum(-1), 2 * rays[..., 2]
    inner = b**2 - a * (4 - radius**2)
    one = np.where(inner > 0, (b - np.sqrt(np.maximum(inner, 0))) / a, np.inf).astype(np.float32)
    field = fusion.fuse(np.stack([one] * 24), cameras, cube)
    surface = grid.surface_at(field, 0.0, cube)
    distances = np.linalg.norm(surface.vertices, axis=-1)
    np.testing.assert_allclose(distances, radius, atol=cube.cell / 2)
    assert surface.is_watertight and surface.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.03)
    assert field[24, 24, 24] == 1 and field[0, 0, 0] == -1


def test_front_depth_of_a_disc_seen_aslant_lies_on_its_plane():
    """A flat Gaussian is a piece of plane; where less than half of the light is gone there is nothing."""
    half = math.radians(35) / 2
    disc = gaussian((0.2, 0.2, 1e-3), quat=(math.cos(half), math.sin(half), 0.0, 0.0), opacity=0.99)
    camera = orbit(1, math.radians(70), 128)
    found = depth.front_depth(disc, camera)
    normal = rotation_matrices(disc.quats.double())[0, :, 2].numpy()
    rows, columns = np.nonzero(np.isfinite(found))
    focal = camera.intrinsics_px[0, 0, 0]
    local = np.stack([(columns + 0.5 - 64) / focal, (rows + 0.5 - 64) / focal, np.ones(len(rows))], -1)
    places = (local * found[rows, columns, None]) @ camera.w2c[0, :3, :3] + camera.positions[0]
    assert len(rows) > 300 and abs(places @ normal).max() < 0.01 and np.median(abs(places @ normal)) < 0.002
    faint = disc._replace(opacity_logits=torch.tensor([-0.5]))
    assert np.isinf(depth.front_depth(faint, camera)).all()


def test_closed_forms_of_a_tetrahedron():
    assert TETRAHEDRON.volume == pytest.approx(1 / 6) and TETRAHEDRON.is_watertight
    assert TETRAHEDRON.flipped().volume == pytest.approx(-1 / 6)
    assert TETRAHEDRON.areas.sum() == pytest.approx(1.5 + math.sqrt(3) / 2)
    assert not TETRAHEDRON.part(np.arange(3)).is_watertight
    one_turned = np.concatenate([TETRAHEDRON.triangles[:1, ::-1], TETRAHEDRON.triangles[1:]])
    assert not TETRAHEDRON._replace(triangles=one_turned).is_watertight
    reference = trimesh.Trimesh(*TETRAHEDRON, process=False)
    np.testing.assert_allclose(TETRAHEDRON.normals(), reference.vertex_normals, atol=1e-6)


def test_joining_leaves_out_flaps_and_what_has_no_area():
    flap = np.array([[0, 1, 2], [0, 2, 1], [0, 0, 3]])
    twice = Surface(
        np.concatenate([TETRAHEDRON.vertices, TETRAHEDRON.vertices, [[2.0, 0, 0], [2, 1, 0], [2, 0, 1]]]),
        np.concatenate([TETRAHEDRON.triangles + 4, flap + 8 * (flap < 3) - 5 * (flap == 3)]),
    )
    found = joined(twice)
    assert len(found.vertices) == 4 and found.is_watertight and found.volume == pytest.approx(1 / 6)


def test_floaters_are_left_out(cube):
    field = np.maximum(sphere_field(cube, 0.25), sphere_field(cube, 0.05, (0.4, 0.0, 0.0)))
    surface = grid.surface_at(field, 0.0, cube)
    assert surface.pieces().max() == 1
    kept, count = cleaning.without_floaters(surface, 0.05)
    assert count == 1 and kept.vertices[:, 0].max() < 0.27 and kept.is_watertight
    assert cleaning.without_floaters(surface, 0.01).num_floaters == 0
    assert len(cleaning.without_floaters(surface, 1.0).surface.triangles) == len(kept.triangles)


def test_decimation_keeps_shape_and_closure(cube):
    surface = grid.surface_at(sphere_field(cube, 0.3), 0.0, cube)
    few = cleaning.decimated(surface, 500)
    assert 400 < len(few.triangles) <= 500 and few.is_watertight
    assert few.volume == pytest.approx(surface.volume, rel=0.03)
    cleaning.check_watertight(few)


@pytest.mark.parametrize("most", [300, 2000])
def test_thin_parts_that_decimation_brings_together_stay_closed(cube, most):
    """A bowl whose wall is thinner than the triangles, and a rod that nearly touches it."""
    x, y, z = np.moveaxis(points(cube), -1, 0)
    wall = 0.5 * cube.cell - np.abs(np.sqrt(x**2 + y**2 + z**2) - 0.3)
    rod = np.minimum(0.04 - np.hypot(x, y), 0.24 - abs(z))
    field = np.maximum(np.minimum(wall, 0.1 - z), rod)
    surface = grid.surface_at(field.astype(np.float32), 0.0, cube)
    few = cleaning.decimated(surface, most)
    assert surface.is_watertight and few.is_watertight and len(few.triangles) <= most
    joined_by_place = trimesh.Trimesh(few.vertices.astype(np.float32), few.triangles)
    assert joined_by_place.is_watertight and joined_by_place.is_winding_consistent


def test_what_decimation_cannot_do_is_an_error(cube, user_error):
    torus = 0.05 - np.hypot(np.hypot(*np.moveaxis(points(cube)[..., :2], -1, 0)) - 0.3, points(cube)[..., 2])
    surface = grid.surface_at(torus.astype(np.float32), 0.0, cube)
    with user_error("triangles"):
        cleaning.check_watertight(cleaning.decimated(surface, 4))
    with user_error("not watertight"):
        cleaning.check_watertight(surface.part(np.arange(1, len(surface.triangles))))
