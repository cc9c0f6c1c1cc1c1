"""What cameras see of an object: the colours of what covers a pixel, without background, and how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from recon_torch.raster import LOW_PASS_PX2
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views
from recon_torch.views.images import straight
from recon_torch.views.world import HALF_WIDTH

GOLDEN_ANGLE_RAD = np.pi * (3 - np.sqrt(5))  # azimuths that never repeat


class Sights(NamedTuple):
    """K views of an object in the unit world.

    Attributes:
        rgb: sRGB of what covers a pixel alone, in [0, 1].
        alpha: the coverage, in [0, 1].
        weight: how much these views count in a texture beside others.
    """

    cameras: Cameras
    rgb: Float32[np.ndarray, "K H W 3"]
    alpha: Float32[np.ndarray, "K H W"]
    weight: float = 1.0


def sphere(num_views: int, size: int) -> Cameras:
    """Cameras of the default orbit's radius and field of view, spread evenly over the whole sphere."""
    heights = 1 - (2 * np.arange(num_views) + 1) / num_views
    azimuths_rad = np.arange(num_views) * GOLDEN_ANGLE_RAD
    return orbit(elevation_rad=np.arcsin(heights), size=size, azimuths_rad=azimuths_rad)


def low_pass_px2(size: int, fitted_px: float) -> float:
    """What shows Gaussians at `size` pixels as those saw them that were fitted at another size.

    Viewers blur each Gaussian by about a pixel, and a fit counts on that: drawn larger without it, its
    Gaussians have gaps between them.
    """
    return LOW_PASS_PX2 * (size / fitted_px) ** 2


def blurred(gaussians: Gaussians, fitted_px: float) -> Gaussians:
    """Gaussians of the unit world as wide as viewers draw them at the size of the fit, see `low_pass_px2`."""
    variance = LOW_PASS_PX2 * (2 * HALF_WIDTH / fitted_px) ** 2
    return gaussians._replace(log_scales=0.5 * (gaussians.scales**2 + variance).log())


@torch.no_grad()
def look(
    gaussians: Gaussians,
    cameras: Cameras,
    low_pass_px2: float = LOW_PASS_PX2,
    weight: float = 1.0,
    on_view: Callable[[], object] = lambda: None,
) -> Sights:
    """Renders Gaussians of the unit world. on_view: called after each view."""
    rgb, alpha = [], []
    for index in range(len(cameras)):
        seen = render(gaussians, cameras[index], low_pass_px2=low_pass_px2)  # over black
        covered = seen.alpha[0].clamp(0, 1)
        rgb.append((seen.rgb[0] / covered.clamp_min(1e-6)).clamp(0, 1).cpu().numpy())
        alpha.append(covered[..., 0].cpu().numpy())
        on_view()
    return Sights(cameras, np.stack(rgb), np.stack(alpha), weight)


def of_views(views: Views, weight: float = 1.0) -> Sights | None:
    """Views whose cameras are in the unit world; None without masks, as background is in the colours."""
    if views.masks is None:
        return None
    rgb = straight(views.images, views.masks)[..., :3]  # they are over white
    return Sights(views.cameras, rgb.astype(np.float32), views.masks[..., 0].astype(np.float32), weight)
