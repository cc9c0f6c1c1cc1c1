"""Renders of a file of Gaussians, for a process that is to know nothing of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.settings import UP_AXES, FileAxes
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import straight
from recon_torch.views.world import around

VIEWS_AT_ONCE = 8


def render_file(path: Path, cameras: Cameras, up: str = "") -> Float[np.ndarray, "K H W 4"]:
    """RGBA renders, in [0, 1] and not multiplied by alpha, of Gaussians that are brought to unit size.

    Args:
        cameras: around the origin of a world in which +Z is up, as `cameras.orbit` makes them.
        up: the axis of the file that is up, one of `UP_AXES`; by default what the file says, or else z.

    Raises UserError for what is no file of Gaussians, and if no view shows any of them.
    """
    import torch

    from recon_torch.formats import files
    from recon_torch.formats.framing import moved_into, place_of
    from recon_torch.raster.gaussians import Gaussians
    from recon_torch.raster.render import render

    loaded = files.load(path, FileAxes.WORLD if up else None)
    world, said = place_of(path, loaded)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gaussians = Gaussians(*(tensor.to(device) for tensor in moved_into(loaded.gaussians, world)))
    turned = around(np.array(UP_AXES[up or said]), cameras)
    views = []
    with torch.no_grad():
        for start in range(0, len(turned), VIEWS_AT_ONCE):
            part = turned[start : start + VIEWS_AT_ONCE]
            found = render(gaussians, part, background=torch.ones(3))
            views.append(straight(found.rgb.clamp(0, 1).cpu().numpy(), found.alpha.cpu().numpy()))
    rgba = np.concatenate(views).astype(np.float32)
    if not (rgba[..., 3] > 1 / 255).any():
        raise UserError(f"no view shows {path}; is another axis up?")
    return rgba
