"""Triangles as slow, obvious PyTorch, for tests to compare with: every pixel with every triangle and edge.

In any floating dtype, differentiated by autograd; `kernels` computes the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recon_torch.raster.triangles import Geometry, Shade

NEAR_PLANE = 0.01  # a triangle with a corner before it is not drawn
BEHIND = 1.05  # what lies so many times as far as a silhouette is not the surface that ends there


def rasterize(
    geometry: Geometry, attributes: Float[Tensor, "V C"], shade: Shade, background: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """A `TriangleRasterizer`."""
    views = [_render(corners, geometry, attributes, shade, background) for corners in geometry.corners]
    rgb, alpha, depth = torch.stack(views).split([3, 1, 1], -1)
    return rgb, alpha, depth.detach()


def _render(
    corners: Float[Tensor, "V 3"], geometry: Geometry, attributes: Tensor, shade: Shade, background: Tensor
) -> Float[Tensor, "H W 5"]:
    """Colour, alpha and depth of one view."""
    height, width = geometry.height, geometry.width
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = (torch.stack([x, y], -1).to(corners) + 0.5).view(-1, 2)
    drawn = _faces_camera(corners, geometry.triangles)
    chosen = geometry.triangles[drawn]
    weights, depths = _weights(corners[chosen], pixels)
    if len(chosen):
        depth, nearest = depths.min(1)
    else:
        depth, nearest = pixels.new_full(pixels.shape[:1], torch.inf), torch.zeros(len(pixels)).long()
    hit = depth.isfinite().nonzero()[:, 0]
    inside = (weights[hit, nearest[hit], :, None] * attributes[chosen[nearest[hit]]]).sum(1)
    colors = torch.cat([shade(inside), inside.new_ones(len(hit), 1)], -1)
    empty = torch.cat([background, background.new_zeros(1)]).expand(len(pixels), 4)
    picture = empty.index_copy(0, hit, colors).view(height, width, 4)
    depth = depth.detach().view(height, width)
    ends = _silhouettes(geometry.edges, drawn)
    down, across = picture.transpose(0, 1), corners[:, [1, 0, 2]]
    blended = picture + _blends(picture, depth, corners[ends], inside_sign=-1)
    blended = blended + _blends(down, depth.T, across[ends], inside_sign=1).transpose(0, 1)
    return torch.cat([blended, torch.where(depth.isinf(), 0.0, depth)[..., None]], -1)


def _faces_camera(corners: Float[Tensor, "V 3"], triangles: Int[Tensor, "F 3"]) -> Bool[Tensor, " F"]:
    """Which triangles are drawn: those that run clockwise in the picture, whose rows count downwards."""
    a, b, c = (corners[triangles] / corners[triangles][..., 2:]).unbind(1)
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    return (corners[triangles][..., 2] > NEAR_PLANE).all(-1) & (area < 0)


def _weights(
    corners: Float[Tensor, "F 3 3"], pixels: Float[Tensor, "P 2"]
) -> tuple[Float[Tensor, "P F 3"], Float[Tensor, "P F"]]:
    """Barycentric coordinates in space, and depths, which are infinite for pixels outside."""
    places, z = corners[..., :2] / corners[..., 2:], corners[..., 2]
    towards = places - pixels[:, None, None]
    others = towards.roll(-1, -2), towards.roll(-2, -2)
    areas = others[0][..., 0] * others[1][..., 1] - others[0][..., 1] * others[1][..., 0]
    flat = areas / areas.sum(-1, keepdim=True)  # barycentric coordinates in the picture
    depth = 1 / (flat / z).sum(-1)
    weights = flat / z * depth[..., None]
    return weights, torch.where((flat >= 0).all(-1), depth, torch.inf)


def _silhouettes(edges: Int[Tensor, "E 4"], drawn: Bool[Tensor, " F"]) -> Int[Tensor, "S 2"]:
    """The ends of edges at which one triangle alone is drawn, as that triangle runs along them."""
    starts, ends, first, second = edges.T
    first_drawn, second_drawn = drawn[first], drawn[second.clamp_min(0)] & (second >= 0)
    forwards = torch.stack([starts, ends], -1)[first_drawn & ~second_drawn]
    backwards = torch.stack([ends, starts], -1)[second_drawn & ~first_drawn]
    return torch.cat([forwards, backwards])


def _blends(
    picture: Float[Tensor, "H W 4"],
    depth: Float[Tensor, "H W"],
    ends: Float[Tensor, "S 2 3"],
    inside_sign: int,
) -> Float[Tensor, "H W 4"]:
    """What edges that are rather horizontal add to a picture, by pixels one above the other.

    inside_sign: whether the surface lies below (1) or above (-1) of an edge that runs to the right.
    """
    change = torch.zeros_like(picture)
    if not len(ends):
        return change
    (a, b), z = (ends[..., :2] / ends[..., 2:]).unbind(1), ends[..., 2]
    run = b - a
    # Of a diagonal, those that run across rows in the picture as it is are taken as horizontal.
    steep = run[:, 0].abs() < run[:, 1].abs() if inside_sign < 0 else run[:, 0].abs() <= run[:, 1].abs()
    x = torch.arange(picture.shape[1]).to(picture) + 0.5
    share = (x[:, None] - a[:, 0]) / run[:, 0]
    crossing = a[:, 1] + share * run[:, 1]
    edge_depth = 1 / ((1 - share) / z[:, 0] + share / z[:, 1])
    crosses = (torch.minimum(a, b)[:, 0] <= x[:, None]) & (x[:, None] < torch.maximum(a, b)[:, 0]) & ~steep
    for upper in range(len(picture) - 1):
        centre = upper + 0.5
        here = crosses & (crossing >= centre) & (crossing < centre + 1)
        is_above = (run[:, 0] > 0) == (inside_sign < 0)
        one, other = depth[upper, :, None], depth[upper + 1, :, None]
        behind, before = torch.where(is_above, other, one), torch.where(is_above, one, other)
        here = here & (behind > edge_depth) & (before <= edge_depth * BEHIND)
        nearest = torch.where(here, edge_depth.detach(), torch.inf).argmin(1)
        columns = here.any(1).nonzero()[:, 0]
        nearest = nearest[columns]
        above = is_above[nearest, None]
        offset = (crossing[columns, nearest] - centre)[:, None]
        reach = torch.where(above, offset, 1 - offset)  # how far the surface goes from the inner centre
        first, second = picture[upper, columns], picture[upper + 1, columns]
        inner, outer = torch.where(above, first, second), torch.where(above, second, first)
        to_inner = (0.5 - reach).clamp_min(0) * (outer - inner)
        to_outer = (reach - 0.5).clamp_min(0) * (inner - outer)
        where = torch.full_like(columns, upper), torch.full_like(columns, upper + 1)
        change = change.index_put(
            (where[0], columns), torch.where(above, to_inner, to_outer), accumulate=True
        )
        change = change.index_put(
            (where[1], columns), torch.where(above, to_outer, to_inner), accumulate=True
        )
    return change
