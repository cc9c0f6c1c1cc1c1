"""Triangles on the CPU: numba kernels with hand-written gradients that are repeatable bit for bit.

One task per view. With the corners of a triangle as the columns of a matrix M of homogeneous pixels, the
inverse times a pixel (column, row, 1) is the barycentric coordinates there over z. Computed in float64, as
triangles may be far smaller than a pixel. `reference` has the formulas.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.kernel import arrays, inlined, kernel, run
from recon_torch.raster.triangles import Geometry, Shade, reference

NEAR_PLANE, BEHIND = reference.NEAR_PLANE, reference.BEHIND


def rasterize(
    geometry: Geometry, attributes: Float[Tensor, "V C"], shade: Shade, background: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """A `TriangleRasterizer`."""
    corners, shape = geometry.corners, (len(geometry.corners), geometry.height, geometry.width)
    triangles, edges = arrays(geometry.triangles, geometry.edges)
    owners, depth = np.full(shape, -1, np.int64), np.full(shape, np.inf)
    winners = np.full((2, *shape), -1, np.int64)
    (places,) = arrays(corners.double())
    run(_fill, shape[0], places, triangles, owners, depth)
    run(_find_silhouettes, shape[0], places, triangles, edges, depth, winners)

    hit = owners.reshape(-1) >= 0
    pixels = np.stack(np.nonzero(owners >= 0), -1)
    begins = np.searchsorted(pixels[:, 0], np.arange(shape[0] + 1))
    found = pixels, begins, triangles[owners.reshape(-1)[hit]]
    rgb = shade(_Interpolate.apply(corners, attributes, found))
    picture = torch.cat([background, background.new_zeros(1)]).to(rgb).expand(owners.size, 4)
    rgba = torch.cat([rgb, rgb.new_ones(len(rgb), 1)], -1)
    picture = picture.index_copy(0, torch.from_numpy(np.flatnonzero(hit)), rgba).view(*shape, 4)
    blended = _Blend.apply(picture, corners, edges, winners)
    depth[np.isinf(depth)] = 0
    return blended[..., :3], blended[..., 3:], torch.from_numpy(depth).to(corners)[..., None]


class _Interpolate(torch.autograd.Function):
    """The attributes [P,C] at pixels that triangles cover.

    found: view, row and column of P pixels, where those of each view begin, and the triangles' vertices.
    """

    @staticmethod
    def forward(ctx, corners, attributes, found):
        ctx.found, ctx.dtypes = found, (corners.dtype, attributes.dtype)
        ctx.saved = arrays(corners.double(), attributes.double())
        values = np.empty((len(found[0]), attributes.shape[1]))
        run(_interpolate, len(corners), *ctx.saved, *found, values)
        return torch.from_numpy(values).to(attributes)

    @staticmethod
    def backward(ctx, v_values):
        corners, attributes = ctx.saved
        v_corners, v_attributes = np.zeros_like(corners), np.zeros((len(corners), *attributes.shape))
        (v_values,) = arrays(v_values.double())
        run(_interpolate_back, len(corners), *ctx.saved, *ctx.found, v_values, v_corners, v_attributes)
        gradients = torch.from_numpy(v_corners), torch.from_numpy(v_attributes.sum(0))
        return *(each.to(dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True)), None


class _Blend(torch.autograd.Function):
    """A picture [K,H,W,C] with the pixels on both sides of each silhouette blended."""

    @staticmethod
    def forward(ctx, picture, corners, edges, winners):
        ctx.dtypes = picture.dtype, corners.dtype
        ctx.saved = *arrays(picture.double(), corners.double()), edges, winners
        blended = ctx.saved[0].copy()
        run(_blend, len(corners), *ctx.saved, blended)
        return torch.from_numpy(blended).to(picture)

    @staticmethod
    def backward(ctx, v_blended):
        (v_blended,) = arrays(v_blended.double())
        v_picture, v_corners = v_blended.copy(), np.zeros_like(ctx.saved[1])
        run(_blend_back, len(v_corners), *ctx.saved, v_blended, v_picture, v_corners)
        gradients = torch.from_numpy(v_picture), torch.from_numpy(v_corners)
        return *(each.to(dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


# ---- Which triangle a pixel shows ----


@inlined()
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@inlined()
def _corner(corners, k, vertex):
    return corners[k, vertex, 0], corners[k, vertex, 1], corners[k, vertex, 2]


@inlined()
def _corners(corners, k, triangle):
    a, b, c = triangle[0], triangle[1], triangle[2]
    return _corner(corners, k, a), _corner(corners, k, b), _corner(corners, k, c)


@inlined()
def _determinant(corners, k, triangle):
    """Of M: negative for a triangle that faces the camera."""
    a, b, c = _corners(corners, k, triangle)
    ab, ac = (b[0] - a[0], b[1] - a[1], b[2] - a[2]), (c[0] - a[0], c[1] - a[1], c[2] - a[2])
    normal = _cross(ab, ac)
    return a[0] * normal[0] + a[1] * normal[1] + a[2] * normal[2]


@inlined()
def _inverse(corners, k, triangle):
    """The rows of the inverse of M."""
    a, b, c = _corners(corners, k, triangle)
    scale = 1 / _determinant(corners, k, triangle)
    return _scaled(_cross(b, c), scale), _scaled(_cross(c, a), scale), _scaled(_cross(a, b), scale)


@inlined()
def _scaled(row, scale):
    return row[0] * scale, row[1] * scale, row[2] * scale


@inlined()
def _at(row, x, y):
    return row[0] * x + row[1] * y + row[2]


@inlined()
def _is_drawn(corners, k, triangle):
    nearest = min(corners[k, triangle[0], 2], corners[k, triangle[1], 2], corners[k, triangle[2], 2])
    return nearest > NEAR_PLANE and _determinant(corners, k, triangle) < 0


@inlined()
def _pixels(low, high, size):
    """The first pixel whose centre lies in [low, high], and one past the last."""
    return int(min(max(0.0, np.ceil(low - 0.5)), size)), int(max(min(size, np.floor(high - 0.5) + 1), 0.0))


@kernel()
def _fill(begin, end, corners, triangles, owners, depth):
    """The nearest triangle at each pixel of the views begin ... end - 1, and its depth there."""
    height, width = depth.shape[1:]
    for k in range(begin, end):
        for n in range(len(triangles)):
            triangle = triangles[n]
            if not _is_drawn(corners, k, triangle):
                continue
            left, top, right, bottom = np.inf, np.inf, -np.inf, -np.inf
            for i in range(3):
                z = corners[k, triangle[i], 2]
                x, y = corners[k, triangle[i], 0] / z, corners[k, triangle[i], 1] / z
                left, right, top, bottom = min(left, x), max(right, x), min(top, y), max(bottom, y)
            first, last = _pixels(left, right, width)
            first_row, last_row = _pixels(top, bottom, height)
            if first >= last or first_row >= last_row:
                continue
            of_a, of_b, of_c = _inverse(corners, k, triangle)
            for row in range(first_row, last_row):
                for column in range(first, last):
                    x, y = column + 0.5, row + 0.5
                    a, b, c = _at(of_a, x, y), _at(of_b, x, y), _at(of_c, x, y)
                    if a >= 0 and b >= 0 and c >= 0 and 1 / (a + b + c) < depth[k, row, column]:
                        depth[k, row, column], owners[k, row, column] = 1 / (a + b + c), n


# ---- Within triangles ----


@kernel()
def _interpolate(begin, end, corners, attributes, pixels, begins, triangles, values):
    for k in range(begin, end):
        for p in range(begins[k], begins[k + 1]):
            triangle, x, y = triangles[p], pixels[p, 2] + 0.5, pixels[p, 1] + 0.5
            of_a, of_b, of_c = _inverse(corners, k, triangle)
            a, b, c = _at(of_a, x, y), _at(of_b, x, y), _at(of_c, x, y)
            for j in range(attributes.shape[1]):
                ends = attributes[triangle[0], j], attributes[triangle[1], j], attributes[triangle[2], j]
                values[p, j] = (a * ends[0] + b * ends[1] + c * ends[2]) / (a + b + c)


@kernel()
def _interpolate_back(
    begin, end, corners, attributes, pixels, begins, triangles, v_values, v_corners, v_attributes
):
    for k in range(begin, end):
        for p in range(begins[k], begins[k + 1]):
            triangle, x, y = triangles[p], pixels[p, 2] + 0.5, pixels[p, 1] + 0.5
            of_a, of_b, of_c = _inverse(corners, k, triangle)
            a, b, c = _at(of_a, x, y), _at(of_b, x, y), _at(of_c, x, y)
            z = 1 / (a + b + c)
            v_a, v_b, v_c = 0.0, 0.0, 0.0  # by the barycentric coordinates
            for j in range(attributes.shape[1]):
                v = v_values[p, j]
                v_attributes[k, triangle[0], j] += a * z * v
                v_attributes[k, triangle[1], j] += b * z * v
                v_attributes[k, triangle[2], j] += c * z * v
                v_a += v * attributes[triangle[0], j]
                v_b += v * attributes[triangle[1], j]
                v_c += v * attributes[triangle[2], j]
            mean = (a * v_a + b * v_b + c * v_c) * z
            v_a, v_b, v_c = (v_a - mean) * z, (v_b - mean) * z, (v_c - mean) * z
            # With M w = pixel, the gradient by a column of M is -w times the transposed inverse on v.
            for i in range(3):
                v = v_a * of_a[i] + v_b * of_b[i] + v_c * of_c[i]
                v_corners[k, triangle[0], i] -= a * v
                v_corners[k, triangle[1], i] -= b * v
                v_corners[k, triangle[2], i] -= c * v


# ---- Across silhouettes ----


@inlined()
def _place(corners, k, vertex, axis):
    """Where a vertex lies along the row (axis 0) or the column (axis 1), and across it."""
    z = corners[k, vertex, 2]
    return corners[k, vertex, axis] / z, corners[k, vertex, 1 - axis] / z


@inlined()
def _ends(edges, code):
    """The ends of an edge as the triangle runs that is drawn there; see `_find_silhouettes`."""
    edge, is_backwards = code // 2, code % 2
    return edges[edge, is_backwards], edges[edge, 1 - is_backwards]


@inlined()
def _crossing(corners, k, ends, axis, along):
    """Where an edge crosses a line of pixel centres: the share of its length, and the place on that line."""
    a, across_a = _place(corners, k, ends[0], axis)
    b, across_b = _place(corners, k, ends[1], axis)
    share = (along - a) / (b - a)
    return share, across_a + share * (across_b - across_a), (across_b - across_a) / (b - a), b > a


@kernel()
def _find_silhouettes(begin, end, corners, triangles, edges, depth, winners):
    """The nearest silhouette between the centres of each pixel and the one below (0) or to the right (1).

    winners: 2 * edge, and 1 more if the second triangle of the edge is the one that is drawn; -1 for none.
    """
    height, width = depth.shape[1:]
    drawn, nearest = np.empty(len(triangles), np.bool_), np.empty((2, height, width))
    for k in range(begin, end):
        nearest[:] = np.inf
        for n in range(len(triangles)):
            drawn[n] = _is_drawn(corners, k, triangles[n])
        for edge in range(len(edges)):
            second = edges[edge, 3] >= 0 and drawn[edges[edge, 3]]
            if drawn[edges[edge, 2]] == second:
                continue
            code = 2 * edge + second
            ends = _ends(edges, code)
            a, across_a = _place(corners, k, ends[0], 0)
            b, across_b = _place(corners, k, ends[1], 0)
            axis = 0 if abs(b - a) >= abs(across_b - across_a) else 1
            if axis == 1:
                a, b = across_a, across_b
            first, last = _pixels(min(a, b), max(a, b), width if axis == 0 else height)
            if last > first and last - 0.5 == max(a, b):  # an end belongs to the edge that begins there
                last -= 1
            for line in range(first, last):
                share, across, _, runs_up = _crossing(corners, k, ends, axis, line + 0.5)
                before = np.floor(across - 0.5)
                if not (before >= 0 and before + 1 < (height if axis == 0 else width)):
                    continue
                row, column = (int(before), line) if axis == 0 else (line, int(before))
                one, other = depth[k, row, column], depth[k, row + 1 - axis, column + axis]
                inner, outer = (one, other) if runs_up == (axis == 0) else (other, one)
                z = 1 / ((1 - share) / corners[k, ends[0], 2] + share / corners[k, ends[1], 2])
                if outer > z and inner <= z * BEHIND and z < nearest[axis, row, column]:
                    nearest[axis, row, column], winners[axis, k, row, column] = z, code


@inlined()
def _pair(corners, k, edges, winners, axis, row, column):
    """A silhouette between two pixels: the inner and the outer one, how far the surface reaches beyond the
    inner one's centre, and what `_crossing` returns of it but for the place."""
    ends = _ends(edges, winners[axis, k, row, column])
    line, before = (column, row) if axis == 0 else (row, column)
    share, across, slope, runs_up = _crossing(corners, k, ends, axis, line + 0.5)
    one, other = (row, column), (row + 1 - axis, column + axis)
    reach = across - (before + 0.5)
    is_first = runs_up == (axis == 0)
    if is_first:
        return one, other, reach, ends, share, slope, is_first
    return other, one, 1 - reach, ends, share, slope, is_first


@kernel()
def _blend(begin, end, picture, corners, edges, winners, blended):
    height, width = picture.shape[1:3]
    for k in range(begin, end):
        for axis in range(2):
            for row in range(height):
                for column in range(width):
                    if winners[axis, k, row, column] < 0:
                        continue
                    inner, outer, reach, _, _, _, _ = _pair(corners, k, edges, winners, axis, row, column)
                    if reach < 0.5:
                        inner, outer = outer, inner  # now the one whose colour goes into the other
                    for j in range(picture.shape[3]):
                        change = picture[k, inner[0], inner[1], j] - picture[k, outer[0], outer[1], j]
                        blended[k, outer[0], outer[1], j] += abs(reach - 0.5) * change


@kernel()
def _blend_back(begin, end, picture, corners, edges, winners, v_blended, v_picture, v_corners):
    height, width = picture.shape[1:3]
    for k in range(begin, end):
        for axis in range(2):
            for row in range(height):
                for column in range(width):
                    if winners[axis, k, row, column] < 0:
                        continue
                    inner, outer, reach, ends, share, slope, is_first = _pair(
                        corners, k, edges, winners, axis, row, column
                    )
                    into, source = (outer, inner) if reach >= 0.5 else (inner, outer)
                    v_reach = 0.0
                    for j in range(picture.shape[3]):
                        v = v_blended[k, into[0], into[1], j]
                        v_picture[k, source[0], source[1], j] += abs(reach - 0.5) * v
                        v_picture[k, into[0], into[1], j] -= abs(reach - 0.5) * v
                        inside, outside = picture[k, inner[0], inner[1], j], picture[k, outer[0], outer[1], j]
                        v_reach += v * (inside - outside)
                    v_across = v_reach if is_first else -v_reach
                    _add_end(v_corners, corners, k, ends[0], axis, v_across * (1 - share), slope)
                    _add_end(v_corners, corners, k, ends[1], axis, v_across * share, slope)


@inlined()
def _add_end(v_corners, corners, k, vertex, axis, v_across, slope):
    """Adds the gradient of a crossing by one end of its edge, from the pixel to the homogeneous one."""
    z, (along, across) = corners[k, vertex, 2], _place(corners, k, vertex, axis)
    v_along = -slope * v_across
    v_corners[k, vertex, axis] += v_along / z
    v_corners[k, vertex, 1 - axis] += v_across / z
    v_corners[k, vertex, 2] -= (v_along * along + v_across * across) / z
