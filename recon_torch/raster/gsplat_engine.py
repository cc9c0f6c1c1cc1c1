"""Rendering by gsplat's CUDA kernels: one scene, or several of different sizes in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster import CameraTensors, Render, densification_info, gsplat_kernels
from recon_torch.raster.gaussians import Activated


def rasterize(gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]) -> Render:
    """A `raster.Rasterizer`."""
    rgb, alpha, depth, means2d, radii = _call_gsplat(gaussians, cameras, background)
    return Render(rgb, alpha, depth, densification_info(means2d, radii, cameras))


def rasterize_together(
    scenes: Sequence[Activated], cameras: Sequence[CameraTensors], background: Float[Tensor, "3"]
) -> list[Render]:
    """A render of each scene from its own K cameras of one size.

    gsplat takes as many Gaussians in each scene of a batch, so invisible ones fill up the smaller scenes.
    """
    counts = [len(scene.means) for scene in scenes]
    padded = [[_pad(tensor, max(counts)) for tensor in scene] for scene in scenes]
    batch = Activated(*(torch.stack(field) for field in zip(*padded, strict=True)))
    w2c, intrinsics_px = (torch.stack(field) for field in list(zip(*cameras, strict=True))[:2])
    rig = cameras[0]._replace(w2c=w2c, intrinsics_px=intrinsics_px)
    rgb, alpha, depth, means2d, radii = _call_gsplat(batch, rig, background)
    renders = []
    for index, (count, own) in enumerate(zip(counts, cameras, strict=True)):
        part = _with_gradient_of(means2d, index, count)
        info = densification_info(part, radii[index, :, :count], own)
        renders.append(Render(rgb[index], alpha[index], depth[index], info))
    return renders


def _call_gsplat(
    gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Colour, alpha, depth, 2D means and radii of one scene; all may have a dimension of scenes in front."""
    image, alpha, meta = gsplat_kernels.load()(
        *gaussians,
        viewmats=cameras.w2c,
        Ks=cameras.intrinsics_px,
        width=cameras.width,
        height=cameras.height,
        packed=False,
        eps2d=cameras.low_pass_px2,
        render_mode="RGB+ED",
        backgrounds=background.expand(*cameras.w2c.shape[:-2], 3),
    )
    return image[..., :3], alpha, image[..., 3:], meta["means2d"], meta["radii"]


def _pad(tensor: Tensor, count: int) -> Tensor:
    """A field of `count` Gaussians: the added ones have opacity 0 and are valid otherwise."""
    is_opacity, missing = tensor.ndim == 1, (0, count - len(tensor))
    return F.pad(tensor, missing) if is_opacity else F.pad(tensor, (0, 0, *missing), value=1.0)


def _with_gradient_of(
    means2d: Float[Tensor, "B K N 2"], index: int, count: int
) -> Float[Tensor, "K count 2"]:
    """One scene's part of the 2D means, which gets its part of their gradient once that is computed."""
    part = means2d[index, :, :count].detach().requires_grad_()

    def hand_over(gradient: Tensor) -> None:
        part.grad = gradient[index, :, :count].clone()

    if means2d.requires_grad:
        means2d.register_hook(hand_over)
    return part
