"""Renders of a closed surface of triangles, and their gradients: one function for all engines.

- "gsplat" draws Gaussians alone.
- "cpu": compiled kernels with hand-written gradients (`kernels`).
- "torch": slow, obvious PyTorch (`reference`), for tests to compare with.
- "auto": nvdiffrast where the surface is on a GPU (`nvdiffrast_engine`), else "cpu".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.raster import CameraTensors, Render
from recon_torch.raster.triangles import Geometry, Shade, TriangleRasterizer
from recon_torch.raster.triangles.edges import edges_of
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras


def render(
    vertices: Float[Tensor, "V 3"],
    triangles: Int[Tensor, "F 3"],
    attributes: Float[Tensor, "V C"],
    cameras: Cameras,
    *,
    edges: Int[Tensor, "E 4"] | None = None,
    shade: Shade = lambda values: values,
    background: Float[Tensor, "3"] | None = None,
    engine: Engine = Engine.AUTO,
    samples: int = 1,
) -> Render:
    """Renders a surface from K cameras; differentiable in vertices, attributes, and what shade depends on.

    The depth of the render, that of the surface at a pixel's centre, has no gradient.

    Args:
        triangles: corners counter-clockwise seen from outside; what faces away is not drawn.
        attributes: of the vertices, such as their colours.
        edges: of the triangles, if `edges_of` has found them already.
        shade: makes colours of attributes that are interpolated at pixels.
        background: RGB; black by default.
        engine: see the module.
        samples: along each side of a pixel, over whose square the render is averaged.

    Raises:
        UserError: the engine cannot run here.
    """
    rasterize = rasterizer(engine, vertices.device)
    fine = cameras.resized(samples * cameras.width, samples * cameras.height)
    w2c, intrinsics_px, width, height, _ = CameraTensors.of(fine, vertices)
    in_camera = vertices @ w2c[:, :3, :3].mT + w2c[:, None, :3, 3]
    triangles = triangles.long()
    edges = edges_of(triangles) if edges is None else edges
    geometry = Geometry(in_camera @ intrinsics_px.mT, triangles, edges, width, height)
    background = vertices.new_zeros(3) if background is None else background.to(vertices)
    rgb, alpha, depth = rasterize(geometry, attributes, shade, background)
    if samples > 1:
        weighted = _smaller(torch.cat([rgb, alpha, depth, (depth > 0).to(depth)], -1), samples)
        rgb, alpha, depth, hit = weighted.split([3, 1, 1, 1], -1)
        depth = depth / hit.clamp_min(torch.finfo(hit.dtype).tiny)
    return Render(rgb, alpha, depth, {})


def rasterizer(engine: Engine, device: torch.device) -> TriangleRasterizer:
    """What renders on a device. Raises UserError where nothing does."""
    if engine == Engine.GSPLAT:
        raise UserError("engine 'gsplat' renders Gaussians, and no mesh: use engine 'auto'")
    if engine == Engine.TORCH:
        from recon_torch.raster.triangles import reference

        return reference.rasterize
    if device.type == "cuda" and engine == Engine.AUTO:
        from recon_torch.raster.triangles import nvdiffrast_engine

        nvdiffrast_engine.check()
        return nvdiffrast_engine.rasterize
    if device.type != "cpu":
        raise UserError(f"engine 'cpu' needs tensors on cpu, these are on {device}: use engine 'auto'")
    from recon_torch.raster.triangles import kernels  # numba takes a second to import

    return kernels.rasterize


def _smaller(picture: Float[Tensor, "K H W C"], factor: int) -> Float[Tensor, "K h w C"]:
    """The means of squares of pixels."""
    return F.avg_pool2d(picture.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
