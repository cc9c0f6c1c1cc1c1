"""A surface cut into charts that lie side by side in a square picture, by xatlas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from recon_torch.mesh.extra import needed
from recon_torch.mesh.surface import Surface

PADDING_PX = 3  # between charts


class Unwrapped(NamedTuple):
    """A surface whose vertices are there once for each chart that they are in.

    Attributes:
        surface: with duplicated vertices.
        uvs: places in the texture, in [0, 1]; v grows downwards from the picture's upper edge.
        normals: of unit length, without seams.
        original: which vertex of the surface without charts each one is.
    """

    surface: Surface
    uvs: Float[np.ndarray, "V 2"]
    normals: Float[np.ndarray, "V 3"]
    original: Int[np.ndarray, " V"]


def unwrap(surface: Surface, size_px: int) -> Unwrapped:
    """Charts for a square texture of `size_px`, with some texels between them."""
    xatlas = needed("xatlas")
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.padding, packing.resolution, packing.bilinear = PADDING_PX, size_px, True
    atlas.add_mesh(surface.vertices.astype(np.float32), surface.triangles.astype(np.uint32))
    atlas.generate(xatlas.ChartOptions(), packing)
    original, triangles, uvs = atlas.get_mesh(0)
    cut = Surface(surface.vertices[original], triangles.astype(np.int64))
    return Unwrapped(
        cut, uvs.astype(np.float64).clip(0, 1), surface.normals()[original], original.astype(np.int64)
    )
