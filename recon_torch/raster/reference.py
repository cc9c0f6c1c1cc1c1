"""Gaussian splatting as slow, obvious PyTorch, for tests to compare with (3DGS, Kerbl et al. 2023).

It has two stages, in any floating dtype and differentiated by autograd: `project` (EWA splatting, Zwicker et
al. 2001, with the conventions of gsplat 1.5.3) and `composite` (alpha blending from front to back). The
constants are gsplat's, and the CPU engine imports them from here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster import CameraTensors, Projection
from recon_torch.raster.gaussians import Activated

NEAR_PLANE = 0.01
FAR_PLANE = 1e10
LARGEST = 1e6  # coordinates and scales beyond this overflow float32 in the projection
MAX_SIGMAS = 3.33  # where a splat ends, unless its alpha falls below ALPHA_MIN before
ALPHA_MIN = 1 / 255  # fainter contributions are skipped
ALPHA_MAX = 0.999
TRANSMITTANCE_MIN = 1e-4  # a pixel is finished before its transmittance falls below this
SMALLEST_ALPHA = 1e-10  # keeps the expected depth finite where alpha is 0
FRUSTUM_MARGIN = 0.3  # half images outside of the image from where on the projection's slope is constant
TILE_PX = 16


def rotation_matrices(quats: Float[Tensor, "N 4"]) -> Float[Tensor, "N 3 3"]:
    """Rotations of unnormalised quaternions, wxyz."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    )
    return torch.stack(rows, -2)


def project(gaussians: Activated, cameras: CameraTensors) -> Projection:
    """EWA projection of 3D Gaussians to 2D Gaussians, with gsplat's culling."""
    means, quats, scales, opacities, _ = gaussians
    w2c, intrinsics_px, width, height, low_pass_px2 = cameras
    sane = (torch.cat([means, scales], -1).abs() <= LARGEST).all(-1) & quats.isfinite().all(-1)
    sane = sane & (quats != 0).any(-1) & (opacities >= ALPHA_MIN) & opacities.isfinite()
    in_camera = means @ w2c[:, :3, :3].mT + w2c[:, None, :3, 3]
    visible = sane & (in_camera[..., 2] >= NEAR_PLANE) & (in_camera[..., 2] <= FAR_PLANE)
    # Culled Gaussians get harmless numbers, so that their gradients hold no NaN or infinity.
    in_camera = torch.where(visible[..., None], in_camera, in_camera.new_tensor([0.0, 0.0, 1.0]))
    quats = torch.where(sane[:, None], quats, quats.new_tensor([1.0, 0.0, 0.0, 0.0]))
    scales = torch.where(sane[:, None], scales, 1.0)

    root = rotation_matrices(quats) * scales[:, None, :]
    slope = projection_slope(in_camera, intrinsics_px, width, height)
    root2d = slope @ w2c[:, None, :3, :3] @ root
    cov2d = root2d @ root2d.mT + low_pass_px2 * torch.eye(2, dtype=means.dtype, device=means.device)
    xx, xy, yy = cov2d[..., 0, 0], cov2d[..., 0, 1], cov2d[..., 1, 1]
    conics = torch.stack([yy, -xy, xx], -1) / (xx * yy - xy * xy)[..., None]
    homogeneous = in_camera @ intrinsics_px.mT
    means2d = homogeneous[..., :2] / in_camera[..., 2:]

    extents = _extents(means2d, torch.stack([xx, yy], -1), opacities, visible, width, height)
    return Projection(means2d, conics, in_camera[..., 2], extents, extents.ceil().int())


def projection_slope(
    in_camera: Float[Tensor, "K N 3"], intrinsics_px: Float[Tensor, "K 3 3"], width: int, height: int
) -> Float[Tensor, "K N 2 3"]:
    """d pixel / d camera coordinates; from FRUSTUM_MARGIN outside of the image on it stays constant."""
    depth = in_camera[..., 2]
    rows = []
    for axis, size in ((0, width), (1, height)):
        focal, centre = intrinsics_px[:, axis, axis, None], intrinsics_px[:, axis, 2, None]
        margin = FRUSTUM_MARGIN * 0.5 * size / focal
        tangent = (in_camera[..., axis] / depth).clamp(
            -centre / focal - margin, (size - centre) / focal + margin
        )
        row = [torch.zeros_like(depth), torch.zeros_like(depth), -focal * tangent / depth]
        row[axis] = focal / depth
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@torch.no_grad()
def _extents(
    means2d: Tensor, variances: Tensor, opacities: Tensor, visible: Tensor, width: int, height: int
) -> Float[Tensor, "K N 2"]:
    """Half sides in pixels of the box in which a splat shows; 0 if no part of it is in the image."""
    sigmas = (2 * (opacities / ALPHA_MIN).clamp(min=1.0).log()).sqrt().clamp(max=MAX_SIGMAS)
    extents = sigmas[:, None] * variances.sqrt()
    size = torch.tensor([width, height], device=means2d.device)
    inside = (means2d + extents.ceil() > 0) & (means2d - extents.ceil() < size)
    seen = visible & inside.all(-1) & (extents > 0).any(-1)
    return torch.where(seen[..., None], extents, 0.0)


def composite(
    projection: Projection, gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """Blends the splats of each view from near to far; returns colour, alpha and expected depth."""
    opacities, colors, width, height = gaussians.opacities, gaussians.colors, cameras.width, cameras.height
    views = []
    for means2d, conics, depths, extents, _ in zip(*projection, strict=True):
        order = depths.argsort(stable=True)
        order = order[extents[order].amax(-1) > 0]
        features = torch.cat([colors, depths[:, None]], -1)
        splats = (means2d[order], conics[order], opacities[order], features[order], extents[order])
        rows = [
            torch.cat([_composite_tile(splats, x, y, width, height) for x in range(0, width, TILE_PX)], 1)
            for y in range(0, height, TILE_PX)
        ]
        views.append(torch.cat(rows, 0))
    rgb, depth, transmittance = torch.stack(views).split([3, 1, 1], -1)
    alpha = 1 - transmittance
    return rgb + transmittance * background, alpha, depth / alpha.clamp(min=SMALLEST_ALPHA)


def _composite_tile(
    splats: tuple[Tensor, ...], left: int, top: int, width: int, height: int
) -> Float[Tensor, "h w 5"]:
    """Blended colour and depth, and transmittance, of a tile: every pixel with every splat near the tile."""
    means2d, conics, opacities, features, extents = splats
    right, bottom = min(left + TILE_PX, width), min(top + TILE_PX, height)
    near = (
        (means2d + extents > means2d.new_tensor([left, top]))
        & (means2d - extents < means2d.new_tensor([right, bottom]))
    ).all(-1)
    y, x = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
    pixels = torch.stack([x, y], -1).to(means2d) + 0.5

    dx, dy = (means2d[near] - pixels[..., None, :]).unbind(-1)
    xx, xy, yy = conics[near].unbind(-1)
    sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    alpha = (opacities[near] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & (sigma >= 0), alpha, 0.0)

    before = torch.cat([torch.ones_like(alpha[..., :1]), (1 - alpha).cumprod(-1)], -1)
    alpha = torch.where(before[..., 1:] > TRANSMITTANCE_MIN, alpha, 0.0)
    blended = (alpha * before[..., :-1]) @ features[near]
    return torch.cat([blended, (1 - alpha).prod(-1, keepdim=True)], -1)
