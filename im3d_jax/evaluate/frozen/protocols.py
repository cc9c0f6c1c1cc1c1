"""Where the cameras of an evaluation stand: ours, and the static and the dynamic orbit of SV3D.

SV3D (Voleti et al. 2024) has 21 views, and its conditioning image is the last of them. Its public sampling
code says what the orbits are: the static one has azimuths 360 / 21 degrees apart at one elevation, by default
10 degrees; on the dynamic one the azimuths are irregular, and the elevation is a sum of sinusoids that close
after one turn. It does not say at which elevations the paper's static orbits are: here they are the default,
or what is given. The random numbers are ours, so that the dynamic orbits are of the same distribution as
SV3D's, and not the same ones.
"""

from __future__ import annotations

import zlib
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from im3d_jax.data import objects
from recon_torch.errors import UserError

FOV_DEG, RADIUS = 33.8, 2.0

SV3D_VIEWS, SV3D_PX, SV3D_ELEVATION_DEG = 21, 576, 10.0
FINE_STEPS = 84
"""The points of a loop from which SV3D takes every fourth as a view."""
FINE_PER_VIEW = FINE_STEPS // SV3D_VIEWS
NUM_SINUSOIDS, TURNS, AMPLITUDES_DEG = 84, (1, 2, 3, 4), (0.5, 10.0)
SMOOTHED_OVER = 5
"""Points of the loop over which its elevations are averaged."""
STEEPEST_DEG = 90.0
MOST_DRAWS = 1000


class Protocol(StrEnum):
    """How an object is looked at."""

    IM3D = "im3d"
    SV3D_STATIC = "sv3d-static"
    SV3D_DYNAMIC = "sv3d-dynamic"


class Angles(NamedTuple):
    """Where K cameras stand, and which of their views a method is given; azimuths are 0 there."""

    azimuths_deg: Float[np.ndarray, " K"]
    elevations_deg: Float[np.ndarray, " K"]
    given: int


VIEWS = {Protocol.IM3D: 16, Protocol.SV3D_STATIC: SV3D_VIEWS, Protocol.SV3D_DYNAMIC: SV3D_VIEWS}
SIZES_PX = {Protocol.IM3D: 512, Protocol.SV3D_STATIC: SV3D_PX, Protocol.SV3D_DYNAMIC: SV3D_PX}


def angles(protocol: Protocol, name: str, seed: int, elevation_deg: float | None = None) -> Angles:
    """The views of the object of a name, which depend on no other object.

    Args:
        elevation_deg: of all views, or for the dynamic orbit of the given one. By default, ours are drawn for
            each object from U[0, 45] degrees, as those of training are, and SV3D's are 10 degrees.

    Raises UserError if no dynamic orbit around this elevation stays below the pole.
    """
    number = zlib.crc32(name.encode())
    if protocol == Protocol.IM3D:
        drawn = np.rad2deg(objects.elevation_rad(seed, number)) if elevation_deg is None else elevation_deg
        return Angles(np.arange(16) * 360 / 16, np.full(16, drawn), 0)
    base = SV3D_ELEVATION_DEG if elevation_deg is None else elevation_deg
    if protocol == Protocol.SV3D_STATIC:
        azimuths = np.arange(1, SV3D_VIEWS + 1) * 360 / SV3D_VIEWS % 360
        return Angles(azimuths, np.full(SV3D_VIEWS, base), SV3D_VIEWS - 1)
    return _dynamic(objects.random_generator(seed + 2**33, number), base)


def _dynamic(rng: np.random.Generator, base_deg: float) -> Angles:
    """A dynamic orbit, whose last view is the given one, at azimuth 0 and the base elevation."""
    for _ in range(MOST_DRAWS):
        amplitudes = rng.uniform(*AMPLITUDES_DEG, NUM_SINUSOIDS) * rng.choice([-1.0, 1.0], NUM_SINUSOIDS)
        elevations = loop_deg(base_deg, rng.choice(TURNS, NUM_SINUSOIDS), amplitudes)
        if np.abs(elevations).max() < STEEPEST_DEG:
            break
    else:
        raise UserError(f"no dynamic orbit around an elevation of {base_deg:g} degrees; give one nearer to 0")
    steps, rest = rng.uniform(0, 2, FINE_STEPS - 1), rng.uniform(0, 2)
    azimuths = np.cumsum(np.concatenate([[0.0], steps])) * (360 - rest * 360 / FINE_STEPS) / steps.sum()
    chosen = np.roll(np.arange(0, FINE_STEPS, FINE_PER_VIEW), -1)
    return Angles(azimuths[chosen], elevations[chosen], SV3D_VIEWS - 1)


def loop_deg(
    base_deg: float, turns: np.ndarray, amplitudes_deg: Float[np.ndarray, " S"]
) -> Float[np.ndarray, " T"]:
    """The elevations of a loop: a sum of sinusoids, averaged over the points around each.

    The mean of a sinusoid over a window around a point is the sinusoid times the Dirichlet kernel of the
    window, so that the average need not be taken.
    """
    half_rad = np.pi * turns / FINE_STEPS
    damped = amplitudes_deg * np.sin(SMOOTHED_OVER * half_rad) / (SMOOTHED_OVER * np.sin(half_rad))
    times = np.arange(FINE_STEPS)[:, None]
    return base_deg + (damped * np.sin(2 * half_rad * times)).sum(1)
