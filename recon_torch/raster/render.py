"""Differentiable rendering of 3D Gaussians (Sec. 3.2): one function, and the same numbers from each engine.

- "gsplat": gsplat's CUDA kernels (`gsplat_engine`).
- "cpu": compiled kernels with hand-written gradients (`project_cpu`, `composite_cpu`).
- "torch": slow, obvious PyTorch in any floating dtype (`reference`), for tests to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.raster import (
    LOW_PASS_PX2,
    CameraTensors,
    Rasterizer,
    Render,
    densification_info,
    gsplat_engine,
)
from recon_torch.raster.gaussians import Activated, Gaussians
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras

VIEWS_AT_ONCE = 8  # bounds the memory of `render_images` for long turntables


def render(
    gaussians: Gaussians | Activated,
    cameras: Cameras,
    *,
    background: Float[Tensor, "3"] | None = None,
    engine: Engine = Engine.AUTO,
    low_pass_px2: float = LOW_PASS_PX2,
) -> Render:
    """Renders N Gaussians from K cameras; differentiable in the Gaussians, not in cameras and background.

    A Gaussian with a NaN or an infinity in its geometry or opacity, a quaternion of length 0, or a coordinate
    or scale beyond 1e6 is not drawn and gets a gradient of zero.

    Args:
        gaussians: parameters, or what they stand for where that is made in another way. Their device and
            dtype are those of the render.
        background: RGB; black by default.
        engine: see the module.
        low_pass_px2: is added to the variances of splats. A quarter of the default draws a view as it is
            when it is seen at twice its size, and then made smaller again.

    Raises:
        UserError: the engine cannot run here.
        ValueError: the tensors' shapes or dtype are wrong.
    """
    (rendered,) = render_together(
        [gaussians], [cameras], background=background, engine=engine, low_pass_px2=low_pass_px2
    )
    return rendered


def render_together(
    scenes: Sequence[Gaussians | Activated],
    cameras: Sequence[Cameras],
    *,
    background: Float[Tensor, "3"] | None = None,
    engine: Engine = Engine.AUTO,
    low_pass_px2: float = LOW_PASS_PX2,
) -> list[Render]:
    """`render` of several scenes, each from its own K cameras of one size; a GPU does all of it in one call.

    Scenes may have different numbers of Gaussians. Each render's `info` is that of its scene alone; its
    `means2d` get their gradient when that of the renders is computed.
    """
    activated = [each.activated() if isinstance(each, Gaussians) else each for each in scenes]
    for each in activated:
        _check_shapes(each)
    like = activated[0].means
    background = like.new_zeros(3) if background is None else background.to(like)
    tensors = [CameraTensors.of(each, like, low_pass_px2) for each in cameras]
    engine = _choose(engine, like.device)
    if engine == Engine.GSPLAT and len(scenes) > 1:
        return gsplat_engine.rasterize_together(activated, tensors, background)
    rasterize = RASTERIZERS[engine]
    return [rasterize(each, rig, background) for each, rig in zip(activated, tensors, strict=True)]


@torch.no_grad()
def render_images(
    gaussians: Gaussians, cameras: Cameras, background: float = 1.0
) -> Float32[np.ndarray, "K H W 3"]:
    """RGB in [0, 1] over a grey `background` (0 black, 1 white), some views at a time."""
    grey = torch.full((3,), background)
    parts = [cameras[start : start + VIEWS_AT_ONCE] for start in range(0, len(cameras), VIEWS_AT_ONCE)]
    renders = (render(gaussians, part, background=grey) for part in parts)
    return np.concatenate([each.rgb.clamp(0, 1).cpu().numpy() for each in renders])


def _check_shapes(gaussians: Activated) -> None:
    num = len(gaussians.means)
    shapes = {
        "means": (num, 3),
        "quats": (num, 4),
        "scales": (num, 3),
        "opacities": (num,),
        "colors": (num, 3),
    }
    for name, expected in shapes.items():
        found = tuple(getattr(gaussians, name).shape)
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected {expected}")


def _choose(engine: Engine, device: torch.device) -> Engine:
    if engine == Engine.AUTO:
        return Engine.GSPLAT if device.type == "cuda" else Engine.CPU
    needs = {Engine.GSPLAT: "cuda", Engine.CPU: "cpu"}.get(engine, device.type)
    if device.type != needs:
        raise UserError(
            f"engine '{engine}' needs tensors on {needs}, these are on {device}: use engine 'auto'"
        )
    return engine


def _rasterize_by_kernels(
    gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
) -> Render:
    from recon_torch.raster.composite_cpu import composite
    from recon_torch.raster.project_cpu import project  # numba takes a second to import

    for tensor in gaussians:
        if tensor.dtype != torch.float32:
            raise ValueError(f"engine 'cpu' computes in float32, got {tensor.dtype}: use engine 'torch'")
    projection = project(gaussians, cameras)
    images = composite(projection, gaussians, cameras, background)
    return Render(*images, densification_info(projection.means2d, projection.radii, cameras))


def _rasterize_by_reference(
    gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
) -> Render:
    from recon_torch.raster.reference import composite, project

    projection = project(gaussians, cameras)
    images = composite(projection, gaussians, cameras, background)
    return Render(*images, densification_info(projection.means2d, projection.radii, cameras))


RASTERIZERS: dict[Engine, Rasterizer] = {
    Engine.GSPLAT: gsplat_engine.rasterize,
    Engine.CPU: _rasterize_by_kernels,
    Engine.TORCH: _rasterize_by_reference,
}
