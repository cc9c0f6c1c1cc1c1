"""What the entries of a transforms.json say of a camera: its pose, its intrinsics and its lens.

The dialects are those of nerfstudio, of COLMAP's converters, of instant-ngp and of the original NeRF. What is
not understood, contradicts itself or can be read in two ways is refused by name.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError, near, quoted
from recon_torch.views.lens import Lens

OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
MAX_COORDINATE, MAX_INTRINSIC_PX = 1e8, 1e6  # what is larger is a mistake in the file
SIDES = {"x": 0, "y": 1}
FOCAL_KEYS = {side: (f"fl_{side}", f"{side}_fov", f"camera_angle_{side}") for side in SIDES}
RADIAL, TANGENTIAL = ("k1", "k2", "k3", "k4", "k5", "k6"), ("p1", "p2")
LIST = "distortion_params"  # nerfstudio's: k1, k2, k3, k4, p1, p2
LISTED = (*RADIAL[:4], *TANGENTIAL)
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE")
POLYNOMIALS = ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
FISHEYES = ("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
MODELS = (*PINHOLES, *POLYNOMIALS, *FISHEYES)
OTHER_LENSES = ("latlong", "equirectangular", "orthographic", "orthophoto", "fisheye", "omnidirectional")
FTHETA = tuple(f"ftheta_{part}{n}" for part in "pf" for n in range(6))
LENS_KEYS = ("camera_model", "is_fisheye", LIST, *RADIAL, *TANGENTIAL, *OTHER_LENSES, *FTHETA)
CAMERA_KEYS = (*FOCAL_KEYS["x"], *FOCAL_KEYS["y"], "cx", "cy", "w", "h", *LENS_KEYS)


def number(entries: dict, key: str) -> float:
    """A finite number of the entries. Raises UserError for anything else."""
    value = entries.get(key)
    with contextlib.suppress(OverflowError):  # raised for whole numbers with hundreds of digits
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise UserError(f"{key} is {quoted(value)}, not a finite number")


def intrinsics_of(entries: dict, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    """The intrinsics for an image of this size, in pixels. Raises UserError if there are none."""
    fx, fy = (_focal_px(entries, side, float((width, height)[index])) for side, index in SIDES.items())
    fx, fy = fy if fx is None else fx, fx if fy is None else fy
    if fx is None or fy is None:
        hint = near("fl_x", entries.keys()) or near("camera_angle_x", entries.keys())
        raise UserError(f"neither fl_x (pixels) nor camera_angle_x (radians) is given{hint}")
    if not (0 < fx < MAX_INTRINSIC_PX and 0 < fy < MAX_INTRINSIC_PX):
        raise UserError(
            f"the focal length ({fx:g}, {fy:g}) px must be positive, and below {MAX_INTRINSIC_PX:g}"
        )
    cx = number(entries, "cx") if "cx" in entries else width / 2
    cy = number(entries, "cy") if "cy" in entries else height / 2
    if not (abs(cx) < MAX_INTRINSIC_PX and abs(cy) < MAX_INTRINSIC_PX):
        raise UserError(f"the image centre ({cx:g}, {cy:g}) px is beyond {MAX_INTRINSIC_PX:g}")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _focal_px(entries: dict, side: str, length_px: float) -> float | None:
    """The focal length by the first key that gives it; None if none does."""
    keys = [key for key in FOCAL_KEYS[side] if key in entries]
    return focal_of(entries, keys[0], length_px) if keys else None


def focal_of(entries: dict, key: str, length_px: float) -> float:
    """The focal length from fl_x in pixels, camera_angle_x in radians or instant-ngp's x_fov in degrees."""
    value = number(entries, key)
    if key.startswith("fl_"):
        return value
    unit_rad, half_turn = (math.pi / 180, "180") if key.endswith("_fov") else (1.0, "pi")
    angle_rad = unit_rad * value
    if not 0 < angle_rad < math.pi:
        raise UserError(f"{key} is {value:g}; an angle of view lies between 0 and {half_turn}")
    return 0.5 * length_px / math.tan(angle_rad / 2)


def w2c_of(entries: dict) -> Float[np.ndarray, "4 4"]:
    """OpenCV's world-to-camera matrix in float64. Raises UserError if it is no rotation and translation."""
    try:
        c2w = np.asarray(entries.get("transform_matrix"), np.float64)
    except (TypeError, ValueError, OverflowError):
        c2w = np.zeros(0)
    if c2w.shape == (3, 4):
        c2w = np.concatenate([c2w, [[0, 0, 0, 1]]])
    if c2w.shape != (4, 4):
        hint = near("transform_matrix", entries.keys() - {"transform_matrix"})
        raise UserError(f"transform_matrix is missing or is not 4x4{hint}")
    if not (np.abs(c2w) < MAX_COORDINATE).all():  # false for NaN as well
        raise UserError(f"transform_matrix has values that are not finite, or beyond {MAX_COORDINATE:g}")
    rotation = c2w[:3, :3]
    if abs(np.linalg.det(rotation)) < 1e-6:
        raise UserError("transform_matrix is singular")
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise UserError("transform_matrix is not a rotation and a translation; remove its scale or mirroring")
    if not np.allclose(c2w[3], [0, 0, 0, 1], atol=1e-6):
        raise UserError("transform_matrix does not end with the row 0 0 0 1")
    return np.linalg.inv(c2w @ OPENGL_FROM_OPENCV)


def lens_of(entries: dict) -> Lens | None:
    """The lens of the entries, or None for a pinhole.

    Raises:
        UserError: it is none of `MODELS`, or its entries contradict each other or can be read in two ways.
    """
    others = [key for key in (*OTHER_LENSES, *FTHETA) if entries.get(key)]
    if others:
        raise UserError(f"the lens of {others[0]} is not supported; make pinhole images of it")
    model = entries.get("camera_model")
    if model is not None and model not in MODELS:
        hint = isinstance(model, str) and near(model, MODELS)
        advice = hint or "; make pinhole images of it"
        raise UserError(f"the lens of camera_model {quoted(model)} is not supported{advice}")
    fisheye = model in FISHEYES if entries.get("is_fisheye") is None else entries["is_fisheye"]
    if fisheye not in (True, False):
        raise UserError(f"is_fisheye is {quoted(fisheye)}, not true or false")
    if model is not None and fisheye != (model in FISHEYES):
        raise UserError(
            f"camera_model {quoted(model)} and is_fisheye {entries['is_fisheye']!r} contradict each other; "
            "take one of them out"
        )
    values = _coefficients(entries)
    given = [key for key, value in values.items() if value]
    if fisheye and model is None and not given:
        raise UserError(
            "is_fisheye without coefficients is a pinhole to instant-ngp and an equidistant lens to OpenCV; "
            "take it out for the first, give camera_model OPENCV_FISHEYE for the second"
        )
    return _fisheye(values, given) if fisheye else _polynomial(values, given, model)


def _fisheye(values: dict[str, float], given: list[str]) -> Lens:
    extra = [key for key in given if key not in RADIAL[:4]]
    if extra:
        raise UserError(
            f"a fisheye lens has no {', '.join(extra)}; take them out or correct the camera_model"
        )
    return Lens(True, tuple(values[key] for key in RADIAL[:4]))


def _polynomial(values: dict[str, float], given: list[str], model: str | None) -> Lens | None:
    if not given:
        return None
    if model in PINHOLES:
        raise UserError(
            f"camera_model {model!r} has no lens distortion ({', '.join(given)}); correct one of them"
        )
    if "k4" in given and model != "FULL_OPENCV" and not {"k5", "k6"} & set(given):
        raise UserError(
            "k4 is a denominator's coefficient in OpenCV and one of r^8 in nerfstudio; "
            "give camera_model FULL_OPENCV for the first, or undistort the images"
        )
    p1, p2 = (values[key] for key in TANGENTIAL)
    return Lens(False, tuple(values[key] for key in RADIAL), (p1, p2))


def _coefficients(entries: dict) -> dict[str, float]:
    """k1 ... k6, p1 and p2, from keys of these names or from nerfstudio's list; 0 where none is given."""
    values = {
        key: number(entries, key) if entries.get(key) is not None else 0.0 for key in (*RADIAL, *TANGENTIAL)
    }
    if entries.get(LIST) is None:
        return values
    listed = entries[LIST]
    if not isinstance(listed, list):
        raise UserError(f"{LIST} is {quoted(listed)}, not a list of numbers")
    numbers = [number({LIST: value}, LIST) for value in listed]
    if not any(numbers):
        return values
    if len(numbers) != len(LISTED):
        raise UserError(f"{LIST} has {len(numbers)} numbers, not {', '.join(LISTED)}; give each by its name")
    by_name = dict(zip(LISTED, numbers, strict=True))
    if any(values.values()) and any(values[key] != value for key, value in by_name.items()):
        raise UserError(f"{LIST} and {', '.join(LISTED)} contradict each other; take one of them out")
    return values | by_name
