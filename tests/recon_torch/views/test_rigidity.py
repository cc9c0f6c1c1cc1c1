"""Masks of balls that move while the camera goes round, and of such that do not."""

import numpy as np
import pytest

from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.rigidity import excursions
from recon_torch.views.world import World

CAMERAS = orbit(16, 0.0, 64)
RADIUS, STEP = 0.2, 0.2


@pytest.fixture
def jumping(ball_masks):
    """A ball that is higher by STEP in every second view."""
    low, high = (ball_masks(CAMERAS, np.array([0, 0, z]), RADIUS) for z in (-STEP / 2, STEP / 2))
    low[1::2] = high[1::2]
    return low


@pytest.mark.parametrize("cameras", [CAMERAS, orbit(16, 0.6, 96), orbit(5, 0.3, 64)])
def test_a_ball_and_its_limb_at_rest_stay_where_they_are(ball_masks, cameras):
    limb = ball_masks(cameras, np.array([0.25, 0.1, -0.2]), 0.1)
    found = excursions(cameras, np.maximum(ball_masks(cameras, np.zeros(3), 0.25), limb))
    assert found.shape == (len(cameras),) and found.max() == 0


def test_the_excursion_is_that_of_the_outermost_pixels(jumping):
    """The lowest pixels of a low ball lie STEP below what the high ones allow; 1% of a disk are the lowest
    0.04 radii, and the two balls together are STEP + 2 RADIUS high."""
    expected = (STEP - 0.04 * RADIUS) / (STEP + 2 * RADIUS)
    np.testing.assert_allclose(excursions(CAMERAS, jumping), expected, atol=0.05)


def test_views_in_another_world_and_without_square_pixels_say_the_same(jumping):
    moved = World(np.array([0.1, 0.0, -0.2]), 0.25).cameras_back(CAMERAS)
    np.testing.assert_allclose(excursions(moved, jumping), excursions(CAMERAS, jumping), atol=0.02)
    wide = np.repeat(jumping, 2, axis=2)
    squeezed = Cameras(CAMERAS.w2c, CAMERAS.intrinsics_px * [[2], [1], [1]], 128, 64)
    np.testing.assert_allclose(excursions(squeezed, wide), excursions(CAMERAS, jumping), atol=0.03)


def test_a_limb_that_swings_is_found_in_the_views_that_show_it_far_out(ball_masks):
    phases = 2 * np.pi * np.arange(16) / 16
    places = np.stack([0.3 * np.ones(16), 0 * phases, 0.2 * np.sin(phases)], -1)
    limb = np.concatenate([ball_masks(CAMERAS[view], place, 0.08) for view, place in enumerate(places)])
    found = excursions(CAMERAS, np.maximum(ball_masks(CAMERAS, np.zeros(3), 0.25), limb))
    # At a quarter and three quarters of the orbit it is at its highest and lowest.
    assert found[[4, 12]].min() > 0.08 and found[[0, 8]].max() < 0.04


def test_one_wrong_view_speaks_against_itself_alone(ball_masks):
    masks = ball_masks(CAMERAS, np.zeros(3), 0.25)
    masks[3] = ball_masks(CAMERAS[3:4], np.array([0, 0, 0.3]), 0.25)[0]
    found = excursions(CAMERAS, masks)
    assert found[3] > 0.2 and np.delete(found, 3).max() == 0


def test_nothing_is_said_of_few_or_empty_views(ball_masks):
    masks = ball_masks(CAMERAS, np.zeros(3), 0.25)
    assert not excursions(CAMERAS[:3], masks[:3]).any() and not excursions(CAMERAS, 0 * masks).any()
    masks[5] = 0
    assert not excursions(CAMERAS, masks).any()
