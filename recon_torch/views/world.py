"""The world that a fit works in, where the object lies in the ball of radius 0.5, and where views say it is.

A point x of the views' own world is scale * (x - center) in the world of the fit. Axes keep their directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.views import hull
from recon_torch.views.cameras import Cameras, orbit

HALF_WIDTH = 2.0 * np.tan(np.radians(33.8 / 2))  # half of what `cameras.orbit` sees at the origin
FOCUS_ROUNDS = 20  # rounds of reweighting, after which the focus moves by less than 1e-3 of its distance
ONE_PLACE_EPS = 64  # roundings by which cameras in one place may be apart
SEARCHED_HALF_WIDTH, SEARCHED_CELLS = 1.5, 64  # the cube in which the object is searched
REACH = np.sqrt(3) * SEARCHED_HALF_WIDTH / SEARCHED_CELLS  # half of a cell's diagonal
OBJECT_RADIUS = 0.45  # radius of the hull of the masks in the world that `of_masks` makes
# Bounds on the hull of the masks in the world that `of_cameras` makes; beyond them `of_views` adds a note.
SMALLEST_RADIUS, LARGEST_RADIUS, MOST_OFFSET = 0.2, 0.65, 0.25
FEWEST_VIEWS = 4
LEAST_SEEN_DEG = 175.0  # of a turn around the object; half of one is seen by two cameras that face each other
LEAST_UP = 0.1  # length of the mean of what is up in the pictures, below which they do not tell it
LEAST_SPREAD = 0.1  # of the rows of pictures in a second direction, by that in the first


class World(NamedTuple):
    """Where the object lies in the views' world, and the scale that gives it unit size."""

    center: Float[np.ndarray, "3"]
    scale: float

    def cameras(self, cameras: Cameras) -> Cameras:
        """Cameras of the views' world as cameras of the fit's world, in float32."""
        w2c = cameras.w2c.astype(np.float64)
        w2c[:, :3, 3] = self.scale * (w2c[:, :3, :3] @ self.center + w2c[:, :3, 3])
        return Cameras(w2c.astype(np.float32), cameras.intrinsics_px, cameras.width, cameras.height)

    def cameras_back(self, cameras: Cameras) -> Cameras:
        """Cameras of the fit's world as cameras of the views' world, in float64."""
        w2c = cameras.w2c.astype(np.float64)
        w2c[:, :3, 3] = w2c[:, :3, 3] / self.scale - w2c[:, :3, :3] @ self.center
        return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def of_cameras(cameras: Cameras) -> World:
    """Made from the cameras alone: their focus is the origin, where they see as much as `orbit`'s cameras do.

    Raises:
        UserError: the axes are parallel, so they meet nowhere, or the cameras stand where they meet.
    """
    center = focus(cameras)
    half_width = 0.5 * min(cameras.width, cameras.height) / cameras.intrinsics_px[:, 1, 1]
    distance = np.linalg.norm(cameras.positions - center, axis=-1)
    if distance.max() <= ONE_PLACE_EPS * np.finfo(cameras.w2c.dtype).eps * np.abs(cameras.positions).max():
        raise UserError("the cameras all stand in one place; give views from around the object")
    return World(center, float(HALF_WIDTH / np.mean(distance * half_width)))


def focus(cameras: Cameras) -> Float[np.ndarray, "3"]:
    """The point with the least sum of distances to the optical axes, which a stray camera hardly moves.

    Raises:
        UserError: the axes are parallel, so they meet nowhere.
    """
    axes, positions = cameras.w2c[:, 2, :3].astype(np.float64), cameras.positions
    off_axis = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    if np.linalg.cond(off_axis.sum(0)) > 1e6:
        raise UserError("the cameras all look the same way; give views from around the object")
    middle = positions.mean(0)  # positions relative to it are small numbers, wherever the world's origin is
    weights = np.ones(len(axes))
    # Weiszfeld's algorithm: least squares whose weights become 1 / distance.
    for _ in range(FOCUS_ROUNDS):
        system = np.einsum("k,kij->ij", weights, off_axis)
        center = np.linalg.solve(system, np.einsum("k,kij,kj->i", weights, off_axis, positions - middle))
        apart = np.linalg.norm(positions - middle - center, axis=-1)
        distances = np.linalg.norm(np.einsum("kij,kj->ki", off_axis, positions - middle - center), axis=-1)
        weights = 1 / np.maximum(distances, 1e-4 * np.median(apart) + 1e-30)
    return center + middle


def hull_of_masks(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> Float[np.ndarray, "N 3"]:
    """The points of a grid that lie inside the visual hull of the object; there may be none.

    cameras: in the world of a fit.
    """
    points = hull.grid(SEARCHED_HALF_WIDTH, SEARCHED_CELLS)
    return points[hull.hull(hull.verdicts(points, cameras, masks, REACH))]


def ball_around(points: Float[np.ndarray, "N 3"]) -> tuple[Float[np.ndarray, "3"], float]:
    """The middle of the points' bounding box and their greatest distance to it."""
    center = (points.min(0) + points.max(0)) / 2
    return center, float(np.linalg.norm(points - center, axis=-1).max())


def of_masks(cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> World:
    """Made from the visual hull of the masks around the cameras' focus: the middle of the hull is the origin.

    Raises:
        UserError: the hull is empty, or the cameras have no focus.
    """
    coarse = of_cameras(cameras)
    points = hull_of_masks(coarse.cameras(cameras), masks)
    if not len(points):
        raise UserError("no point is inside all masks; do the cameras and the images belong together?")
    center, radius = ball_around(points)
    return World(coarse.center + center / coarse.scale, coarse.scale * OBJECT_RADIUS / radius)


def of_views(
    cameras: Cameras, masks: Float[np.ndarray, "K H W 1"] | None, normalize: bool
) -> tuple[World, list[str]]:
    """The world to fit in, and notes on what speaks against it.

    Args:
        masks: None where the views have none.
        normalize: make it from the masks, otherwise from the cameras.

    Raises:
        UserError: see `of_masks` and `of_cameras`; normalize without masks.
    """
    if normalize and masks is None:
        raise UserError("--normalize needs masks; give mask_path, alpha or --isnet-weights")
    if normalize and masks is not None:
        return of_masks(cameras, masks), []
    unit = of_cameras(cameras)
    if masks is None:
        return unit, []
    points = hull_of_masks(unit.cameras(cameras), masks)
    if not len(points):
        note = "no point is inside all masks; do the cameras and the images belong together (--check)?"
        return unit, [note]
    center, radius = ball_around(points)
    offset = float(np.linalg.norm(center))
    if offset <= MOST_OFFSET and SMALLEST_RADIUS <= radius <= LARGEST_RADIUS:
        return unit, []
    note = (
        f"by the masks the object has radius {radius:.2f}, {offset:.2f} from where the cameras look; "
        "the fit expects 0.5 and 0: try --normalize"
    )
    return unit, [note]


def up_axis(cameras: Cameras) -> Float[np.ndarray, "3"]:
    """The axis of the world (+X, -X, +Y, ...) that is nearest to up in the images; +Z if none is near."""
    up = -cameras.w2c[:, 1, :3].mean(0)
    axis = np.zeros(3)
    if np.linalg.norm(up) < LEAST_UP:  # the cameras look straight down, from all sides
        axis[2] = 1.0
    else:
        axis[np.abs(up).argmax()] = np.sign(up[np.abs(up).argmax()])
    return axis


def sparseness(cameras: Cameras) -> list[str]:
    """What is to be said of cameras that are few, or that all stand on one side of the object.

    A fit agrees with such views and is a guess everywhere else.

    Raises UserError if the cameras have no focus.
    """
    found = []
    if len(cameras) < FEWEST_VIEWS:
        found.append(f"{len(cameras)} views are few; give at least {FEWEST_VIEWS} from around the object")
    across = _level(cameras)
    if across is None:
        return found
    toward = cameras.positions - focus(cameras)
    x, y = across @ toward.T
    azimuths_deg = np.sort(np.degrees(np.arctan2(y, x)))
    seen_deg = 360 - np.diff(azimuths_deg, append=azimuths_deg[0] + 360).max()
    if seen_deg < LEAST_SEEN_DEG:
        found.append(
            f"all cameras stand within {seen_deg:.0f} degrees around the object: its other side is a guess"
        )
    return found


def _level(cameras: Cameras) -> Float[np.ndarray, "2 3"] | None:
    """Two directions that span the plane about which cameras stand upright; None if they do not tell it.

    Where they stand around, the rows of their pictures lie in it; else what is up in these tells it.
    """
    _, spread, directions = np.linalg.svd(cameras.w2c[:, 0, :3].astype(np.float64), full_matrices=True)
    if len(spread) > 1 and spread[1] > LEAST_SPREAD * spread[0]:
        return directions[:2]
    up = -cameras.w2c[:, 1, :3].mean(0)
    return None if np.linalg.norm(up) < LEAST_UP else np.linalg.svd(up[None])[2][1:]


def turntable(cameras: Cameras, up: Float[np.ndarray, "3"], num_frames: int) -> Cameras:
    """A full circle around `up` with the mean elevation, distance and field of view of `cameras`."""
    positions = cameras.positions
    distance = np.linalg.norm(positions, axis=-1)
    elevation_rad = np.arcsin(positions @ up / distance).mean()
    size = min(cameras.width, cameras.height)
    fov_rad = 2 * np.arctan(0.5 * size / cameras.intrinsics_px[:, 1, 1].mean())
    circle = orbit(
        num_frames,
        float(elevation_rad),
        size,
        radius=float(distance.mean()),
        fov_deg=float(np.degrees(fov_rad)),
    )
    return around(up, circle)


def around(up: Float[np.ndarray, "3"], cameras: Cameras) -> Cameras:
    """Cameras around the origin of a world in which +Z is up, in one in which `up` is.

    up: an axis of the world or the opposite of one.
    """
    w2c = cameras.w2c.copy()
    w2c[:, :3, :3] = cameras.w2c[:, :3, :3] @ upright_rows(up)
    return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def upright_rows(up: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation that takes an axis of the world, or the opposite of one, to +Z; +Z stays as it is."""
    side = np.roll(up, 1)  # any axis across, which becomes +X
    return np.stack([side, np.cross(up, side), up])
