"""Differentiable rendering of 3D Gaussians (Sec. 3.2): one function, the same numbers from each engine.

- "gsplat": gsplat's CUDA kernels.
- "cpu": numba kernels with hand-written gradients (`project_cpu`, `rasterize_cpu`).
- "torch": slow, obvious PyTorch in any floating dtype (`rasterize_reference`), for tests to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.raster import gsplat_kernels
from recon_torch.settings import Engine

if TYPE_CHECKING:
    from recon_torch.raster.gaussians import Gaussians


class Render(NamedTuple):
    """K views of the Gaussians."""

    rgb: Float[Tensor, "K H W 3"]  # blended over the background
    alpha: Float[Tensor, "K H W 1"]  # 1 - transmittance, in [0, 0.9999]
    depth: Float[Tensor, "K H W 1"]  # expected camera z: the mean over what alpha saw; 0 where alpha is 0
    info: dict[str, Any]  # what gsplat's strategies read, see `rasterize`


def rasterize(
    means: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    scales: Float[Tensor, "N 3"],
    opacities: Float[Tensor, "N"],
    colors: Float[Tensor, "N 3"],
    w2c: Float[Tensor, "K 4 4"],
    intrinsics_px: Float[Tensor, "K 3 3"],
    width: int,
    height: int,
    *,
    background: Float[Tensor, "3"] | None = None,
    engine: Engine = Engine.AUTO,
) -> Render:
    """Renders N Gaussians from K cameras; differentiable in everything but the cameras and the background.

    `means` are world coordinates, `quats` wxyz of any length but 0, `scales` standard deviations (not their
    logs), `opacities` in [0, 1], `colors` usually in [0, 1]. Cameras are OpenCV world-to-camera matrices and
    pixel intrinsics without skew; pixel centres lie at +0.5. `background` defaults to black.

    A Gaussian with a NaN or an infinity in its geometry or opacity, a quaternion of length 0, or a coordinate
    or scale beyond 1e6 is not drawn and gets a gradient of zero.

    `info` is what `gsplat.DefaultStrategy` needs, in the layout of gsplat's `packed=False`: `means2d` [K,N,2]
    in pixels, on which `retain_grad()` gives the loss's gradient per pixel; `radii` [K,N,2] int, 0 where a
    Gaussian cannot be seen; `width`, `height`, `n_cameras`, `gaussian_ids` (None).

    Raises `UserError` if the engine cannot run here, `ValueError` for tensors of wrong shape.
    """
    _check_shapes(means, quats, scales, opacities, colors, w2c, intrinsics_px, width, height)
    engine = _choose_engine(engine, means.device)
    background = means.new_zeros(3) if background is None else background.to(means)
    gaussians = (means, quats, scales, opacities, colors)
    render = {Engine.GSPLAT: _gsplat_engine, Engine.CPU: _cpu_engine, Engine.TORCH: _torch_engine}[engine]
    rgb, alpha, depth, means2d, radii = render(gaussians, w2c, intrinsics_px, width, height, background)
    return Render(rgb, alpha, depth, _info(means2d, radii, width, height))


def rasterize_together(
    scenes: Sequence[Gaussians],
    w2c: Sequence[Float[Tensor, "K 4 4"]],
    intrinsics_px: Sequence[Float[Tensor, "K 3 3"]],
    width: int,
    height: int,
    *,
    background: Float[Tensor, "3"] | None = None,
    engine: Engine = Engine.AUTO,
) -> list[Render]:
    """`rasterize` of several scenes, each from its own K cameras; a GPU does all of it in one call.

    Scenes may have different numbers of Gaussians. Each render's `info` is that of its scene alone; its
    `means2d` get their gradient when that of the renders is computed.
    """
    gaussians = [(s.means, s.quats, s.scales, s.opacities, s.colors) for s in scenes]
    device = scenes[0].means.device
    if len(scenes) > 1 and _choose_engine(engine, device) == Engine.GSPLAT:
        background = torch.zeros(3, device=device) if background is None else background
        return _gsplat_batch(
            gaussians, torch.stack(tuple(w2c)), torch.stack(tuple(intrinsics_px)), width, height, background
        )
    return [
        rasterize(*each, pose, lens, width, height, background=background, engine=engine)
        for each, pose, lens in zip(gaussians, w2c, intrinsics_px, strict=True)
    ]


def _info(means2d: Tensor, radii: Tensor, width: int, height: int) -> dict[str, Any]:
    """See `rasterize`."""
    sizes = dict(width=width, height=height, n_cameras=len(radii))
    return dict(means2d=means2d, radii=radii, gaussian_ids=None) | sizes


def _choose_engine(engine: Engine, device: torch.device) -> Engine:
    if engine == Engine.AUTO:
        return Engine.GSPLAT if device.type == "cuda" else Engine.CPU
    needs = {Engine.GSPLAT: "cuda", Engine.CPU: "cpu"}.get(engine, device.type)
    if device.type != needs:
        raise UserError(
            f"engine '{engine}' needs tensors on {needs}, these are on {device}: use engine 'auto'"
        )
    return engine


def _check_shapes(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    w2c: Tensor,
    intrinsics_px: Tensor,
    width: int,
    height: int,
) -> None:
    num_gaussians, num_views = len(means), len(w2c)
    expected = {
        "means": (means, (num_gaussians, 3)),
        "quats": (quats, (num_gaussians, 4)),
        "scales": (scales, (num_gaussians, 3)),
        "opacities": (opacities, (num_gaussians,)),
        "colors": (colors, (num_gaussians, 3)),
        "w2c": (w2c, (num_views, 4, 4)),
        "intrinsics_px": (intrinsics_px, (num_views, 3, 3)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if width < 1 or height < 1:
        raise ValueError(f"the image size must be positive, got {width} x {height}")


def _gsplat_engine(gaussians, w2c, intrinsics_px, width, height, background):
    """One scene, or with one more dimension in front of everything a batch of scenes."""
    image, alpha, meta = gsplat_kernels.load()(
        *gaussians,
        viewmats=w2c,
        Ks=intrinsics_px,
        width=width,
        height=height,
        packed=False,
        render_mode="RGB+ED",
        backgrounds=background.expand(*w2c.shape[:-2], 3),
    )
    return image[..., :3], alpha, image[..., 3:], meta["means2d"], meta["radii"]


def _gsplat_batch(scenes, w2c, intrinsics_px, width, height, background) -> list[Render]:
    """gsplat has as many Gaussians in each scene of a batch, so invisible ones fill up the smaller scenes."""
    counts = [len(means) for means, *_ in scenes]
    padded = [[_pad(tensor, max(counts)) for tensor in scene] for scene in scenes]
    batch = [torch.stack(field) for field in zip(*padded, strict=True)]
    rgb, alpha, depth, means2d, radii = _gsplat_engine(batch, w2c, intrinsics_px, width, height, background)
    renders = []
    for index, count in enumerate(counts):
        part = _with_gradient_of(means2d, index, count)
        info = _info(part, radii[index, :, :count], width, height)
        renders.append(Render(rgb[index], alpha[index], depth[index], info))
    return renders


def _pad(tensor: Tensor, count: int) -> Tensor:
    """A field of Gaussians with more of them, whose opacity is 0, and who are valid otherwise."""
    is_opacity, missing = tensor.ndim == 1, (0, count - len(tensor))
    return F.pad(tensor, missing) if is_opacity else F.pad(tensor, (0, 0, *missing), value=1.0)


def _with_gradient_of(means2d: Tensor, index: int, count: int) -> Tensor:
    """The part [K,count,2] of means2d [B,K,N,2], which gets its part of the gradient when that is there."""
    part = means2d[index, :, :count].detach().requires_grad_()

    def hand_over(gradient: Tensor) -> None:
        part.grad = gradient[index, :, :count].clone()

    if means2d.requires_grad:
        means2d.register_hook(hand_over)
    return part


def _cpu_engine(gaussians, w2c, intrinsics_px, width, height, background):
    from recon_torch.raster.composite_cpu import composite
    from recon_torch.raster.project_cpu import project  # numba takes a second to import

    for tensor in (*gaussians, w2c, intrinsics_px):
        if tensor.dtype != torch.float32:
            raise ValueError(f"engine 'cpu' computes in float32, got {tensor.dtype}: use engine 'torch'")
    means, quats, scales, opacities, colors = gaussians
    projection = project(means, quats, scales, opacities, w2c, intrinsics_px, width, height)
    images = composite(projection, opacities, colors, background, width, height)
    return *images, projection.means2d, projection.radii


def _torch_engine(gaussians, w2c, intrinsics_px, width, height, background):
    from recon_torch.raster.reference import composite, project

    means, quats, scales, opacities, colors = gaussians
    projection = project(means, quats, scales, opacities, w2c, intrinsics_px, width, height)
    images = composite(projection, opacities, colors, background, width, height)
    return *images, projection.means2d, projection.radii
