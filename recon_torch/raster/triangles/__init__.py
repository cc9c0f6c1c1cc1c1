"""Differentiable rendering of closed surfaces of triangles: `render.render`, with three engines behind it.

Within a triangle the attributes of its corners are interpolated in perspective, which is differentiable by
attributes and places. Where a pixel lies beside a silhouette, its colour is a blend across it, by where the
silhouette passes between the centres of the two pixels (Laine et al. 2020, Sec. 3.5 there): this is what
places follow at outlines. `reference` has the formulas, `kernels` computes the same on a CPU, and
`nvdiffrast_engine` does nearly so on a GPU.

A triangle's corners run counter-clockwise seen from outside; what faces away from a camera is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Shade = Callable[[Float[Tensor, "P C"]], Float[Tensor, "P 3"]]
"""The colours of P points of a surface, from the C attributes that are interpolated there."""


class Geometry(NamedTuple):
    """A surface as K cameras see it.

    Attributes:
        corners: the V vertices as homogeneous pixels: column * z, row * z and z, with z along the axis of the
            camera and pixel centres at +0.5.
        triangles: F of them, by their vertices.
        edges: E of them, as the numbers of two vertices and of the two triangles there, -1 for none. The
            first triangle runs from the first vertex to the second.
        width, height: in pixels.
    """

    corners: Float[Tensor, "K V 3"]
    triangles: Int[Tensor, "F 3"]
    edges: Int[Tensor, "E 4"]
    width: int
    height: int


@runtime_checkable
class TriangleRasterizer(Protocol):
    """An engine. Returns colour, alpha and depth; the last, 0 where there is no surface, has no gradient."""

    def __call__(
        self,
        geometry: Geometry,
        attributes: Float[Tensor, "V C"],
        shade: Shade,
        background: Float[Tensor, "3"],
    ) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]: ...
