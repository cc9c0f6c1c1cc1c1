"""Cameras and orbits against closed-form geometry."""

import numpy as np
import pytest

from recon_torch.views.cameras import Cameras, orbit


def project(cameras: Cameras, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [K,P,2] and depths [K,P] of world points [P,3], in float64."""
    w2c = cameras.w2c.astype(np.float64)
    local = points @ w2c[:, :3, :3].transpose(0, 2, 1) + w2c[:, None, :3, 3]
    image = local @ cameras.intrinsics_px.astype(np.float64).transpose(0, 2, 1)
    return image[..., :2] / image[..., 2:], local[..., 2]


def test_orbit_cameras_stand_where_they_should_and_see_the_origin_in_the_middle():
    elevation = np.linspace(-1.2, 1.2, 16)
    cameras = orbit(16, elevation, 64, radius=2.5)
    azimuth = 2 * np.pi * np.arange(16) / 16
    expected = 2.5 * np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1
    )
    np.testing.assert_allclose(cameras.positions, expected, atol=1e-6)
    pixels, depths = project(cameras, np.zeros((1, 3)))
    np.testing.assert_allclose(pixels, 32, atol=1e-4)
    np.testing.assert_allclose(depths, 2.5, atol=1e-6)
    rotations = cameras.w2c[:, :3, :3].astype(np.float64)
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (16, 1, 1)), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-6)


def test_orbit_is_upright_and_counter_clockwise():
    cameras = orbit(4, 0.4, 64)
    up, _ = project(cameras, np.array([[0, 0, 0.1], [0, 0, -0.1]]))
    assert (up[:, 0, 1] < up[:, 1, 1]).all()  # +Z is towards the top row
    side, _ = project(cameras[0], np.array([[0, 0.1, 0.0]]))
    assert side[0, 0, 0] > 32  # from azimuth 0, +Y is on the right
    np.testing.assert_allclose(cameras[1].positions[0, :2], [0, 2 * np.cos(0.4)], atol=1e-6)


def test_the_field_of_view_ends_at_the_edge_of_the_image():
    cameras = orbit(1, 0.0, 100, radius=2.0, fov_deg=33.8)
    top = np.array([[0, 0, 2.0 * np.tan(np.radians(33.8 / 2))]])
    pixels, _ = project(cameras, top)
    np.testing.assert_allclose(pixels[0, 0], [50, 0], atol=1e-4)


def test_indexing_and_resizing():
    cameras = orbit(8, 0.2, 64)
    assert len(cameras[3]) == 1 and len(cameras[::2]) == 4 and len(cameras[np.array([1, 5, 6])]) == 3
    np.testing.assert_array_equal(cameras[[5]].w2c[0], cameras.w2c[5])
    point = np.array([[0.1, 0.2, 0.3]])
    wide = cameras.resized(128, 32)
    np.testing.assert_allclose(
        project(wide, point)[0], project(cameras, point)[0] * np.array([2.0, 0.5]), rtol=1e-5
    )
    assert (wide.width, wide.height) == (128, 32)


def test_points_are_projected_into_every_image():
    cameras = orbit(5, 0.4, 64, radius=1.0).resized(80, 64)
    points = np.random.default_rng(0).uniform(-1.5, 1.5, (400, 3))
    found = cameras.project(points)
    pixels, depths = project(cameras, points)
    np.testing.assert_allclose(found.depths, depths, atol=1e-12)
    in_front = depths > 0
    assert 0 < in_front.mean() < 1
    np.testing.assert_allclose(found.pixels[in_front], pixels[in_front], atol=1e-9)
    inside = (pixels >= 0).all(-1) & (pixels[..., 0] < 80) & (pixels[..., 1] < 64)
    np.testing.assert_array_equal(found.seen, in_front & inside)


def test_an_image_without_pixels_is_refused():
    cameras = orbit(2, 0.3, 8)
    with pytest.raises(ValueError, match="must be positive, got 0 x 8"):
        Cameras(cameras.w2c, cameras.intrinsics_px, 0, 8)
