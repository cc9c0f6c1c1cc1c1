"""How much of each Gaussian the views see, so that a fit can drop what none of them holds in place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.rasterize import rasterize
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras


@torch.enable_grad()
def seen_px(gaussians: Gaussians, cameras: Cameras, engine: Engine = Engine.AUTO) -> Float[Tensor, " N"]:
    """The pixels that each Gaussian fills, behind those before it: a mean over the views.

    Renders are linear in the colours, so this is the gradient of their sum by the colours.
    """
    shape, device = gaussians.sh0.shape, gaussians.means.device
    colors = torch.zeros(shape, device=device, requires_grad=True)
    for index in range(len(cameras)):
        camera = cameras[index]
        render = rasterize(
            gaussians.means.detach(),
            gaussians.quats.detach(),
            gaussians.scales.detach(),
            gaussians.opacities.detach(),
            colors,
            torch.from_numpy(camera.w2c).to(device),
            torch.from_numpy(camera.intrinsics_px).to(device),
            camera.width,
            camera.height,
            engine=engine,
        )
        render.rgb[..., 0].sum().backward()
    return colors.grad[:, 0] / len(cameras)
