"""The cases and the statistics of the reconstruction benchmark: mistakes would not show in its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage, stats

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.views.cameras import orbit

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
SIZE = 48
CUBE = """
v -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\nv -1 -1 1\nv 1 -1 1\nv 1 1 1\nv -1 1 1
f 1 4 3 2\nf 5 6 7 8\nf 1 2 6 5\nf 2 3 7 6\nf 3 4 8 7\nf 4 1 5 8
"""


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    file = tmp_path_factory.mktemp("cube") / "cube.obj"
    file.write_text(CUBE)
    return load_mesh(file)


def case(cube, name, seed=0):
    from view_cases import views_of

    return views_of(cube, name, SIZE, seed).views


def test_fewer_views_are_some_of_the_sixteen(cube):
    all_views, some = case(cube, "clean"), case(cube, "4 views")
    np.testing.assert_array_equal(some.images, all_views.images[::4])
    np.testing.assert_allclose(some.cameras.w2c, all_views.cameras.w2c[::4], atol=1e-6)


def test_views_at_an_elevation_are_seen_from_there(cube):
    positions = case(cube, "elevation 60").cameras.positions
    np.testing.assert_allclose(np.degrees(np.arcsin(positions[:, 2] / 2)), 60, atol=1e-3)


def test_three_cameras_are_turned_about_the_object_and_still_look_at_it(cube):
    right, wrong = orbit(16, np.radians(20), SIZE), case(cube, "wrong poses").cameras
    relative = wrong.w2c[:, :3, :3] @ right.w2c[:, :3, :3].transpose(0, 2, 1)
    angles_deg = np.degrees(np.arccos(((np.trace(relative, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))
    assert (angles_deg > 0.1).sum() == 3
    np.testing.assert_allclose(angles_deg[angles_deg > 0.1], 5, atol=1e-2)
    np.testing.assert_allclose(wrong.w2c[:, :3, 3], right.w2c[:, :3, 3], atol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("noise 5", 5), ("noise 10", 10), ("noise 10, alpha", 10)])
def test_noise_has_its_standard_deviation_on_the_object(cube, name, expected):
    clean, noisy = case(cube, "clean"), case(cube, name)
    rgba, _ = mesh_rendering.render(cube, clean.cameras)
    inside = np.broadcast_to(
        (rgba[..., 3:] == 1) & (clean.images < 0.8) & (clean.images > 0.2), clean.images.shape
    )
    assert inside.sum() > 5000
    assert abs((noisy.images - clean.images)[inside].std() * 255 - expected) < 0.05 * expected
    if name.endswith("alpha"):
        outside = np.broadcast_to(rgba[..., 3:] == 0, clean.images.shape)
        np.testing.assert_array_equal(noisy.images[outside], 1)


def test_a_recipe_without_masks_gets_the_pictures_as_they_came(cube):
    from view_cases import views_of

    given = views_of(cube, "noise 10", SIZE, 0)
    near = ndimage.binary_dilation(case(cube, "clean").masks > 0, np.ones((1, 7, 7, 1)))
    outside = np.broadcast_to(~near, given.pictures.shape)
    assert given.pictures[outside].std() * 255 > 3  # half of the noise on white is cut off
    assert (given.views.images[outside] == 1).mean() > 0.99


def test_jpeg_of_a_lower_quality_is_further_from_the_truth(cube):
    clean = case(cube, "clean").images
    errors = [np.abs(case(cube, name).images - clean).mean() for name in ("no masks", "JPEG 75", "JPEG 30")]
    assert errors[0] < errors[1] < errors[2] < 0.02


def test_what_a_case_draws_depends_on_the_seed_alone(cube):
    np.testing.assert_array_equal(case(cube, "noise 5", 1).images, case(cube, "noise 5", 1).images)
    assert (case(cube, "noise 5", 1).images != case(cube, "noise 5", 2).images).any()


def test_a_difference_is_paired_by_mesh_and_seed():
    from paired import difference

    generator = np.random.default_rng(0)
    meshes = [f"mesh {i}" for i in range(40)]
    peer = {name: list(generator.normal(30, 5, 2)) for name in meshes}
    gains = {name: generator.normal(0.3, 0.5) for name in meshes}
    better = {name: [value + gains[name] for value in reversed(peer[name])] for name in reversed(meshes)}
    better = {name: values[::-1] for name, values in better.items()} | {"not in the peer": [99.0, 99.0]}
    found, true = difference(better, peer), np.array(list(gains.values()))
    assert found.mean == pytest.approx(true.mean()) and found.ahead == pytest.approx((true > 0).mean())
    # The bootstrap over meshes comes near the t interval of as many normal differences.
    low, high = stats.t.interval(0.95, len(true) - 1, true.mean(), stats.sem(true))
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
