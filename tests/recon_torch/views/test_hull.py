"""The visual hull of drawn silhouettes against solids whose hull is known in closed form."""

import numpy as np

from recon_torch.views.cameras import orbit
from recon_torch.views.hull import grid, hull, nearly_inside, verdicts

BALL_CENTER, BALL_RADIUS = np.array([0.12, -0.08, 0.05]), 0.3


def test_the_grid_has_the_centres_of_its_cells():
    points = grid(1.0, 4)
    assert points.shape == (64, 3)
    np.testing.assert_allclose(np.unique(points), [-0.75, -0.25, 0.25, 0.75])


def test_the_hull_of_a_ball_seen_from_all_sides_is_the_ball(ball_masks):
    elevations = np.radians([0, 0, 0, 0, 45, 45, 45, -45, -45, -45, 85, -85])
    azimuths = np.radians([0, 45, 90, 135, 0, 120, 240, 60, 180, 300, 0, 0])
    cameras = orbit(elevation_rad=elevations, size=96, azimuths_rad=azimuths)
    points = grid(0.6, 40)
    inside = hull(verdicts(points, cameras, ball_masks(cameras, BALL_CENTER, BALL_RADIUS), reach=0.0))
    distance = np.linalg.norm(points - BALL_CENTER, axis=-1)
    assert inside[distance < BALL_RADIUS - 0.02].all()
    # What twelve silhouettes leave beyond the ball is little, and near.
    assert distance[inside].max() < 1.25 * BALL_RADIUS
    assert inside.sum() < 1.2 * (distance < BALL_RADIUS).sum()


def test_verdicts_of_points_outside_of_the_image(ball_masks):
    cameras = orbit(1, 0.0, 64)  # at (2, 0, 0)
    points = np.array([[0.0, 0, 0], [0, 0.5, 0], [0, 0, 1.5], [3.0, 0, 0]])
    masks = ball_masks(cameras, np.zeros(3), 0.3)
    np.testing.assert_array_equal(verdicts(points, cameras, masks, 0.0), [[1, -1, -1, -1]])
    np.testing.assert_array_equal(verdicts(points, cameras, masks, 0.25), [[1, 1, -1, -1]])
    np.testing.assert_array_equal(verdicts(points, cameras, 0 * masks, 0.0), [[-1, -1, 0, 0]])
    masks[:, 32:] = 1  # cut off by the lower edge, so what is outside may be part of it
    np.testing.assert_array_equal(verdicts(points, cameras, masks, 0.0), [[1, 1, 0, 0]])


def test_a_point_needs_support_from_half_of_the_views():
    found = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [-1, 0, 0]], np.int8)
    np.testing.assert_array_equal(hull(found), [False, True, False])
    np.testing.assert_array_equal(hull(found[:2]), [True, True, False])


def test_one_wrong_view_does_not_empty_the_hull(ball_masks):
    cameras = orbit(16, elevation_rad=np.radians(np.tile([-50.0, 0.0, 30.0, 60.0], 4)), size=96)
    masks = ball_masks(cameras, BALL_CENTER, BALL_RADIUS)
    masks[1] = ball_masks(cameras[1], BALL_CENTER + [0.0, 0.0, 0.6], 0.1)[0]
    points, reach = grid(0.6, 40), 0.03
    distance = np.linalg.norm(points - BALL_CENTER, axis=-1)
    found = nearly_inside(points, cameras, masks, reach)
    assert found[distance < BALL_RADIUS + 0.5 * reach].all()
    assert distance[found].max() < 1.3 * BALL_RADIUS + 2 * reach
    assert not hull(verdicts(points, cameras, masks, reach)).any()  # by all views there is nothing


def test_nothing_is_nearly_inside_where_masks_disagree(ball_masks):
    cameras = orbit(8, 0.0, 64)
    masks = np.concatenate([ball_masks(cameras[k], np.array([0, 0, 0.3 * (-1) ** k]), 0.1) for k in range(8)])
    assert not nearly_inside(grid(0.5, 16), cameras, masks, 0.03).any()
