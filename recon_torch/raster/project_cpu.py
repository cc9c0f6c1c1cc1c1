"""EWA projection on the CPU: a numba kernel forward, and one with hand-written gradients backward.

A Gaussian's covariance is root root^T with root = rotation * scales. With the slope J = d pixel / d world its
2D covariance is u u^T + low_pass, where u = J root has two rows of three; no 3x3 covariance is ever formed.

Vectors are tuples, and matrices are tuples of rows; `v_x` is the gradient of the loss by x. A thread takes a
Gaussian through all cameras in order, so gradients do not depend on the number of threads.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from recon_torch.kernel import arrays, gradient_arrays, inlined, kernel, run
from recon_torch.raster import CameraTensors, Projection, reference
from recon_torch.raster.gaussians import Activated

NEAR_PLANE, FAR_PLANE = np.float32(reference.NEAR_PLANE), np.float32(reference.FAR_PLANE)
MAX_SIGMAS, ALPHA_MIN = np.float32(reference.MAX_SIGMAS), np.float32(reference.ALPHA_MIN)
FRUSTUM_MARGIN, LARGEST = np.float32(reference.FRUSTUM_MARGIN), np.float32(reference.LARGEST)
GRAIN = 1024  # least Gaussians for a thread
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


def project(gaussians: Activated, cameras: CameraTensors) -> Projection:
    """The same as `reference.project`, in float32."""
    means, quats, scales, opacities, _ = gaussians
    return Projection(*Project.apply(means, quats, scales, opacities, *cameras))


class Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, w2c, intrinsics_px, width, height, low_pass_px2):
        shape = len(w2c), len(means)
        means2d, conics, depths, extents = (torch.empty(*shape, *size) for size in ((2,), (3,), (), (2,)))
        radii = torch.empty(*shape, 2, dtype=torch.int32)
        sizes = np.array([width, height], np.float32)
        low_pass = np.array([low_pass_px2], np.float32)
        inputs = arrays(means, quats, scales, w2c, intrinsics_px)
        outputs = arrays(means2d, conics, depths, extents, radii)
        run(_forward, len(means), *inputs, sizes, low_pass, *arrays(opacities), *outputs, grain=GRAIN)
        ctx.saved, ctx.outputs = (*inputs, sizes, outputs[1], outputs[4]), outputs[:3]
        ctx.mark_non_differentiable(extents, radii)
        ctx.set_materialize_grads(False)
        return means2d, conics, depths, extents, radii

    @staticmethod
    def backward(ctx, v_means2d, v_conics, v_depths, _v_extents, _v_radii):
        gradients = [torch.empty(array.shape) for array in ctx.saved[:3]]
        v_outputs = gradient_arrays((v_means2d, v_conics, v_depths), ctx.outputs)
        run(_backward, len(gradients[0]), *ctx.saved, *v_outputs, *arrays(*gradients), grain=GRAIN)
        return *gradients, *[None] * 6


@kernel()
def _forward(
    begin, end, means, quats, scales, w2c, intrinsics, sizes, low_pass, opacities,
    means2d, conics, depths, extents, radii,
):  # fmt: skip
    for n in range(begin, end):
        mean, scale, opacity = _row(means, n), _row(scales, n), opacities[n]
        root = _scaled(_rotation(quats, n)[0], scale)
        sigmas = ZERO  # stays 0, which makes the splat invisible, if the Gaussian cannot be drawn
        if opacity >= ALPHA_MIN and opacity < math.inf and _within_limits(mean) and _within_limits(scale):
            sigmas = min(MAX_SIGMAS, math.sqrt(TWO * math.log(opacity / ALPHA_MIN)))
        for k in range(len(w2c)):
            view, focal, centre = _pinhole(w2c, intrinsics, k)
            point, _, slope = _linearise(mean, view, focal, centre, sizes)
            u = _times(slope[0], root), _times(slope[1], root)
            xx, yy = _dot(u[0], u[0]) + low_pass[0], _dot(u[1], u[1]) + low_pass[0]
            xy = _dot(u[0], u[1])
            det = xx * yy - xy * xy
            x = focal[0] * point[0] / point[2] + centre[0]
            y = focal[1] * point[1] / point[2] + centre[1]
            extent_x, extent_y = sigmas * math.sqrt(xx), sigmas * math.sqrt(yy)
            radius_x, radius_y, depth = np.ceil(extent_x), np.ceil(extent_y), point[2]
            # The comparisons are written so that a NaN makes them false.
            seen = (
                sigmas > ZERO and det > ZERO and det < math.inf and depth >= NEAR_PLANE and depth <= FAR_PLANE
            )
            seen = seen and x + radius_x > ZERO and x - radius_x < sizes[0]
            seen = seen and y + radius_y > ZERO and y - radius_y < sizes[1]
            if not seen:
                x = y = xy = depth = extent_x = extent_y = radius_x = radius_y = ZERO
                xx = yy = det = ONE
            means2d[k, n, 0], means2d[k, n, 1], depths[k, n] = x, y, depth
            conics[k, n, 0], conics[k, n, 1], conics[k, n, 2] = yy / det, -xy / det, xx / det
            extents[k, n, 0], extents[k, n, 1] = extent_x, extent_y
            radii[k, n, 0], radii[k, n, 1] = np.int32(radius_x), np.int32(radius_y)


@kernel()
def _backward(
    begin, end, means, quats, scales, w2c, intrinsics, sizes, conics, radii,
    v_means2d, v_conics, v_depths, v_means, v_quats, v_scales,
):  # fmt: skip
    for n in range(begin, end):
        mean, scale = _row(means, n), _row(scales, n)
        rotation, quat, length = _rotation(quats, n)
        root = _scaled(rotation, scale)
        nothing = ZERO, ZERO, ZERO
        v_mean, v_root, seen = nothing, (nothing, nothing, nothing), False
        for k in range(len(w2c)):
            if radii[k, n, 0] > 0:
                seen = True
                view, focal, centre = _pinhole(w2c, intrinsics, k)
                point, tangents, slope = _linearise(mean, view, focal, centre, sizes)
                u = _times(slope[0], root), _times(slope[1], root)
                v_u = _covariance_gradient(_entry(conics, k, n), _entry(v_conics, k, n), u)
                v_root = (
                    _plus(v_root[0], slope[0][0], v_u[0], slope[1][0], v_u[1]),
                    _plus(v_root[1], slope[0][1], v_u[0], slope[1][1], v_u[1]),
                    _plus(v_root[2], slope[0][2], v_u[0], slope[1][2], v_u[1]),
                )
                x, y, z = point
                v_slope = _times_transposed(v_u[0], root), _times_transposed(v_u[1], root)
                v_x, v_zx = _axis_gradient(
                    x, z, focal[0], tangents[0], view[0], view[2], v_slope[0], v_means2d[k, n, 0]
                )
                v_y, v_zy = _axis_gradient(
                    y, z, focal[1], tangents[1], view[1], view[2], v_slope[1], v_means2d[k, n, 1]
                )
                v_mean = _plus(v_mean, v_x, view[0], v_y, view[1])
                v_mean = _plus(v_mean, v_zx, view[2], v_zy + v_depths[k, n], view[2])
        v_means[n, 0], v_means[n, 1], v_means[n, 2] = v_mean
        if not seen:
            v_scales[n, 0] = v_scales[n, 1] = v_scales[n, 2] = ZERO
            v_quats[n, 0] = v_quats[n, 1] = v_quats[n, 2] = v_quats[n, 3] = ZERO
        else:
            v_scales[n, 0] = (
                v_root[0][0] * rotation[0][0] + v_root[1][0] * rotation[1][0] + v_root[2][0] * rotation[2][0]
            )
            v_scales[n, 1] = (
                v_root[0][1] * rotation[0][1] + v_root[1][1] * rotation[1][1] + v_root[2][1] * rotation[2][1]
            )
            v_scales[n, 2] = (
                v_root[0][2] * rotation[0][2] + v_root[1][2] * rotation[1][2] + v_root[2][2] * rotation[2][2]
            )
            v_unit = _quaternion_gradient(quat, _scaled(v_root, scale))
            radial = quat[0] * v_unit[0] + quat[1] * v_unit[1] + quat[2] * v_unit[2] + quat[3] * v_unit[3]
            v_quats[n, 0] = (v_unit[0] - radial * quat[0]) / length
            v_quats[n, 1] = (v_unit[1] - radial * quat[1]) / length
            v_quats[n, 2] = (v_unit[2] - radial * quat[2]) / length
            v_quats[n, 3] = (v_unit[3] - radial * quat[3]) / length


@inlined()
def _row(matrix, i):
    return matrix[i, 0], matrix[i, 1], matrix[i, 2]


@inlined()
def _entry(array, k, n):
    return array[k, n, 0], array[k, n, 1], array[k, n, 2]


@inlined()
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@inlined()
def _times(a, m):
    """The row vector a times the matrix m."""
    return (
        a[0] * m[0][0] + a[1] * m[1][0] + a[2] * m[2][0],
        a[0] * m[0][1] + a[1] * m[1][1] + a[2] * m[2][1],
        a[0] * m[0][2] + a[1] * m[1][2] + a[2] * m[2][2],
    )


@inlined()
def _times_transposed(a, m):
    return _dot(a, m[0]), _dot(a, m[1]), _dot(a, m[2])


@inlined()
def _plus(total, a, row_a, b, row_b):
    return (
        total[0] + a * row_a[0] + b * row_b[0],
        total[1] + a * row_a[1] + b * row_b[1],
        total[2] + a * row_a[2] + b * row_b[2],
    )


@inlined()
def _scaled(m, scale):
    """The matrix m with its columns scaled."""
    return (
        (m[0][0] * scale[0], m[0][1] * scale[1], m[0][2] * scale[2]),
        (m[1][0] * scale[0], m[1][1] * scale[1], m[1][2] * scale[2]),
        (m[2][0] * scale[0], m[2][1] * scale[1], m[2][2] * scale[2]),
    )


@inlined()
def _within_limits(a):
    return abs(a[0]) <= LARGEST and abs(a[1]) <= LARGEST and abs(a[2]) <= LARGEST


@inlined()
def _rotation(quats, n):
    """The rotation matrix of quaternion n, the quaternion divided by its length, and that length."""
    w, x, y, z = quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3]
    length = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / length, x / length, y / length, z / length
    rotation = (
        (ONE - TWO * (y * y + z * z), TWO * (x * y - w * z), TWO * (x * z + w * y)),
        (TWO * (x * y + w * z), ONE - TWO * (x * x + z * z), TWO * (y * z - w * x)),
        (TWO * (x * z - w * y), TWO * (y * z + w * x), ONE - TWO * (x * x + y * y)),
    )
    return rotation, (w, x, y, z), length


@inlined()
def _quaternion_gradient(quat, v):
    """From the gradient v of the rotation matrix to that of the unit quaternion."""
    w, x, y, z = quat
    v_xy, v_xz, v_yz = v[0][1] + v[1][0], v[0][2] + v[2][0], v[1][2] + v[2][1]
    v_wx, v_wy, v_wz = v[2][1] - v[1][2], v[0][2] - v[2][0], v[1][0] - v[0][1]
    return (
        TWO * (x * v_wx + y * v_wy + z * v_wz),
        TWO * (w * v_wx + y * v_xy + z * v_xz - TWO * x * (v[1][1] + v[2][2])),
        TWO * (w * v_wy + x * v_xy + z * v_yz - TWO * y * (v[0][0] + v[2][2])),
        TWO * (w * v_wz + x * v_xz + y * v_yz - TWO * z * (v[0][0] + v[1][1])),
    )


@inlined()
def _pinhole(w2c, intrinsics, k):
    """The camera's rotation rows with the translation as fourth entries; focal lengths; principal point."""
    view = (
        (w2c[k, 0, 0], w2c[k, 0, 1], w2c[k, 0, 2], w2c[k, 0, 3]),
        (w2c[k, 1, 0], w2c[k, 1, 1], w2c[k, 1, 2], w2c[k, 1, 3]),
        (w2c[k, 2, 0], w2c[k, 2, 1], w2c[k, 2, 2], w2c[k, 2, 3]),
    )
    focal = intrinsics[k, 0, 0], intrinsics[k, 1, 1]
    return view, focal, (intrinsics[k, 0, 2], intrinsics[k, 1, 2])


@inlined()
def _linearise(mean, view, focal, centre, sizes):
    """The mean in camera coordinates, the tangents where the projection is linearised, and its slope there.

    Row i of the slope is focal / z * (view[i] - tangent * view[2]).
    """
    x, y = _dot(view[0], mean) + view[0][3], _dot(view[1], mean) + view[1][3]
    z = _dot(view[2], mean) + view[2][3]
    tangent_x = _clamp_tangent(x / z, focal[0], centre[0], sizes[0])
    tangent_y = _clamp_tangent(y / z, focal[1], centre[1], sizes[1])
    scale_x, scale_y = focal[0] / z, focal[1] / z
    nothing = ZERO, ZERO, ZERO
    slope_x = _plus(nothing, scale_x, view[0], -scale_x * tangent_x, view[2])
    slope_y = _plus(nothing, scale_y, view[1], -scale_y * tangent_y, view[2])
    return (x, y, z), (tangent_x, tangent_y), (slope_x, slope_y)


@inlined()
def _clamp_tangent(tangent, focal, centre, size):
    margin = FRUSTUM_MARGIN * HALF * size / focal
    return min(max(tangent, -centre / focal - margin), (size - centre) / focal + margin)


@inlined()
def _covariance_gradient(conic, v_conic, u):
    """The gradient by u, where conic = (u u^T + eps)^-1: it is -2 P V P u with P = conic, V its gradient."""
    a, b, c = conic
    va, vb, vc = v_conic[0], HALF * v_conic[1], v_conic[2]  # v_conic[1] counts both off-diagonal entries
    pv_xx, pv_xy, pv_yx, pv_yy = a * va + b * vb, a * vb + b * vc, b * va + c * vb, b * vb + c * vc
    xx, xy, yy = pv_xx * a + pv_xy * b, pv_xx * b + pv_xy * c, pv_yx * b + pv_yy * c
    nothing = ZERO, ZERO, ZERO
    return _plus(nothing, -TWO * xx, u[0], -TWO * xy, u[1]), _plus(nothing, -TWO * xy, u[0], -TWO * yy, u[1])


@inlined()
def _axis_gradient(x, z, focal, linearised_at, view_row, depth_row, v_slope, v_mean2d):
    """Gradients by the camera coordinates x and z, from those by a row of the slope and by the 2D mean."""
    tangent, scale = x / z, focal / z
    along, into = _dot(v_slope, view_row), _dot(v_slope, depth_row)
    v_tangent = focal * v_mean2d
    if linearised_at == tangent:  # not clamped
        v_tangent -= scale * into
    v_scale = along - linearised_at * into
    return v_tangent / z, -(v_tangent * tangent + v_scale * scale) / z
