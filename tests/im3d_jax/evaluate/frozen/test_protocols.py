"""Orbits of the protocols: SV3D's loop against its own definition, point by point."""

import numpy as np
import pytest

from im3d_jax.evaluate.frozen import protocols
from im3d_jax.evaluate.frozen.protocols import Protocol


def test_ours_is_the_turntable_of_training():
    found = protocols.angles(Protocol.IM3D, "animals__frog", 0)
    np.testing.assert_allclose(found.azimuths_deg, 22.5 * np.arange(16))
    assert found.given == 0 and np.ptp(found.elevations_deg) == 0 and 0 <= found.elevations_deg[0] <= 45
    assert protocols.angles(Protocol.IM3D, "animals__pug", 0).elevations_deg[0] != found.elevations_deg[0]
    assert protocols.angles(Protocol.IM3D, "a", 0, 20.0).elevations_deg[0] == 20


def test_the_static_orbit_ends_with_the_given_view():
    found = protocols.angles(Protocol.SV3D_STATIC, "a", 0)
    assert len(found.azimuths_deg) == 21 and found.given == 20
    np.testing.assert_allclose(found.azimuths_deg[[0, 1, 19, 20]], [360 / 21, 720 / 21, 7200 / 21, 0])
    np.testing.assert_array_equal(found.elevations_deg, 10)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_dynamic_orbit_closes_and_stays_below_the_pole(name):
    found = protocols.angles(Protocol.SV3D_DYNAMIC, name, 0, 5.0)
    assert len(found.azimuths_deg) == 21 and found.given == 20
    assert found.azimuths_deg[20] == 0 and found.elevations_deg[20] == pytest.approx(5)
    assert (np.diff(found.azimuths_deg[:20]) > 0).all() and found.azimuths_deg[0] > 0
    assert found.azimuths_deg[19] < 360 and np.abs(found.elevations_deg).max() < 90
    assert np.ptp(found.elevations_deg) > 20 and np.ptp(np.diff(found.azimuths_deg[:20])) > 2


def test_the_loop_is_a_smoothed_sum_of_sinusoids():
    turns, amplitudes = np.array([1, 4, 3, 2]), np.array([3.0, -7.0, 0.5, 9.0])
    rough = [
        12 + sum(a * np.sin(2 * np.pi * n * t / 84) for n, a in zip(turns, amplitudes, strict=True))
        for t in range(84)
    ]
    smooth = [np.mean([rough[(t + shift) % 84] for shift in (-2, -1, 0, 1, 2)]) for t in range(84)]
    np.testing.assert_allclose(protocols.loop_deg(12.0, turns, amplitudes), smooth, atol=1e-9)


def test_an_orbit_that_cannot_be_is_refused(user_error):
    with user_error("no dynamic orbit around an elevation of 89.9 degrees"):
        protocols.angles(Protocol.SV3D_DYNAMIC, "a", 0, 89.9)
