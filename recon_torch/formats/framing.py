"""Where an asset lies in a world that may be any, so that cameras can be put around it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from recon_torch.asset_files import ASSET, REPORT
from recon_torch.errors import UserError
from recon_torch.formats.ply import Loaded
from recon_torch.raster.gaussians import Gaussians
from recon_torch.settings import UP_AXES
from recon_torch.text_files import read_json
from recon_torch.views import axes
from recon_torch.views.world import OBJECT_RADIUS, World

UNIT = World(np.zeros(3), 1.0)
SIGMAS = 2.0  # how far a Gaussian reaches
STRAY = 0.005  # the share of opacity beyond either end of the box that is looked at, for floaters
# An object of this radius, at most so far from the origin, is where this package puts objects.
SMALLEST_RADIUS, LARGEST_REACH = 0.03, 0.8
LARGEST_NUMBER = 1e12  # in a report


def world_of(gaussians: Gaussians) -> World:
    """The world in which the object has unit size and lies at the origin; `UNIT` if it does already.

    Opacity decides how much a Gaussian counts, and the outermost ones of each axis are left out, because
    captured scenes have some far away from the object.
    """
    means = gaussians.means.double().cpu().numpy()
    reach = SIGMAS * gaussians.log_scales.double().exp().max(-1).values.cpu().numpy()
    weights = gaussians.opacities.double().cpu().numpy()
    center, radius = _ball(means, reach, weights)
    if radius >= SMALLEST_RADIUS and np.linalg.norm(center) + radius <= LARGEST_REACH:
        return UNIT
    return World(center, OBJECT_RADIUS / radius)


def _ball(
    means: Float[np.ndarray, "N 3"], reach: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "3"], float]:
    """The middle of the box around most of the Gaussians, and the distance to where the farthest reaches."""
    inside = np.ones(len(means), bool)
    for axis in range(3):
        order = np.argsort(means[:, axis], kind="stable")
        share = np.cumsum(weights[order]) / max(weights.sum(), np.finfo(np.float64).tiny)
        before = np.concatenate([[0.0], share[:-1]])
        inside[order[(share < STRAY) | (before > 1 - STRAY)]] = False
    if not inside.any():  # all are strays of one axis or another
        inside[weights.argmax()] = True
    inside &= reach <= np.quantile(reach[inside], 1 - STRAY)
    kept, reach = means[inside], reach[inside]
    center = ((kept - reach[:, None]).min(0) + (kept + reach[:, None]).max(0)) / 2
    radius = float((np.linalg.norm(kept - center, axis=-1) + reach).max())
    return center, max(radius, 1e-6 * float(np.abs(center).max()), 1e-12)


def world_of_report(report: Any, num_gaussians: int) -> tuple[World, str] | None:
    """The world and the axis that is up of an asset, from the report of its fit; None if it is of another.

    report: the content of a report.json, which may be anything.
    """
    place = report.get("world") if isinstance(report, dict) else None
    if not isinstance(place, dict) or report.get("num_gaussians") != num_gaussians:
        return None
    center, scale, up = place.get("center"), place.get("scale"), place.get("up")
    axis = next((name for name, each in UP_AXES.items() if up == list(each)), None)
    numbers = [*center, scale] if isinstance(center, list) else []
    plain = all(type(each) in (int, float) and abs(each) < LARGEST_NUMBER for each in numbers)
    if axis is None or scale is None or len(numbers) != 4 or not plain or not scale > 1 / LARGEST_NUMBER:
        return None
    normalized = place.get("asset_is_normalized") is True
    return (UNIT if normalized else World(np.array(center, np.float64), float(scale))), axis


def place_of(path: Path, loaded: Loaded) -> tuple[World, str]:
    """Where the Gaussians of a file lie, and which axis is up: what the fit has noted, or what they show.

    Without a note of the fit, the axis is what the file says, or else z.
    """
    report = path.with_name(REPORT)
    if path.name == ASSET and report.is_file():
        with contextlib.suppress(UserError):  # a report that is damaged, or of another program
            known = world_of_report(read_json(report), len(loaded.gaussians.means))
            if known is not None:
                return known
    up = "z" if loaded.upright is None else axes.up_of(loaded.upright)
    return world_of(loaded.gaussians), up


def moved_into(gaussians: Gaussians, world: World) -> Gaussians:
    """Gaussians of another world, in this one."""
    means = world.scale * (
        gaussians.means.double() - torch.from_numpy(world.center).to(gaussians.means.device)
    )
    log_scales = gaussians.log_scales + math.log(world.scale)
    return gaussians._replace(means=means.to(gaussians.means.dtype), log_scales=log_scales)
