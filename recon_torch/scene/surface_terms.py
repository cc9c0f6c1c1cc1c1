"""What keeps a surface simple where no view says how it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def signs(distances: Float[Tensor, " N"], crossed: Int[Tensor, "V 2"]) -> Float[Tensor, ""]:
    """Least where the ends of an edge lie on one side (as in nvdiffrec, Munkberg et al. 2022, Sec. 3 there).

    Each end of an edge that the surface crosses is drawn to the other end's side. Views hold the surface that
    they see; what none of them sees, such as a piece within the object, goes.

    distances: in spacings of the lattice.
    """
    values = distances[crossed]
    return F.binary_cross_entropy_with_logits(values, (values.flip(1) > 0).to(values))


def area(vertices: Float[Tensor, "V 3"], triangles: Int[Tensor, "F 3"]) -> Float[Tensor, ""]:
    """Of the surface. Least where what no view sees, such as the tip of a hull below an object, is flat."""
    a, b, c = vertices[triangles].unbind(1)
    return torch.linalg.cross(b - a, c - a).norm(dim=-1).sum() / 2


def bends(
    vertices: Float[Tensor, "V 3"], triangles: Int[Tensor, "F 3"], edges: Int[Tensor, "E 4"]
) -> Float[Tensor, ""]:
    """1 - cos of the angle between the normals on both sides of an edge, as a mean over their length."""
    a, b, c = vertices[triangles].unbind(1)
    normals = F.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-10)
    start, end, one, other = edges.unbind(1)
    lengths = (vertices[start] - vertices[end]).norm(dim=-1)
    turned = 1 - (normals[one] * normals[other]).sum(-1)
    return (turned * lengths).sum() / lengths.sum()
