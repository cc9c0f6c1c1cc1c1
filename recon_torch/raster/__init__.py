"""Differentiable rendering of Gaussians (Sec. 3.2): `render.render`, three engines behind one signature.

An engine is a `Rasterizer`. On a CPU it has two stages, `project` and `composite`: `reference` has both in
plain PyTorch, `project_cpu` and `composite_cpu` as compiled kernels with the same signatures.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from recon_torch.raster.gaussians import Activated
from recon_torch.views.cameras import Cameras

LOW_PASS_PX2 = 0.3
"""What viewers of 3DGS add to the variances of a splat, so that none is thinner than a pixel."""


class CameraTensors(NamedTuple):
    """K pinhole cameras on a device, as the engines take them; see `views.cameras.Cameras`.

    low_pass_px2: is added to the diagonal of 2D covariances.
    """

    w2c: Float[Tensor, "K 4 4"]  # OpenCV world-to-camera
    intrinsics_px: Float[Tensor, "K 3 3"]  # without skew; pixel centres lie at +0.5
    width: int
    height: int
    low_pass_px2: float = LOW_PASS_PX2

    @classmethod
    def of(cls, cameras: Cameras, like: Tensor, low_pass_px2: float = LOW_PASS_PX2) -> CameraTensors:
        """These cameras on the device, and in the dtype, of a tensor."""
        w2c, intrinsics_px = (torch.from_numpy(x).to(like) for x in (cameras.w2c, cameras.intrinsics_px))
        return cls(w2c, intrinsics_px, cameras.width, cameras.height, low_pass_px2)


class Projection(NamedTuple):
    """N Gaussians projected into K views. The values of culled Gaussians are finite and have no meaning."""

    means2d: Float[Tensor, "K N 2"]  # pixels; pixel centres lie at +0.5
    conics: Float[Tensor, "K N 3"]  # upper triangle (xx, xy, yy) of the inverse 2D covariance
    depths: Float[Tensor, "K N"]  # camera z
    extents_px: Float[
        Tensor, "K N 2"
    ]  # half sides of the box outside of which alpha < ALPHA_MIN; 0 if culled
    radii: Int32[Tensor, "K N 2"]  # the extents rounded up, as gsplat reports them


class Render(NamedTuple):
    """K views of a scene.

    `info` is what `gsplat.DefaultStrategy` reads, in the layout of gsplat's `packed=False`: `means2d` [K,N,2]
    in pixels, on which `retain_grad()` gives the loss's gradient per pixel; `radii` [K,N,2] int, 0 where a
    Gaussian cannot be seen; `width`, `height`, `n_cameras`, `gaussian_ids` (None). It is empty for a scene
    without Gaussians.
    """

    rgb: Float[Tensor, "K H W 3"]  # blended over the background
    alpha: Float[Tensor, "K H W 1"]  # 1 - transmittance, in [0, 0.9999]
    depth: Float[Tensor, "K H W 1"]  # expected camera z: the mean over what alpha saw; 0 where alpha is 0
    info: dict[str, Any]


@runtime_checkable
class Rasterizer(Protocol):
    """An engine: renders Gaussians that are known to be valid; differentiable by all of their fields."""

    def __call__(
        self, gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
    ) -> Render: ...


def densification_info(means2d: Tensor, radii: Tensor, cameras: CameraTensors) -> dict[str, Any]:
    """The `info` of a `Render`."""
    return {
        "means2d": means2d,
        "radii": radii,
        "gaussian_ids": None,
        "width": cameras.width,
        "height": cameras.height,
        "n_cameras": len(radii),
    }
