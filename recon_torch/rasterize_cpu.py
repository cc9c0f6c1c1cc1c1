"""Gaussian splatting on the CPU: numba kernels with hand-written gradients, bit for bit repeatable.

The two stages of `rasterize_reference`, as autograd functions. `project` runs over Gaussians. `composite` sorts
and bins the splats of each view into tiles, and then runs over tiles with the splats outside and runs of LANES
pixels inside, so that the compiler turns each run into a few vector instructions. Gradients go into one row per
(tile, splat) and are summed in a fixed order, so neither the number of threads nor their timing changes a bit.

All kernels stay in this one file: numba's cache on disk does not see changes in what a kernel imports.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from jaxtyping import Float
from numba import prange
from torch import Tensor

from recon_torch import rasterize_reference as reference
from recon_torch.rasterize_reference import Projection

EPS2D_PX2 = np.float32(reference.EPS2D_PX2)
NEAR_PLANE, FAR_PLANE = np.float32(reference.NEAR_PLANE), np.float32(reference.FAR_PLANE)
MAX_SIGMAS = np.float32(reference.MAX_SIGMAS)
ALPHA_MIN, ALPHA_MAX = np.float32(reference.ALPHA_MIN), np.float32(reference.ALPHA_MAX)
TRANSMITTANCE_MIN = np.float32(reference.TRANSMITTANCE_MIN)
FRUSTUM_MARGIN, LARGEST = np.float32(reference.FRUSTUM_MARGIN), np.float32(reference.LARGEST)
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
SMALLEST_ALPHA = np.float32(1e-10)  # keeps the expected depth finite where alpha is 0

LANES = 16  # pixels blended by one vector instruction
TILE_WIDTH, TILE_HEIGHT = 64, 16
STRIDE = (
    TILE_WIDTH + LANES
)  # a run may begin on the last column: the pixels beyond are written and never read
PLANE = STRIDE * TILE_HEIGHT
# Columns of a splat's record in a tile, and of its gradients.
RECORD = 12  # mean x, y; conic xx, xy, yy; opacity; red, green, blue, depth; extent x, y
GRADIENT = 10  # the first ten of these

# exp(x) = p(x / 8) ** 8 on [-6, 0], fitted by least squares in relative error: within 4e-7 of exp.
LOWEST_EXPONENT = np.float32(-6)  # exp(-6) is less than ALPHA_MIN
EXP_SCALE = np.float32(1 / 8)
E0, E1, E2 = np.float32(0.9999999967792356), np.float32(0.9999996143658061), np.float32(0.499992251415808)
E3, E4, E5 = np.float32(0.1666071011839554), np.float32(0.04144465382934853), np.float32(0.00789911580597863)
E6 = np.float32(0.0009503807497972944)


def _jit(**options):
    """numba.njit with its cache on disk, or without where no folder can be written."""

    def decorate(function):
        try:
            return numba.njit(function, cache=True, error_model="numpy", **options)
        except RuntimeError:  # numba: "no locator available"
            return numba.njit(function, error_model="numpy", **options)

    return decorate


# Rounding may change with the compiler's mood, NaN and infinity keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}


def _use_torch_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


# -----------------------------------------------------------------------------------------------------------
# Projection
# -----------------------------------------------------------------------------------------------------------


def project(
    means: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    scales: Float[Tensor, "N 3"],
    opacities: Float[Tensor, "N"],
    w2c: Float[Tensor, "K 4 4"],
    intrinsics_px: Float[Tensor, "K 3 3"],
    width: int,
    height: int,
) -> Projection:
    """As `rasterize_reference.project`, in float32."""
    for tensor in (means, quats, scales, opacities):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"the CPU rasteriser computes in float32, got {tensor.dtype}: use engine 'torch'"
            )
    w2c, intrinsics_px = w2c.to(torch.float32), intrinsics_px.to(torch.float32)
    return Projection(*_Project.apply(means, quats, scales, opacities, w2c, intrinsics_px, width, height))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, w2c, intrinsics_px, width, height):
        views, count = len(w2c), len(means)
        means2d, conics, depths = (torch.empty(views, count, size) for size in (2, 3, 1))
        extents, radii = torch.empty(views, count, 2), torch.empty(views, count, 2, dtype=torch.int32)
        ctx.inputs = _arrays(means, quats, scales, w2c, intrinsics_px), width, height
        ctx.conics, ctx.radii = _arrays(conics, radii)
        _use_torch_threads()
        inputs = _arrays(means, quats, scales, opacities, w2c, intrinsics_px)
        _project_forward(*inputs, width, height, *_arrays(means2d, conics, depths[..., 0], extents, radii))
        ctx.mark_non_differentiable(extents, radii)
        return means2d, conics, depths[..., 0], extents, radii

    @staticmethod
    def backward(ctx, v_means2d, v_conics, v_depths, _, __):
        inputs, width, height = ctx.inputs
        gradients = [torch.empty(array.shape) for array in inputs[:3]]
        _use_torch_threads()
        _project_backward(
            *inputs, width, height, ctx.conics, ctx.radii, *_arrays(v_means2d, v_conics, v_depths, *gradients)
        )
        return *gradients, *[None] * 5


@_jit()
def _rotation(w, x, y, z):
    """Rows of the rotation matrix of a quaternion, and the quaternion's length."""
    length = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / length, x / length, y / length, z / length
    row0 = ONE - TWO * (y * y + z * z), TWO * (x * y - w * z), TWO * (x * z + w * y)
    row1 = TWO * (x * y + w * z), ONE - TWO * (x * x + z * z), TWO * (y * z - w * x)
    row2 = TWO * (x * z - w * y), TWO * (y * z + w * x), ONE - TWO * (x * x + y * y)
    return row0, row1, row2, length


@_jit()
def _clamped_tangent(tangent, focal, centre, size):
    margin = FRUSTUM_MARGIN * HALF * size / focal
    return min(max(tangent, -centre / focal - margin), (size - centre) / focal + margin)


@_jit()
def _row_times(a, m0, m1, m2):
    """The row vector a times the matrix with rows m0, m1, m2."""
    return (
        a[0] * m0[0] + a[1] * m1[0] + a[2] * m2[0],
        a[0] * m0[1] + a[1] * m1[1] + a[2] * m2[1],
        a[0] * m0[2] + a[1] * m1[2] + a[2] * m2[2],
    )


@_jit()
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@_jit()
def _row(matrix, i):
    return matrix[i, 0], matrix[i, 1], matrix[i, 2]


@_jit()
def _scaled(row, scales):
    return row[0] * scales[0], row[1] * scales[1], row[2] * scales[2]


@_jit()
def _sane(a):
    return abs(a[0]) <= LARGEST and abs(a[1]) <= LARGEST and abs(a[2]) <= LARGEST


@_jit()
def _slopes(view, px, py, pz, focal_x, focal_y, tangent_x, tangent_y):
    """The two rows of d pixel / d world coordinates."""
    r0, r1, r2 = _row(view, 0), _row(view, 1), _row(view, 2)
    ax, ay = focal_x / pz, focal_y / pz
    bx, by = -ax * tangent_x, -ay * tangent_y
    slope_x = ax * r0[0] + bx * r2[0], ax * r0[1] + bx * r2[1], ax * r0[2] + bx * r2[2]
    slope_y = ay * r1[0] + by * r2[0], ay * r1[1] + by * r2[1], ay * r1[2] + by * r2[2]
    return slope_x, slope_y


@_jit(parallel=True)
def _project_forward(
    means, quats, scales, opacities, w2c, intrinsics, width, height, means2d, conics, depths, extents, radii
):
    size_x, size_y = np.float32(width), np.float32(height)
    for n in prange(len(means)):
        mean, scale = _row(means, n), _row(scales, n)
        row0, row1, row2, _ = _rotation(quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3])
        root0, root1, root2 = _scaled(row0, scale), _scaled(row1, scale), _scaled(row2, scale)
        visible = opacities[n] >= ALPHA_MIN and opacities[n] < math.inf and _sane(mean) and _sane(scale)
        sigmas = ZERO
        if visible:
            sigmas = min(MAX_SIGMAS, math.sqrt(TWO * math.log(opacities[n] / ALPHA_MIN)))
        for k in range(len(w2c)):
            view = w2c[k]
            focal_x, focal_y = intrinsics[k, 0, 0], intrinsics[k, 1, 1]
            centre_x, centre_y = intrinsics[k, 0, 2], intrinsics[k, 1, 2]
            px = _dot(_row(view, 0), mean) + view[0, 3]
            py = _dot(_row(view, 1), mean) + view[1, 3]
            pz = _dot(_row(view, 2), mean) + view[2, 3]
            tangent_x = _clamped_tangent(px / pz, focal_x, centre_x, size_x)
            tangent_y = _clamped_tangent(py / pz, focal_y, centre_y, size_y)
            slope_x, slope_y = _slopes(view, px, py, pz, focal_x, focal_y, tangent_x, tangent_y)
            ux = _row_times(slope_x, root0, root1, root2)
            uy = _row_times(slope_y, root0, root1, root2)
            xx, xy, yy = _dot(ux, ux) + EPS2D_PX2, _dot(ux, uy), _dot(uy, uy) + EPS2D_PX2
            det = xx * yy - xy * xy
            x, y = focal_x * px / pz + centre_x, focal_y * py / pz + centre_y
            extent_x, extent_y = sigmas * math.sqrt(xx), sigmas * math.sqrt(yy)
            radius_x, radius_y = np.ceil(extent_x), np.ceil(extent_y)
            # Written so that a NaN anywhere makes it false.
            seen = (
                visible
                and pz >= NEAR_PLANE
                and pz <= FAR_PLANE
                and det > ZERO
                and det < math.inf
                and sigmas > ZERO
                and x + radius_x > ZERO
                and x - radius_x < size_x
                and y + radius_y > ZERO
                and y - radius_y < size_y
            )
            if not seen:
                x = y = extent_x = extent_y = radius_x = radius_y = pz = xy = ZERO
                xx = yy = det = ONE
            means2d[k, n, 0], means2d[k, n, 1], depths[k, n] = x, y, pz
            conics[k, n, 0], conics[k, n, 1], conics[k, n, 2] = yy / det, -xy / det, xx / det
            extents[k, n, 0], extents[k, n, 1] = extent_x, extent_y
            radii[k, n, 0], radii[k, n, 1] = np.int32(radius_x), np.int32(radius_y)


@_jit(parallel=True)
def _project_backward(
    means, quats, scales, w2c, intrinsics, width, height, conics, radii,
    v_means2d, v_conics, v_depths, v_means, v_quats, v_scales,
):  # fmt: skip
    size_x, size_y = np.float32(width), np.float32(height)
    for n in prange(len(means)):
        mean, scale = _row(means, n), _row(scales, n)
        row0, row1, row2, length = _rotation(quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3])
        root0, root1, root2 = _scaled(row0, scale), _scaled(row1, scale), _scaled(row2, scale)
        v_mean = (ZERO, ZERO, ZERO)
        v_root0, v_root1, v_root2 = (ZERO, ZERO, ZERO), (ZERO, ZERO, ZERO), (ZERO, ZERO, ZERO)
        drawn = False
        for k in range(len(w2c)):
            if radii[k, n, 0] == 0:
                continue
            drawn = True
            view = w2c[k]
            r0, r1, r2 = _row(view, 0), _row(view, 1), _row(view, 2)
            focal_x, focal_y = intrinsics[k, 0, 0], intrinsics[k, 1, 1]
            px = _dot(r0, mean) + view[0, 3]
            py = _dot(r1, mean) + view[1, 3]
            pz = _dot(r2, mean) + view[2, 3]
            tangent_x = _clamped_tangent(px / pz, focal_x, intrinsics[k, 0, 2], size_x)
            tangent_y = _clamped_tangent(py / pz, focal_y, intrinsics[k, 1, 2], size_y)
            slope_x, slope_y = _slopes(view, px, py, pz, focal_x, focal_y, tangent_x, tangent_y)
            ux = _row_times(slope_x, root0, root1, root2)
            uy = _row_times(slope_y, root0, root1, root2)

            # cov2d = u u^T + eps, conic = cov2d^-1:  v_cov2d = -conic v_conic conic,  v_u = 2 v_cov2d u
            a, b, c = conics[k, n, 0], conics[k, n, 1], conics[k, n, 2]
            va, vb, vc = v_conics[k, n, 0], HALF * v_conics[k, n, 1], v_conics[k, n, 2]
            axx, axy, ayx, ayy = a * va + b * vb, a * vb + b * vc, b * va + c * vb, b * vb + c * vc
            v_xx, v_xy, v_yy = (
                -TWO * (axx * a + axy * b),
                -TWO * (axx * b + axy * c),
                -TWO * (ayx * b + ayy * c),
            )
            v_ux = v_xx * ux[0] + v_xy * uy[0], v_xx * ux[1] + v_xy * uy[1], v_xx * ux[2] + v_xy * uy[2]
            v_uy = v_xy * ux[0] + v_yy * uy[0], v_xy * ux[1] + v_yy * uy[1], v_xy * ux[2] + v_yy * uy[2]

            # u = slope root
            v_root0 = _plus(v_root0, slope_x[0], v_ux, slope_y[0], v_uy)
            v_root1 = _plus(v_root1, slope_x[1], v_ux, slope_y[1], v_uy)
            v_root2 = _plus(v_root2, slope_x[2], v_ux, slope_y[2], v_uy)
            v_slope_x = _dot(v_ux, root0), _dot(v_ux, root1), _dot(v_ux, root2)
            v_slope_y = _dot(v_uy, root0), _dot(v_uy, root1), _dot(v_uy, root2)

            # slope_x = focal / z (r0 - tangent_x r2), likewise y; mean2d = focal (x / z) + centre
            v_x, v_z = _camera_gradient(
                px / pz,
                tangent_x,
                focal_x / pz,
                pz,
                _dot(v_slope_x, r0),
                _dot(v_slope_x, r2),
                v_means2d[k, n, 0],
            )
            v_y, v_z2 = _camera_gradient(
                py / pz,
                tangent_y,
                focal_y / pz,
                pz,
                _dot(v_slope_y, r1),
                _dot(v_slope_y, r2),
                v_means2d[k, n, 1],
            )
            v_mean = _plus(v_mean, v_x, r0, v_y, r1)
            v_mean = _plus(v_mean, v_z + v_z2 + v_depths[k, n], r2, ZERO, r2)

        if not drawn:
            v_means[n], v_quats[n], v_scales[n] = ZERO, ZERO, ZERO
            continue
        v_means[n, 0], v_means[n, 1], v_means[n, 2] = v_mean
        for j in range(3):
            v_scales[n, j] = v_root0[j] * row0[j] + v_root1[j] * row1[j] + v_root2[j] * row2[j]
        w, x, y, z = quats[n, 0] / length, quats[n, 1] / length, quats[n, 2] / length, quats[n, 3] / length
        v_row0, v_row1, v_row2 = _scaled(v_root0, scale), _scaled(v_root1, scale), _scaled(v_root2, scale)
        v_w, v_x, v_y, v_z = _quaternion_gradient(w, x, y, z, v_row0, v_row1, v_row2)
        radial = v_w * w + v_x * x + v_y * y + v_z * z
        v_quats[n, 0], v_quats[n, 1] = (v_w - radial * w) / length, (v_x - radial * x) / length
        v_quats[n, 2], v_quats[n, 3] = (v_y - radial * y) / length, (v_z - radial * z) / length


@_jit()
def _plus(total, a, row_a, b, row_b):
    return (
        total[0] + a * row_a[0] + b * row_b[0],
        total[1] + a * row_a[1] + b * row_b[1],
        total[2] + a * row_a[2] + b * row_b[2],
    )


@_jit()
def _camera_gradient(tangent, clamped, scale, pz, v_diagonal, v_depth_column, v_mean2d):
    """Gradient of one camera axis and of z from the slope's row (scale, -scale * clamped) and the 2D mean."""
    v_tangent = scale * pz * v_mean2d
    if clamped == tangent:
        v_tangent -= scale * v_depth_column
    v_scale = v_diagonal - clamped * v_depth_column
    return v_tangent / pz, -(v_tangent * tangent + v_scale * scale) / pz


@_jit()
def _quaternion_gradient(w, x, y, z, v0, v1, v2):
    v_w = TWO * (x * (v2[1] - v1[2]) + y * (v0[2] - v2[0]) + z * (v1[0] - v0[1]))
    v_x = TWO * (y * (v0[1] + v1[0]) + z * (v0[2] + v2[0]) + w * (v2[1] - v1[2]) - TWO * x * (v1[1] + v2[2]))
    v_y = TWO * (x * (v0[1] + v1[0]) + z * (v1[2] + v2[1]) + w * (v0[2] - v2[0]) - TWO * y * (v0[0] + v2[2]))
    v_z = TWO * (x * (v0[2] + v2[0]) + y * (v1[2] + v2[1]) + w * (v1[0] - v0[1]) - TWO * z * (v0[0] + v1[1]))
    return v_w, v_x, v_y, v_z


# -----------------------------------------------------------------------------------------------------------
# Compositing
# -----------------------------------------------------------------------------------------------------------


def composite(
    projection: Projection,
    opacities: Float[Tensor, "N"],
    colors: Float[Tensor, "N 3"],
    background: Float[Tensor, "3"],
    width: int,
    height: int,
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """As `rasterize_reference.composite`, in float32."""
    return _Composite.apply(*projection[:4], opacities, colors, background, width, height)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conics, depths, extents, opacities, colors, background, width, height):
        splats = _arrays(means2d, conics, depths, extents, opacities, colors)
        _use_torch_threads()
        records, owners, offsets = _bin_splats(*splats, width, height)
        views = len(means2d)
        images = [torch.empty(views, height, width, channels) for channels in (3, 1, 1)]
        transmittance, last = (np.empty((views, height, width), np.float32) for _ in range(2))
        reached = np.empty(len(records), np.bool_)
        saved = records, offsets, *_arrays(background, *images), transmittance, last, reached
        _composite_forward(*saved)
        ctx.saved = saved, owners, depths.shape
        return tuple(images)

    @staticmethod
    def backward(ctx, v_rgb, v_alpha, v_depth):
        (records, offsets, background, _, _, depth, transmittance, last, reached), owners, shape = ctx.saved
        rows = np.empty((len(records), GRADIENT), np.float32)
        _use_torch_threads()
        _composite_backward(
            records,
            offsets,
            background,
            depth,
            transmittance,
            last,
            reached,
            *_arrays(v_rgb, v_alpha, v_depth),
            rows,
        )
        gradients = [torch.zeros(*shape, size) for size in (2, 3, 1, 3, 1)]
        _sum_rows(rows, owners, offsets, reached, *_arrays(*gradients))
        v_means2d, v_conics, v_opacities, v_colors, v_depths = gradients
        v_opacities = v_opacities[..., 0].sum(0)
        return v_means2d, v_conics, v_depths[..., 0], None, v_opacities, v_colors.sum(0), None, None, None


def _bin_splats(means2d, conics, depths, extents, opacities, colors, width, height):
    """Records [M, RECORD] of the splats that reach each tile, near to far, tile by tile and view by view.

    Also the Gaussian that each comes from [M] and where each tile's records begin [K, rows, columns + 1].
    """
    views = len(means2d)
    rows, columns = -(-height // TILE_HEIGHT), -(-width // TILE_WIDTH)
    order = np.empty(depths.shape, np.int32)
    counts = np.empty((views, rows * columns), np.int64)
    visible = np.empty(views, np.int64)
    _sort_and_count(means2d, depths, extents, width, height, columns, order, visible, counts)
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    records = np.empty((offsets[-1], RECORD), np.float32)
    owners = np.empty(offsets[-1], np.int32)
    splats = means2d, conics, depths, extents, opacities, colors
    _fill_records(*splats, width, height, columns, order, visible, offsets, records, owners)
    return records, owners, offsets


@_jit()
def _pixel_range(centre, extent, begin, end):
    """First pixel, and one past the last, whose centre lies within the extent and in [begin, end)."""
    first = max(np.float32(begin), np.ceil(centre - extent - HALF))
    last = min(np.float32(end), np.floor(centre + extent - HALF) + ONE)
    return np.int64(first), np.int64(last)


@_jit()
def _tile_ranges(mean_x, mean_y, extent_x, extent_y, width, height):
    """Tile columns [left, right) and rows [top, bottom) that a splat reaches, empty ranges if none."""
    x0, x1 = _pixel_range(mean_x, extent_x, 0, width)
    y0, y1 = _pixel_range(mean_y, extent_y, 0, height)
    if x0 >= x1 or y0 >= y1:
        return 0, 0, 0, 0
    return x0 // TILE_WIDTH, (x1 - 1) // TILE_WIDTH + 1, y0 // TILE_HEIGHT, (y1 - 1) // TILE_HEIGHT + 1


@_jit()
def _radix_sort(keys, order, spare_keys, spare_order):
    """Sorts `order` by `keys` (non-negative floats as uint32), stably, in place."""
    count = len(keys)
    for shift in (0, 11, 22):
        begins = np.zeros(2049, np.int64)
        for i in range(count):
            begins[((keys[i] >> shift) & 2047) + 1] += 1
        for digit in range(2048):
            begins[digit + 1] += begins[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & 2047
            spare_keys[begins[digit]], spare_order[begins[digit]] = keys[i], order[i]
            begins[digit] += 1
        keys, spare_keys = spare_keys, keys
        order, spare_order = spare_order, order
    spare_order[:] = order


@_jit(parallel=True)
def _sort_and_count(means2d, depths, extents, width, height, columns, order, visible, counts):
    """Per view: the visible Gaussians from near to far, and how many splats reach each tile."""
    for k in prange(len(means2d)):
        keys = np.empty(depths.shape[1], np.uint32)
        bits = depths[k].view(np.uint32)
        counts[k] = 0
        found = 0
        for n in range(depths.shape[1]):
            if extents[k, n, 0] <= ZERO:
                continue
            left, right, top, bottom = _tile_ranges(
                means2d[k, n, 0], means2d[k, n, 1], extents[k, n, 0], extents[k, n, 1], width, height
            )
            for tile_y in range(top, bottom):
                for tile_x in range(left, right):
                    counts[k, tile_y * columns + tile_x] += 1
            keys[found], order[k, found] = bits[n], n
            found += bottom > top
        visible[k] = found
        _radix_sort(keys[:found], order[k, :found], np.empty(found, np.uint32), np.empty(found, np.int32))


@_jit(parallel=True)
def _fill_records(
    means2d, conics, depths, extents, opacities, colors, width, height, columns, order, visible, offsets,
    records, owners,
):  # fmt: skip
    tiles = (len(offsets) - 1) // max(len(means2d), 1)
    for k in prange(len(means2d)):
        cursor = offsets[k * tiles : (k + 1) * tiles].copy()
        for i in range(visible[k]):
            n = order[k, i]
            left, right, top, bottom = _tile_ranges(
                means2d[k, n, 0], means2d[k, n, 1], extents[k, n, 0], extents[k, n, 1], width, height
            )
            for tile_y in range(top, bottom):
                for tile_x in range(left, right):
                    m = cursor[tile_y * columns + tile_x]
                    cursor[tile_y * columns + tile_x] += 1
                    owners[m] = n
                    records[m, 0], records[m, 1] = means2d[k, n, 0], means2d[k, n, 1]
                    records[m, 2], records[m, 3] = conics[k, n, 0], conics[k, n, 1]
                    records[m, 4], records[m, 5] = conics[k, n, 2], opacities[n]
                    records[m, 6], records[m, 7], records[m, 8] = colors[n, 0], colors[n, 1], colors[n, 2]
                    records[m, 9] = depths[k, n]
                    records[m, 10], records[m, 11] = extents[k, n, 0], extents[k, n, 1]


@_jit(fastmath=FAST)
def _exp(x):
    """exp on [-6, 0]; whatever is below counts as -6."""
    y = max(x, LOWEST_EXPONENT) * EXP_SCALE
    p = E0 + y * (E1 + y * (E2 + y * (E3 + y * (E4 + y * (E5 + y * E6)))))
    p = p * p
    p = p * p
    return p * p


@_jit()
def _tile_corner(tile, width, height):
    """View, left, top, right and bottom of the tile with this number."""
    columns, rows = -(-width // TILE_WIDTH), -(-height // TILE_HEIGHT)
    left, top = tile % columns * TILE_WIDTH, tile // columns % rows * TILE_HEIGHT
    return tile // (columns * rows), left, top, min(left + TILE_WIDTH, width), min(top + TILE_HEIGHT, height)


@_jit(parallel=True, fastmath=FAST)
def _composite_forward(records, offsets, background, rgb, alpha, depth, transmittance, last, reached):
    height, width = rgb.shape[1:3]
    for tile in prange(len(offsets) - 1):
        k, left, top, right, bottom = _tile_corner(tile, width, height)
        # Planes: red, green, blue, depth, last splat that counted, transmittance (negative once finished).
        state = np.zeros(6 * PLANE, np.float32)
        for y in range(TILE_HEIGHT):
            for x in range(right - left):
                state[5 * PLANE + y * STRIDE + x] = ONE
            for x in range(right - left, STRIDE):
                state[5 * PLANE + y * STRIDE + x] = -ONE
        for m in range(offsets[tile], offsets[tile + 1]):
            reached[m] = _blend(
                records[m], np.float32(m - offsets[tile] + 1), state, left, top, right, bottom
            )
        for y in range(top, bottom):
            for x in range(left, right):
                i = (y - top) * STRIDE + x - left
                t = abs(state[5 * PLANE + i])
                for channel in range(3):
                    rgb[k, y, x, channel] = state[channel * PLANE + i] + t * background[channel]
                alpha[k, y, x, 0] = ONE - t
                depth[k, y, x, 0] = state[3 * PLANE + i] / max(ONE - t, SMALLEST_ALPHA)
                transmittance[k, y, x], last[k, y, x] = t, state[4 * PLANE + i]


@_jit(fastmath=FAST)
def _blend(record, number, state, left, top, right, bottom):
    """Adds one splat to a tile; returns whether any pixel took it."""
    mean_x, mean_y, conic_xx, conic_xy, conic_yy, opacity = (
        record[0], record[1], record[2], record[3], record[4], record[5],
    )  # fmt: skip
    red, green, blue, depth = record[6], record[7], record[8], record[9]
    x0, x1 = _pixel_range(mean_x, record[10], left, right)
    y0, y1 = _pixel_range(mean_y, record[11], top, bottom)
    a = -HALF * conic_xx
    used = np.zeros(LANES, np.float32)
    for y in range(y0, y1):
        dy = mean_y - (np.float32(y) + HALF)
        b, c = -conic_xy * dy, -HALF * conic_yy * dy * dy
        for x in range(x0, x1, LANES):
            dx0 = mean_x - (np.float32(x) + HALF)
            base = np.uint64((y - top) * STRIDE + x - left)
            for lane in range(LANES):
                i = base + np.uint64(lane)
                t = state[np.uint64(5 * PLANE) + i]
                dx = dx0 - np.float32(lane)
                exponent = (a * dx + b) * dx + c
                alpha = min(ALPHA_MAX, opacity * _exp(exponent))
                counts = (t > ZERO) & (exponent <= ZERO) & (alpha >= ALPHA_MIN)
                alpha = alpha if counts else ZERO
                after = t - alpha * t
                finished = (after <= TRANSMITTANCE_MIN) & (t > ZERO)
                weight = ZERO if finished else alpha * t
                state[np.uint64(5 * PLANE) + i] = -t if finished else after
                state[i] += weight * red
                state[np.uint64(PLANE) + i] += weight * green
                state[np.uint64(2 * PLANE) + i] += weight * blue
                state[np.uint64(3 * PLANE) + i] += weight * depth
                state[np.uint64(4 * PLANE) + i] = number if weight > ZERO else state[np.uint64(4 * PLANE) + i]
                used[lane] += weight
    return used.sum() > ZERO


@_jit(parallel=True, fastmath=FAST)
def _composite_backward(
    records, offsets, background, depth, transmittance, last, reached, v_rgb, v_alpha, v_depth, rows
):
    height, width = v_rgb.shape[1:3]
    for tile in prange(len(offsets) - 1):
        k, left, top, right, bottom = _tile_corner(tile, width, height)
        # Planes: gradients by red, green, blue, blended depth; last splat that counted; transmittance in front
        # of the splat at hand; what lies behind it, dotted with the gradients.
        state = np.zeros(7 * PLANE, np.float32)
        for y in range(top, bottom):
            for x in range(left, right):
                i = (y - top) * STRIDE + x - left
                t = transmittance[k, y, x]
                seen = max(ONE - t, SMALLEST_ALPHA)
                v_blended_depth = v_depth[k, y, x, 0] / seen
                behind = -v_alpha[k, y, x, 0]
                if ONE - t > SMALLEST_ALPHA:
                    behind += v_blended_depth * depth[k, y, x, 0]
                for channel in range(3):
                    state[channel * PLANE + i] = v_rgb[k, y, x, channel]
                    behind += v_rgb[k, y, x, channel] * background[channel]
                state[3 * PLANE + i] = v_blended_depth
                state[4 * PLANE + i] = last[k, y, x]
                state[5 * PLANE + i], state[6 * PLANE + i] = t, t * behind
        for m in range(offsets[tile + 1] - 1, offsets[tile] - 1, -1):
            if reached[m]:
                number = np.float32(m - offsets[tile] + 1)
                _blend_backward(records[m], number, state, left, top, right, bottom, rows[m])


@_jit(fastmath=FAST)
def _blend_backward(record, number, state, left, top, right, bottom, row):
    """Takes one splat off a tile again, and writes its gradients."""
    mean_x, mean_y, conic_xx, conic_xy, conic_yy, opacity = (
        record[0], record[1], record[2], record[3], record[4], record[5],
    )  # fmt: skip
    red, green, blue, depth = record[6], record[7], record[8], record[9]
    x0, x1 = _pixel_range(mean_x, record[10], left, right)
    y0, y1 = _pixel_range(mean_y, record[11], top, bottom)
    a = -HALF * conic_xx
    s = sx = sy = sxx = sxy = syy = ZERO
    v_red = v_green = v_blue = v_depth = ZERO
    for x in range(x0, x1, LANES):
        dx0 = mean_x - (np.float32(x) + HALF)
        sums = np.zeros(
            7 * LANES, np.float32
        )  # by column: gradients by sigma times 1, dy, dy^2; colours; depth
        for y in range(y0, y1):
            dy = mean_y - (np.float32(y) + HALF)
            b, c = -conic_xy * dy, -HALF * conic_yy * dy * dy
            base = np.uint64((y - top) * STRIDE + x - left)
            for lane in range(LANES):
                i = base + np.uint64(lane)
                dx = dx0 - np.float32(lane)
                exponent = (a * dx + b) * dx + c
                faded = opacity * _exp(exponent)
                counts = (
                    (number <= state[np.uint64(4 * PLANE) + i]) & (exponent <= ZERO) & (faded >= ALPHA_MIN)
                )
                alpha = min(ALPHA_MAX, faded) if counts else ZERO
                ratio = ONE / (ONE - alpha)
                t = state[np.uint64(5 * PLANE) + i] * ratio
                weight = alpha * t
                vr, vg, vb = state[i], state[np.uint64(PLANE) + i], state[np.uint64(2 * PLANE) + i]
                vd = state[np.uint64(3 * PLANE) + i]
                shade = vr * red + vg * green + vb * blue + vd * depth
                behind = state[np.uint64(6 * PLANE) + i]
                v_sigma = -alpha * (t * shade - behind * ratio)
                v_sigma = ZERO if faded > ALPHA_MAX else v_sigma
                state[np.uint64(5 * PLANE) + i] = t
                state[np.uint64(6 * PLANE) + i] = behind + weight * shade
                sums[lane] += v_sigma
                sums[LANES + lane] += v_sigma * dy
                sums[2 * LANES + lane] += v_sigma * dy * dy
                sums[3 * LANES + lane] += weight * vr
                sums[4 * LANES + lane] += weight * vg
                sums[5 * LANES + lane] += weight * vb
                sums[6 * LANES + lane] += weight * vd
        for lane in range(LANES):
            dx = dx0 - np.float32(lane)
            s += sums[lane]
            sx += sums[lane] * dx
            sxx += sums[lane] * dx * dx
            sy += sums[LANES + lane]
            sxy += sums[LANES + lane] * dx
            syy += sums[2 * LANES + lane]
            v_red += sums[3 * LANES + lane]
            v_green += sums[4 * LANES + lane]
            v_blue += sums[5 * LANES + lane]
            v_depth += sums[6 * LANES + lane]
    row[0], row[1] = conic_xx * sx + conic_xy * sy, conic_xy * sx + conic_yy * sy
    row[2], row[3], row[4] = HALF * sxx, sxy, HALF * syy
    row[5] = -s / opacity
    row[6], row[7], row[8], row[9] = v_red, v_green, v_blue, v_depth


@_jit(parallel=True)
def _sum_rows(rows, owners, offsets, reached, v_means2d, v_conics, v_opacities, v_colors, v_depths):
    """Adds up each Gaussian's rows within a view, in the order of the tiles."""
    views = len(v_means2d)
    tiles = (len(offsets) - 1) // max(views, 1)
    for k in prange(views):
        for m in range(offsets[k * tiles], offsets[(k + 1) * tiles]):
            if reached[m]:
                n = owners[m]
                for j in range(2):
                    v_means2d[k, n, j] += rows[m, j]
                for j in range(3):
                    v_conics[k, n, j] += rows[m, 2 + j]
                    v_colors[k, n, j] += rows[m, 6 + j]
                v_opacities[k, n, 0] += rows[m, 5]
                v_depths[k, n, 0] += rows[m, 9]
