"""Lenses and intrinsics in the words of nerfstudio, COLMAP's converters, instant-ngp and Blender."""

import numpy as np
import pytest

from recon_torch.views.camera_entries import intrinsics_of, lens_of, w2c_of
from recon_torch.views.lens import Lens

ZERO = dict.fromkeys(("k1", "k2", "k3", "k4", "p1", "p2"), 0.0)
PINHOLES = {
    "nothing said": {},
    "Blender": {"k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0},
    "instant-ngp": ZERO | {"is_fisheye": False},
    "nerfstudio": {"camera_model": "OPENCV", "distortion_params": [0.0] * 6},
    "COLMAP's simplest model": {"camera_model": "SIMPLE_RADIAL", "k1": 0},
    "COLMAP's fullest model": {"camera_model": "FULL_OPENCV", "k5": 0, "k6": None},
}
LENSES = {
    "OPENCV": ({"camera_model": "OPENCV", "k1": 0.1, "k3": 0.3, "p2": 0.2}, (0.1, 0, 0.3, 0, 0, 0), (0, 0.2)),
    "no model": ({"k1": -0.1, "is_fisheye": False}, (-0.1, 0, 0, 0, 0, 0), (0, 0)),
    "RADIAL": ({"camera_model": "RADIAL", "k1": 0.1, "k2": 0.2}, (0.1, 0.2, 0, 0, 0, 0), (0, 0)),
    "FULL_OPENCV": ({"camera_model": "FULL_OPENCV", "k4": 0.4}, (0, 0, 0, 0.4, 0, 0), (0, 0)),
    "k6": ({"camera_model": "OPENCV", "k4": 0.4, "k6": 0.6}, (0, 0, 0, 0.4, 0, 0.6), (0, 0)),
    "list": ({"distortion_params": [0.1, 0.2, 0.3, 0, 0.5, 0.6]}, (0.1, 0.2, 0.3, 0, 0, 0), (0.5, 0.6)),
    "both": ({"distortion_params": [0.1, 0, 0, 0, 0, 0], "k1": 0.1}, (0.1, 0, 0, 0, 0, 0), (0, 0)),
}
FISHEYES = {
    "instant-ngp": ({"is_fisheye": True, "k1": 0.1, "k4": 0.4}, (0.1, 0, 0, 0.4)),
    "nerfstudio without coefficients": ({"camera_model": "OPENCV_FISHEYE", **ZERO}, (0, 0, 0, 0)),
    "nerfstudio": ({"camera_model": "OPENCV_FISHEYE", "k2": 0.2, "is_fisheye": True}, (0, 0.2, 0, 0)),
    "COLMAP": ({"camera_model": "RADIAL_FISHEYE", "k1": 0.1}, (0.1, 0, 0, 0)),
}
REFUSED = {
    "camera_model 'opencv' is not supported; is it 'OPENCV'": {"camera_model": "opencv"},
    "camera_model 'EQUIRECTANGULAR' is not supported; make pinhole": {"camera_model": "EQUIRECTANGULAR"},
    "camera_model 'FISHEYE624'": {"camera_model": "FISHEYE624", "distortion_params": [0.1] * 12},
    "camera_model 7": {"camera_model": 7},
    "ftheta_p1": {"ftheta_p0": 0.0, "ftheta_p1": 0.3},
    "latlong": {"latlong": True},
    "orthographic": {"orthographic": True},
    "PINHOLE' has no lens distortion": {"camera_model": "PINHOLE", "k1": 0.1},
    "contradict each other": {"camera_model": "OPENCV", "is_fisheye": True},
    "is_fisheye without coefficients": ZERO | {"is_fisheye": True},
    "is_fisheye is 'no'": {"is_fisheye": "no"},
    "a fisheye lens has no k5, p1": {"is_fisheye": True, "p1": 0.1, "k5": 0.1},
    "k4 is a denominator's": {"camera_model": "OPENCV", "k4": 0.1},
    "k1 is nan, not a finite": {"k1": float("nan")},
    "distortion_params has 4 numbers": {"distortion_params": [0.1, 0, 0, 0]},
    "distortion_params is '0.1'": {"distortion_params": "0.1"},
    "distortion_params and k1": {"distortion_params": [0.1, 0, 0, 0, 0, 0], "k1": 0.2},
}


@pytest.mark.parametrize("dialect", PINHOLES)
def test_no_distortion_is_a_pinhole_by_any_name(dialect):
    assert lens_of(PINHOLES[dialect]) is None


@pytest.mark.parametrize("dialect", LENSES)
def test_radial_and_tangential_lenses(dialect):
    entries, radial, tangential = LENSES[dialect]
    assert lens_of(entries) == Lens(False, radial, tangential)


@pytest.mark.parametrize("dialect", FISHEYES)
def test_fisheye_lenses(dialect):
    entries, radial = FISHEYES[dialect]
    assert lens_of(entries) == Lens(True, radial)


@pytest.mark.parametrize("message", REFUSED)
def test_other_lenses_are_refused_by_name(message, user_error):
    with user_error(message):
        lens_of(REFUSED[message])


@pytest.mark.parametrize(
    ("entries", "focal"),
    [
        ({"fl_x": 30, "camera_angle_x": 0.1}, (30, 30)),
        ({"fl_x": 30, "fl_y": 40.0}, (30, 40)),
        ({"camera_angle_x": 2 * np.arctan(0.5)}, (40, 40)),
        ({"camera_angle_y": 2 * np.arctan(0.5)}, (30, 30)),
        ({"x_fov": 90.0, "y_fov": 2 * np.degrees(np.arctan(0.5))}, (20, 30)),
    ],
)
def test_focal_lengths(entries, focal):
    expected = [[focal[0], 0, 20], [0, focal[1], 15], [0, 0, 1]]
    np.testing.assert_allclose(intrinsics_of(entries, 40, 30), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"fl_x": 0.0, "fl_y": 5.0}, "focal length \\(0, 5\\)"),
        ({"Fl_X": 5.0}, "is it 'Fl_X'"),
        ({"x_fov": 180}, "between 0 and 180"),
        ({"fl_x": True}, "fl_x is True"),
    ],
)
def test_wrong_focal_lengths(entries, message, user_error):
    with user_error(message):
        intrinsics_of(entries, 40, 30)


def test_a_matrix_may_lack_its_last_row(user_error):
    matrix = np.eye(4)
    matrix[:3, 3] = [1, 2, 3]
    np.testing.assert_array_equal(
        w2c_of({"transform_matrix": matrix[:3].tolist()}), w2c_of({"transform_matrix": matrix.tolist()})
    )
    with user_error("not 4x4; is it 'transform_Matrix'"):
        w2c_of({"transform_Matrix": matrix.tolist()})
