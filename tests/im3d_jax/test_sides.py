"""Pictures from several sides: which views they show, and what they add to those of a fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import sides
from im3d_jax.asset import Picture
from im3d_jax.evidence import Evidence, Video
from recon_torch.views.cameras import orbit


def picture(azimuth_deg, grey):
    rgb, alpha = np.full((8, 8, 3), grey, np.float32), np.ones((8, 8, 1), np.float32)
    return Picture(rgb, alpha, "", azimuth_deg=float(azimuth_deg))


def test_the_front_comes_first_and_angles_are_whole_turns():
    assert sides.arranged(["a.png"], []) == ("a.png", ()) and sides.arranged([], []) == ("", ())
    found = sides.arranged(["left.png", "back.png", "front.png"], [-90, 180, 360.0])
    assert found == ("front.png", (("back.png", 180.0), ("left.png", 270.0)))


@pytest.mark.parametrize(
    ("azimuths_deg", "words"),
    [
        ([], "3 images, 0 of azimuth-deg"),
        ([0, 180], "3 images, 2 of azimuth-deg"),
        ([0, 90, 450], "azimuth-deg is 450; give a number from -360 to 360"),
        ([0, 90, float("nan")], "azimuth-deg is nan"),
        ([0, 180, -179.5], "b and c are at one azimuth-deg"),
        ([359.6, 90, 0], "a and c are at one azimuth-deg"),
        ([90, 180, 270], "no image is at azimuth-deg 0"),
    ],
)
def test_what_does_not_tell_sides_apart_is_refused(azimuths_deg, words, user_error):
    with user_error(words):
        sides.arranged(["a", "b", "c"], azimuths_deg)


def test_views_are_found_at_their_azimuths():
    assert [sides.view_at(each, 16) for each in (0.0, 22.5, 180.4, 359.8, 337.5)] == [0, 1, 8, 0, 15]
    assert [sides.view_at(each, 16) for each in (10.0, 100.0, 181.0)] == [None] * 3


def test_pictures_take_the_place_of_views_and_those_between_them_come_after():
    front, left, back = picture(0, 0.1), picture(200, 0.2), picture(180, 0.3)
    evidence = Evidence.of([front, back, left], 4, weight=3.0)
    assert evidence.views == (0, 2, 4) and evidence.weights == [3, 1, 3, 1, 3]
    video = Video(jnp.full((1, 4, 8, 8, 3), 0.5), jnp.zeros((1, 4, 8, 8, 1)))
    rgb, alpha = evidence.within(video)
    np.testing.assert_allclose(rgb[0, :, 0, 0, 0], [0.5, 0.5, 0.3, 0.5, 0.2])
    np.testing.assert_allclose(alpha[0, :, 0, 0, 0], [0, 0, 1, 0, 1])
    cameras = evidence.cameras(orbit(4, 0.3, 8), 0.3)
    np.testing.assert_array_equal(cameras.w2c[:4], orbit(4, 0.3, 8).w2c)
    angle = np.deg2rad(200)
    wanted = 2 * np.array([np.cos(0.3) * np.cos(angle), np.cos(0.3) * np.sin(angle), np.sin(0.3)])
    np.testing.assert_allclose(cameras.positions[4], wanted, atol=1e-6)


def test_one_picture_changes_nothing_of_the_fit():
    turntable, video = orbit(4, 0.3, 8), Video(jnp.ones((1, 4, 8, 8, 3)), jnp.ones((1, 4, 8, 8, 1)))
    for pictures in ([], [picture(0, 0.1)]):
        evidence = Evidence.of(pictures, 4)
        assert evidence.views == (0,) and evidence.weights is None
        assert evidence.cameras(turntable, 0.3) is turntable and evidence.within(video) == video[:2]
