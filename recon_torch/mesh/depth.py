"""The front depth of Gaussians: where along each ray a tenth of the light is gone.

The mean depth, which `raster` gives, lies between near and far parts that share a pixel, and, as the median
does, below the surface: silhouettes tell a fit where an object ends, and what stands within passes some light
on (docs/meshes.md). The front lies on one of the Gaussians; within it, where its density along the ray is
greatest (as in RaDe-GS, Zhang et al. 2024), so that a flat Gaussian, seen aslant, is an inclined plane.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from recon_torch.kernel import FAST_MATH, arrays, kernel, run
from recon_torch.raster import LOW_PASS_PX2, CameraTensors
from recon_torch.raster.gaussians import Activated, Gaussians
from recon_torch.raster.reference import ALPHA_MAX, ALPHA_MIN, project, projection_slope, rotation_matrices
from recon_torch.views.cameras import Cameras

BAND_ROWS = 16  # of a picture, which one task fills
FRONT, SOLID = (
    np.float32(0.9),
    np.float32(0.5),
)  # the light that passes at the front, and through what is solid


@torch.no_grad()
def front_depth(
    gaussians: Gaussians, camera: Cameras, low_pass_px2: float = LOW_PASS_PX2
) -> Float32[np.ndarray, "H W"]:
    """Along the camera's z axis; infinite where more than half of the light passes all Gaussians.

    Args:
        camera: one, K = 1.
        low_pass_px2: see `render`.
    """
    activated = Activated(*(tensor.detach().cpu().float() for tensor in gaussians.activated()))
    tensors = CameraTensors.of(camera, activated.means, low_pass_px2)
    projection = project(activated, tensors)
    order = projection.depths[0].argsort(stable=True)
    order = order[projection.extents_px[0, order].amax(-1) > 0]
    slopes = _depth_slopes(activated, tensors, projection.conics)[0]
    placed = projection.means2d[0], projection.conics[0], projection.depths[0]
    splats = (*placed, slopes, projection.extents_px[0], activated.opacities)
    depth = np.full((camera.height, camera.width), np.inf, np.float32)
    bands = -(-camera.height // BAND_ROWS)
    run(_fill_bands, bands, depth, *arrays(*(each[order] for each in splats)))
    return depth


def _depth_slopes(
    gaussians: Activated, cameras: CameraTensors, conics: Float[Tensor, "K N 3"]
) -> Float[Tensor, "K N 2"]:
    """By how much a Gaussian's place of greatest density along a ray moves in depth, for each pixel aside."""
    root = rotation_matrices(gaussians.quats) * gaussians.scales[:, None, :]
    in_camera = gaussians.means @ cameras.w2c[:, :3, :3].mT + cameras.w2c[:, None, :3, 3]
    jacobian = projection_slope(in_camera, cameras.intrinsics_px, cameras.width, cameras.height)
    turned = cameras.w2c[:, None, :3, :3] @ root
    shared = jacobian @ turned @ turned[..., 2:, :].mT  # covariance of pixel and depth
    xx, xy, yy = conics.unbind(-1)
    inverse = torch.stack([torch.stack([xx, xy], -1), torch.stack([xy, yy], -1)], -2)
    return (inverse @ shared)[..., 0]


@kernel(fastmath=FAST_MATH)
def _fill_bands(begin, end, depth, means, conics, depths, slopes, extents, opacities):
    """Fills bands begin ... end - 1 of a picture; splats come from near to far."""
    height, width = depth.shape
    for band in range(begin, end):
        top, bottom = band * BAND_ROWS, min((band + 1) * BAND_ROWS, height)
        passing = np.ones((bottom - top, width), np.float32)
        front = np.zeros((bottom - top, width), np.float32)
        for n in range(len(means)):
            first_row = max(top, int(np.floor(means[n, 1] - extents[n, 1])))
            last_row = min(bottom - 1, int(np.floor(means[n, 1] + extents[n, 1])))
            first = max(0, int(np.floor(means[n, 0] - extents[n, 0])))
            last = min(width - 1, int(np.floor(means[n, 0] + extents[n, 0])))
            for row in range(first_row, last_row + 1):
                dy = np.float32(row) + np.float32(0.5) - means[n, 1]
                for column in range(first, last + 1):
                    before = passing[row - top, column]
                    if before <= SOLID:
                        continue
                    dx = np.float32(column) + np.float32(0.5) - means[n, 0]
                    power = np.float32(0.5) * (conics[n, 0] * dx * dx + conics[n, 2] * dy * dy)
                    power += conics[n, 1] * dx * dy
                    alpha = min(opacities[n] * np.exp(-power), np.float32(ALPHA_MAX))
                    if alpha < np.float32(ALPHA_MIN):
                        continue
                    after = before * (np.float32(1) - alpha)
                    passing[row - top, column] = after
                    if before > FRONT and after <= FRONT:
                        front[row - top, column] = depths[n] + slopes[n, 0] * dx + slopes[n, 1] * dy
                    if after <= SOLID:
                        depth[row, column] = front[row - top, column]
