"""How much of each Gaussian the views see, so that a fit can drop those that no view holds in place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras


@torch.enable_grad()
def seen_px(gaussians: Gaussians, cameras: Cameras, engine: Engine = Engine.AUTO) -> Float[Tensor, " N"]:
    """The number of pixels that each Gaussian fills behind those in front of it, as a mean over the views.

    Renders are linear in the colours, so this is the gradient of the renders' sum by the colours.
    """
    still = Gaussians(*(tensor.detach() for tensor in gaussians)).activated()
    colors = torch.zeros_like(still.colors, requires_grad=True)
    for index in range(len(cameras)):
        rendered = render(still._replace(colors=colors), cameras[index], engine=engine)
        rendered.rgb[..., 0].sum().backward()
    assert colors.grad is not None, "there is at least one camera"
    return colors.grad[:, 0] / len(cameras)
