"""Lenses against OpenCV's numbers and closed forms, and pictures that are distorted and undone again."""

import numpy as np
import pytest

from recon_torch.errors import UserError
from recon_torch.views.lens import Lens, undo

POINTS = np.array([[0.1, -0.2], [0.35, 0.3], [-0.5, 0.2], [0.4, -0.45]])
OPENCV = Lens(False, (-0.21, 0.07, 0.011, 0, 0, 0), (0.0012, -0.0009))
FULL_OPENCV = Lens(False, (0.4, -0.13, 0.02, 0.6, -0.05, 0.03), (0.0007, 0.0011))
FISHEYE = Lens(True, (0.05, -0.01, 0.004, -0.002))
# What OpenCV 5.0.0 gives for POINTS, at focal lengths of 500 and 480 and a centre of (320, 250):
# cv2.projectPoints, and cv2.fisheye.projectPoints for the last lens.
PROJECTED = {
    OPENCV: [
        (369.42831875, 155.083228),
        (487.68238579, 388.17973459),
        (83.21068025, 341.04402678),
        (506.19635898, 48.94055730),
    ],
    FULL_OPENCV: [
        (369.52923539, 154.97346806),
        (488.14052791, 388.33086297),
        (84.24113598, 340.69009179),
        (506.47641398, 48.94259790),
    ],
    FISHEYE: [
        (369.30870560, 155.32728525),
        (485.45505289, 386.14587209),
        (88.00054317, 339.08779142),
        (502.52909710, 52.86857514),
    ],
}


@pytest.mark.parametrize("lens", PROJECTED)
def test_lenses_distort_as_opencv_does(lens):
    np.testing.assert_allclose(lens.distort(POINTS) * [500, 480] + [320, 250], PROJECTED[lens], atol=2e-6)
    np.testing.assert_array_equal(lens.distort(np.zeros((1, 2))), 0)


def test_a_fisheye_without_coefficients_is_equidistant():
    angle = np.radians([10.0, 45.0, 80.0])
    seen = Lens(True, (0, 0, 0, 0)).distort(np.stack([np.tan(angle) * 0.6, np.tan(angle) * -0.8], -1))
    np.testing.assert_allclose(seen, angle[:, None] * [0.6, -0.8])


def test_a_view_shows_as_much_as_there_is():
    """A fisheye ends at the middle of a side; a picture whose corners are stretched ends at the corners."""
    f, w, h = 300.0, 400, 300
    barrel = undo(Lens(True, (0, 0, 0, 0)), (f, f, w / 2, h / 2), w, h)
    assert barrel.factor == pytest.approx((h / 2 / f) / np.tan(h / 2 / f), rel=1e-5)
    pincushion = undo(Lens(False, (0.2, 0, 0, 0, 0, 0)), (f, f, w / 2, h / 2), w, h)
    corner = np.hypot(w, h) / 2 / f
    roots = np.roots([0.2, 0, 1, -corner])  # r + 0.2 r^3 = the corner's distance to the middle
    assert pincushion.factor == pytest.approx(corner / roots[np.isreal(roots)].real[0], rel=1e-5)


def test_a_view_reaches_no_farther_than_60_degrees():
    wide = undo(Lens(True, (0, 0, 0, 0)), (120.0, 120.0, 200.0, 200.0), 400, 400)  # 191 degrees across
    corner = np.hypot(200, 200) / (wide.factor * 120)
    assert np.degrees(np.arctan(corner)) == pytest.approx(60)


def test_what_folds_the_picture_is_left_out_or_refused():
    """r (1 - 0.3 r^2) grows up to r = 1.054 only, which is within this picture."""
    folding = undo(Lens(False, (-0.3, 0, 0, 0, 0, 0)), (300.0, 300.0, 320.0, 240.0), 640, 480)
    corner = np.hypot(320, 240) / (folding.factor * 300)
    assert corner == pytest.approx(np.sqrt(1 / 0.9), rel=1e-3)
    for lens in (Lens(False, (-1e9, 0, 0, 0, 0, 0)), Lens(False, (0, 0, 1e300, 0, 0, 0)), OPENCV):
        center = 320.0 if lens is not OPENCV else 900.0  # outside of the picture
        with pytest.raises(UserError, match="cannot be undone"):
            undo(lens, (300.0, 300.0, center, 240.0), 640, 480)


@pytest.mark.parametrize("lens", [OPENCV, FULL_OPENCV, FISHEYE])
def test_pictures_are_undistorted(lens):
    """Blobs drawn where the lens shows directions come to where a pinhole shows these."""
    width, height, intrinsics = 160, 120, (110.0, 105.0, 78.0, 62.0)
    undistortion = undo(lens, intrinsics, width, height)
    scale, middle = np.array(intrinsics[:2]), np.array(intrinsics[2:])
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for point in POINTS * 0.9:
        x, y = lens.distort(point) * scale + middle
        blob = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)[..., None].astype(np.float32)
        seen = undistortion(blob)[..., 0]
        assert seen.shape == blob.shape[:2] and seen.dtype == np.float32
        found = np.array([(seen * columns).sum(), (seen * rows).sum()]) / seen.sum()
        np.testing.assert_allclose(found, point * scale * undistortion.factor + middle, atol=0.1)
