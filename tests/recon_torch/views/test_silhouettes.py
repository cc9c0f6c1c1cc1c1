"""Masks of balls, which are known in closed form, with pieces that the other views contradict."""

import numpy as np
import pytest

from recon_torch.errors import UserError
from recon_torch.views import silhouettes
from recon_torch.views.cameras import orbit

CAMERAS = orbit(8, 0.3, 64)
CENTER = np.array([0.1, -0.05, 0.05])


@pytest.fixture
def masks(ball_masks):
    return ball_masks(CAMERAS, CENTER, 0.25)


def test_masks_of_one_object_agree_and_stay(masks):
    compared = silhouettes.compare(CAMERAS, masks)
    assert compared.cleaned == [] and compared.agreement == 1
    np.testing.assert_array_equal(compared.masks, masks)


def test_pieces_in_one_view_are_removed_and_those_in_all_views_stay(masks, ball_masks):
    second = ball_masks(CAMERAS, np.array([0.1, -0.05, -0.4]), 0.06)  # a part of the object
    dirty = np.maximum(masks, second)
    dirty[3, 4:10, 4:10] = 1
    compared = silhouettes.compare(CAMERAS, dirty)
    assert compared.cleaned == [3]
    np.testing.assert_array_equal(compared.masks, np.maximum(masks, second))


def test_the_largest_piece_stays_wherever_it_is(masks, ball_masks):
    masks[3] = ball_masks(CAMERAS[3], CENTER + [0, 0, 0.6], 0.1)[0]
    compared = silhouettes.compare(CAMERAS, masks)
    np.testing.assert_array_equal(compared.masks, masks)
    assert compared.agreement == pytest.approx(7 / 8, abs=0.02)


def test_empty_masks_and_cameras_without_a_focus(masks):
    assert silhouettes.compare(CAMERAS, 0 * masks).agreement == 0
    parallel = orbit(8, 0.0, 64, azimuths_rad=np.zeros(8))
    parallel.w2c[:, 0, 3] += np.arange(8)
    with pytest.raises(UserError, match="look the same way"):
        silhouettes.compare(parallel, masks)
