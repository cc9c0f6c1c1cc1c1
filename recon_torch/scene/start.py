"""Where the Gaussians of a fit begin: in a ball (Sec. A.1), within the visual hull of the masks."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster.gaussians import Gaussians
from recon_torch.views import hull
from recon_torch.views.cameras import Cameras

INITIAL_OPACITY = 0.1
HULL_REACH = 0.0135  # world units by which a Gaussian may begin outside of the visual hull


def init_ball(
    num: int,
    radius: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Gaussians:
    """Grey Gaussians spread evenly over a ball around the origin (Sec. A.1: 5000 points at the centre).

    Each is a sphere with a standard deviation of half the mean distance between neighbours. The random
    numbers are drawn on the CPU, so a seed gives the same start on every device.
    """
    direction = torch.randn(num, 3, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    distance = radius * torch.rand(num, 1, generator=generator) ** (1 / 3)
    spacing = radius * (4 / 3 * math.pi / num) ** (1 / 3)
    gaussians = Gaussians(
        means=direction * distance,
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(num, 1),
        log_scales=torch.full((num, 3), math.log(0.5 * spacing)),
        opacity_logits=torch.full((num,), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))),
        sh0=torch.zeros(num, 3),
    )
    return Gaussians(*(tensor.to(device) for tensor in gaussians))


def near_hull(gaussians: Gaussians, cameras: Cameras, masks: Float[Tensor, "K H W 1"]) -> Gaussians:
    """Those of the Gaussians whose centres the masks do not rule out. May be none."""
    places = gaussians.means.cpu().numpy().astype(np.float64)
    inside = hull.nearly_inside(places, cameras, masks.cpu().numpy(), HULL_REACH)
    chosen = torch.from_numpy(inside).to(gaussians.means.device)
    return Gaussians(*(tensor[chosen] for tensor in gaussians))
