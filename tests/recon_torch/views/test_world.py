"""The fit's world: found from cameras or masks, there and back, whatever is up."""

import numpy as np
import pytest
import torch

from recon_torch.errors import UserError
from recon_torch.raster.gaussians import Gaussians
from recon_torch.scene.splats import moved_back
from recon_torch.views import world
from recon_torch.views.cameras import Cameras, orbit

MOVED_BY, ENLARGED_BY = np.array([3.0, -1.0, 2.0]), 2.5
CAMERAS = orbit(8, 0.3, 64)


def moved(cameras: Cameras, by=MOVED_BY, enlarged_by=ENLARGED_BY) -> Cameras:
    """The same pictures of an object that is elsewhere and larger."""
    w2c = cameras.w2c.astype(np.float64)
    w2c[:, :3, 3] = enlarged_by * w2c[:, :3, 3] - w2c[:, :3, :3] @ by
    return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def turned(cameras: Cameras, rotation: np.ndarray) -> Cameras:
    """The same pictures of an object that was turned by a rotation."""
    w2c = cameras.w2c.astype(np.float64)
    w2c[:, :3, :3] = w2c[:, :3, :3] @ rotation.T
    return Cameras(w2c, cameras.intrinsics_px, cameras.width, cameras.height)


def test_orbits_are_in_the_world_of_the_fit_already():
    center, scale = world.of_cameras(orbit(16, 0.5, 32))
    np.testing.assert_allclose(center, 0, atol=1e-6)
    assert scale == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("by", [MOVED_BY, MOVED_BY + 4_000_000.0])
def test_the_world_of_cameras_undoes_a_move(by):
    there = moved(CAMERAS, by)
    unit = world.of_cameras(there)
    np.testing.assert_allclose(unit.center, by, rtol=0, atol=1e-5)
    assert unit.scale == pytest.approx(1 / ENLARGED_BY, rel=1e-5)
    back = unit.cameras(there)
    np.testing.assert_allclose(back.w2c, CAMERAS.w2c, atol=1e-5)
    assert back.w2c.dtype == np.float32


def test_gaussians_go_back_to_where_the_views_have_them():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5, 4), (5, 3), (5,), (5, 3)]
    gaussians = Gaussians(*(0.2 * torch.randn(shape, generator=generator) for shape in shapes))
    there = moved(CAMERAS)
    away = moved_back(gaussians, world.of_cameras(there))
    np.testing.assert_allclose(away.means, ENLARGED_BY * gaussians.means.numpy() + MOVED_BY, atol=1e-5)
    np.testing.assert_allclose(away.scales, ENLARGED_BY * gaussians.scales.numpy(), rtol=1e-5)
    assert torch.equal(away.quats, gaussians.quats) and torch.equal(away.sh0, gaussians.sh0)


def test_one_stray_camera_hardly_moves_the_focus():
    stray = CAMERAS.w2c.copy()
    stray[3, :3, :3] = stray[3, :3, :3] @ np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # looks aside
    cameras = Cameras(stray, CAMERAS.intrinsics_px, 64, 64)
    assert np.linalg.norm(world.focus(cameras)) < 0.02


def test_cameras_that_look_the_same_way_have_no_focus():
    with pytest.raises(UserError, match="same way"):
        world.focus(orbit(3, 0.3, 32, azimuths_rad=np.zeros(3)))


def tilt() -> np.ndarray:
    """A rotation about no axis of the world."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    return rotation * np.sign(np.linalg.det(rotation))


@pytest.mark.parametrize("rotation", [np.eye(3), tilt()])
@pytest.mark.parametrize("elevation_rad", [-0.5, 0.3, 1.2])
def test_cameras_on_one_side_are_told_in_any_world(rotation, elevation_rad):
    def said(azimuths_deg) -> list[str]:
        cameras = orbit(0, elevation_rad, 32, azimuths_rad=np.radians(azimuths_deg))
        return world.sparseness(moved(turned(cameras, rotation)))

    (note,) = said([350, 10, 35, 80])
    assert note.startswith("all cameras stand within 90 degrees around the object")
    assert said([0, 90, 180, 270]) == said([0, 60, 120, 180]) == []
    assert said([0, 120, 240]) == ["3 views are few; give at least 4 from around the object"]
    assert len(said([0, 60])) == 2


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.0), (1.0, -2.0, 3.0), (4000.0, 9.0, 0.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cameras_in_one_place_have_no_world(place, dtype, user_error):
    """They look around themselves, and their axes meet where they stand."""
    w2c = CAMERAS.w2c.astype(dtype)
    w2c[:, :3, 3] = -w2c[:, :3, :3] @ np.array(place, dtype)
    with user_error("the cameras all stand in one place"):
        world.of_cameras(Cameras(w2c, CAMERAS.intrinsics_px, 64, 64))


@pytest.mark.parametrize(("center", "radius"), [((0.3, -0.2, 0.1), 0.15), ((0.0, 0.0, 0.0), 0.45)])
def test_the_world_of_masks_has_the_object_in_its_middle(ball_masks, center, radius):
    elevations = np.tile([0.0, 0.8], 4)
    cameras = orbit(8, elevations, 128)
    masks = ball_masks(cameras, np.array(center), radius)
    unit = world.of_masks(moved(cameras), masks)
    cell = 2 * world.SEARCHED_HALF_WIDTH / world.SEARCHED_CELLS
    np.testing.assert_allclose((unit.center - MOVED_BY) / ENLARGED_BY, center, atol=1.5 * cell)
    found_radius = world.OBJECT_RADIUS / (unit.scale * ENLARGED_BY)
    assert radius < found_radius < 1.25 * radius + 2 * cell


def test_masks_and_cameras_that_do_not_belong_together_have_no_world(ball_masks):
    cameras = orbit(8, 0.3, 64)
    masks = ball_masks(cameras, np.array([0.4, 0.0, 0.0]), 0.1)
    with pytest.raises(UserError, match="inside all masks"):
        world.of_masks(cameras, masks[[0, 4, 2, 6, 1, 5, 3, 7]])


@pytest.mark.parametrize("up", [(0, 0, 1), (0, 1, 0), (-1, 0, 0), (0, 0, -1), (0, -1, 0), (1, 0, 0)])
def test_up_is_what_is_up_in_the_pictures(up):
    side = np.roll(up, 1)
    rotation = np.stack([side, np.cross(up, side), up], 1)  # takes +Z to `up`
    cameras = turned(orbit(8, 0.3, 64), rotation)
    np.testing.assert_array_equal(world.up_axis(cameras), up)
    circle = world.turntable(world.of_cameras(cameras).cameras(cameras), world.up_axis(cameras), 6)
    heights = circle.positions @ np.array(up)
    np.testing.assert_allclose(heights, 2 * np.sin(0.3), atol=1e-5)
    np.testing.assert_allclose(-circle.w2c[:, 1, :3] @ np.array(up), np.cos(0.3), atol=1e-5)  # upright
    turns = np.cross(circle.positions[:-1], circle.positions[1:]) @ np.array(up)
    assert (turns > 0).all()  # counter-clockwise


def test_cameras_that_look_down_have_z_up():
    np.testing.assert_array_equal(world.up_axis(orbit(8, np.radians(90), 64)), [0, 0, 1])


def test_turntable_keeps_height_distance_and_field_of_view():
    cameras = orbit(8, 0.3, 64, radius=1.7, fov_deg=50.0)
    circle = world.turntable(cameras, np.array([0.0, 0, 1]), 6)
    expected = orbit(6, 0.3, 64, radius=1.7, fov_deg=50.0)
    np.testing.assert_allclose(circle.w2c, expected.w2c, atol=1e-5)
    np.testing.assert_allclose(circle.intrinsics_px, expected.intrinsics_px, rtol=1e-5)
