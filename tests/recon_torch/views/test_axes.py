"""The axes of files: rotations that take up to -Y, and words that state them."""

import numpy as np
import pytest

from recon_torch.errors import UserError
from recon_torch.settings import UP_AXES
from recon_torch.views import axes, world
from recon_torch.views.cameras import orbit


@pytest.mark.parametrize("up", UP_AXES)
def test_an_upright_file_has_its_up_at_minus_y_and_its_front_at_z(up):
    vector = np.array(UP_AXES[up])
    rotation = axes.matrix(axes.chosen("upright", vector))
    assert np.linalg.det(rotation) == 1
    np.testing.assert_array_equal(rotation @ vector, [0, -1, 0])
    front = world.around(vector, orbit(4)).positions[0]  # where a turntable of that world begins
    np.testing.assert_allclose(rotation @ front, [0, 0, 2], atol=1e-6)


def test_the_world_of_this_project_needs_no_more_than_signs_and_an_order():
    assert axes.chosen("upright") == ("-y", "-z", "x") and axes.chosen("world") == ("x", "y", "z")
    np.testing.assert_array_equal(axes.matrix(axes.UPRIGHT) @ [1, 2, 3], [-2, -3, 1])


def test_24_statements_are_understood():
    names = [f"{x} {y} {z}" for x in UP_AXES for y in UP_AXES for z in UP_AXES]
    taken = 0
    for text in names:
        try:
            assert " ".join(axes.parse(text)) == text
            taken += 1
        except UserError:
            pass
    assert taken == 24


@pytest.mark.parametrize("text", ["", "-y", "-y -z", "-y -z x x", "y -z x", "up -y z", "-Y -Z X", "-y,-z,x"])
def test_other_statements_are_refused(text, user_error):
    with user_error("no rotation makes; was it written by a newer im3d"):
        axes.parse(text)
