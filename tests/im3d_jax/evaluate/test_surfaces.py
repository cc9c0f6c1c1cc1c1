"""Scores of surfaces against closed forms, and alignments against the transformation that was made."""

import numpy as np
import pytest
import trimesh

from im3d_jax.evaluate import alignment, surfaces
from im3d_jax.evaluate.alignment import Alignment

SHIFT = 0.03


def square(low=0.0, high=1.0, z=0.0):
    """Two triangles of a rectangle as wide as 1, along y from `low` to `high`."""
    a, b, c, d = (np.array(p, float) for p in ((0, low, z), (1, low, z), (1, high, z), (0, high, z)))
    return np.array([[a, b, c], [a, c, d]])


def test_parallel_squares_are_their_distance_apart():
    scores = surfaces.compare(square(z=SHIFT), square(), thresholds=(0.029, 0.031))
    for name in ("chamfer", "accuracy", "completeness"):
        assert scores[name] == pytest.approx(SHIFT, rel=1e-9)
    assert scores["normals"] == pytest.approx(1)
    assert (scores["f_0.029"], scores["f_0.031"]) == (0, 1)


def test_equal_surfaces_have_no_distance():
    assert surfaces.compare(square(), square())["chamfer"] == pytest.approx(0, abs=1e-12)


def test_f_score_of_half_a_square():
    scores = surfaces.compare(square(high=0.5), square(), thresholds=(0.1,))
    recall = 0.5 + 0.1  # of the true points, those less than the threshold beyond the edge count too
    assert scores["accuracy"] == pytest.approx(0, abs=1e-12)
    assert scores["completeness"] == pytest.approx(0.125, rel=0.03)  # the mean of 0 and of U[0, 0.5]
    assert scores["f_0.1"] == pytest.approx(2 * recall / (1 + recall), rel=0.01)


def test_normals_have_no_side_and_a_right_angle_is_0():
    turned = square()[:, ::-1]
    assert surfaces.compare(turned, square())["normals"] == pytest.approx(1)
    assert surfaces.compare(square()[..., [2, 0, 1]], square())["normals"] == pytest.approx(0, abs=1e-9)


def test_nearest_points_are_those_of_all_triangles():
    ball = np.array(trimesh.creation.icosphere(1, 0.5).triangles)
    box = np.array(trimesh.creation.box([0.3, 0.9, 0.4]).triangles)
    found = surfaces.nearest(box, ball, num_points=200, num_samples=20_000)
    points = surfaces.sample(box, 200, 0).points
    every = [
        np.linalg.norm(
            trimesh.triangles.closest_point(np.repeat(each[None], 200, 0), points) - points, axis=1
        )
        for each in ball
    ]
    least = np.min(every, 0)
    assert (found.distances >= least - 1e-12).all()
    assert (found.distances > least + 1e-9).mean() < 0.02 and found.distances.mean() < 1.0001 * least.mean()


@pytest.fixture(scope="module")
def wedge():
    """A shape without symmetry about the upright axis, and the same elsewhere, turned and larger."""
    shape = trimesh.util.concatenate(
        trimesh.creation.box([0.9, 0.2, 0.1]), trimesh.creation.box([0.2, 0.2, 0.5], None)
    )
    shape.apply_translation([0.1, 0.05, 0.2])
    moved = trimesh.transformations.rotation_matrix(np.radians(37.3), [0, 0, 1])
    moved[:3] *= 1.7
    moved[:3, 3] = [0.4, -0.3, 0.2]
    return np.array(shape.triangles), alignment.moved(np.array(shape.triangles), moved), moved


def test_no_alignment_moves_nothing(wedge):
    truth, made, _ = wedge
    np.testing.assert_array_equal(alignment.to_truth(made, truth, Alignment.NONE), np.eye(4))


def test_size_brings_centre_and_radius_together(wedge):
    truth, made, _ = wedge
    fitted = alignment.moved(made, alignment.to_truth(made, truth, Alignment.SIZE)).reshape(-1, 3)
    points = truth.reshape(-1, 3)
    middle = (points.min(0) + points.max(0)) / 2
    np.testing.assert_allclose((fitted.min(0) + fitted.max(0)) / 2, middle, atol=1e-9)
    radii = [np.linalg.norm(each - middle, axis=1).max() for each in (fitted, points)]
    assert radii[0] == pytest.approx(radii[1])


def test_yaw_and_icp_undo_what_was_done(wedge):
    truth, made, moved = wedge
    distances = {}
    for each in Alignment:
        fitted = alignment.moved(made, alignment.to_truth(made, truth, each))
        distances[each] = surfaces.nearest(
            fitted, truth, num_points=1000, num_samples=20_000
        ).distances.mean()
    assert distances[Alignment.YAW] < 0.001 < 0.02 < distances[Alignment.SIZE] < distances[Alignment.NONE]
    assert distances[Alignment.ICP] < 0.001
    found = alignment.to_truth(made, truth, Alignment.ICP)
    np.testing.assert_allclose(found, np.linalg.inv(moved), atol=0.01)
