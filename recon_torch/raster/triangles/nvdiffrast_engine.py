"""Triangles on a GPU by nvdiffrast (Laine et al. 2020), from version 0.3.3 on, which users install.

Written from its documentation; it has not run on a GPU yet. Its silhouettes are found by the triangles that
pixels show, and ours by all edges, so those of triangles smaller than a pixel differ.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.raster.triangles import Geometry, Shade

NEAR_SHARE, FAR_SHARE = 0.5, 2.0  # of the least and of the largest depth of a vertex


def check() -> None:
    """Raises UserError where nvdiffrast is not installed."""
    if importlib.util.find_spec("nvdiffrast") is None:
        raise UserError(
            "meshes on a GPU need nvdiffrast (pip install git+https://github.com/NVlabs/nvdiffrast); "
            "or hide the GPU with CUDA_VISIBLE_DEVICES="
        )


def rasterize(
    geometry: Geometry, attributes: Float[Tensor, "V C"], shade: Shade, background: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """A `TriangleRasterizer`."""
    library, context = _load(geometry.corners.device)
    clip = clip_space(geometry).contiguous()
    triangles = geometry.triangles.int().contiguous()
    raster, _ = library.rasterize(context, clip, triangles, resolution=[geometry.height, geometry.width])
    with_depth = torch.cat([attributes.expand(len(clip), -1, -1), geometry.corners[..., 2:]], -1)
    values, _ = library.interpolate(with_depth.contiguous(), raster, triangles)
    hit = raster[..., 3] > 0
    picture = torch.cat([background, background.new_zeros(1)]).expand(*hit.shape, 4)
    rgb = shade(values[..., :-1][hit])
    picture = picture.index_put(hit.nonzero().unbind(-1), torch.cat([rgb, rgb.new_ones(len(rgb), 1)], -1))
    blended = library.antialias(picture.contiguous(), raster, clip, triangles)
    depth = torch.where(hit, values[..., -1], 0.0).detach()
    return blended[..., :3], blended[..., 3:], depth[..., None]


def clip_space(geometry: Geometry) -> Float[Tensor, "K V 4"]:
    """The vertices as OpenGL clips them, but with y downwards, so that the first row is the uppermost."""
    x, y, z = geometry.corners.unbind(-1)
    near, far = NEAR_SHARE * z.detach().min().clamp_min(1e-3), FAR_SHARE * z.detach().max().clamp_min(1e-2)
    depth = ((far + near) * z - 2 * far * near) / (far - near)
    return torch.stack([2 * x / geometry.width - z, 2 * y / geometry.height - z, depth, z], -1)


@functools.cache
def _load(device: torch.device) -> tuple[Any, Any]:
    """The library and its context for a device."""
    library = importlib.import_module("nvdiffrast.torch")
    return library, library.RasterizeCudaContext(device=device)
