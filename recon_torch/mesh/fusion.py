"""Depth maps fused to a truncated signed distance (Curless and Levoy 1996); empty pixels are free space."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from recon_torch.kernel import kernel, run
from recon_torch.mesh.grid import Grid
from recon_torch.views.cameras import Cameras

TRUNCATION_CELLS = 4.0
UNKNOWN = np.float32(-1e3)  # the depth of a pixel that says nothing: all lies far behind it


def fuse(depths: Float32[np.ndarray, "K H W"], cameras: Cameras, grid: Grid) -> Float32[np.ndarray, "x y z"]:
    """How far points lie below the surface, in truncation distances, from -1 outside to 1 inside.

    A point that a camera sees through an empty pixel, whose depth is infinite, is outside as much as one that
    lies far before the surface. One that no camera says anything of lies deep inside.
    """
    field = np.empty(grid.shape, np.float32)
    maps = (cameras.w2c.astype(np.float32), cameras.intrinsics_px.astype(np.float32), depths)
    truncation = np.float32(TRUNCATION_CELLS * grid.cell)
    run(
        _fuse_slabs,
        grid.shape[0],
        field,
        grid.lower.astype(np.float32),
        np.float32(grid.cell),
        *maps,
        truncation,
    )
    return field


@kernel(fastmath={"contract", "reassoc", "nsz"})
def _fuse_slabs(begin, end, field, lower, cell, w2c, intrinsics, depths, truncation):
    """Fills the slabs x = begin ... end - 1."""
    num_views, height, width = depths.shape
    num_points = field.shape[2]
    sums, weights = np.empty(num_points, np.float32), np.empty(num_points, np.float32)
    zero, one, half = np.float32(0), np.float32(1), np.float32(0.5)
    for i in range(begin, end):
        x = lower[0] + cell * np.float32(i)
        for j in range(field.shape[1]):
            y = lower[1] + cell * np.float32(j)
            sums[:] = zero
            weights[:] = zero
            for view in range(num_views):
                m, f, seen = w2c[view], intrinsics[view], depths[view]
                # The column of points is a line in homogeneous pixels.
                z = lower[2]
                base = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]
                base_u = f[0, 0] * (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3])
                base_v = f[1, 1] * (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3])
                step, step_u, step_v = cell * m[2, 2], cell * f[0, 0] * m[0, 2], cell * f[1, 1] * m[1, 2]
                for k in range(num_points):
                    here = base + step * np.float32(k)
                    if here <= zero:
                        continue
                    inverse = one / here
                    u = (base_u + step_u * np.float32(k)) * inverse + f[0, 2] - half
                    v = (base_v + step_v * np.float32(k)) * inverse + f[1, 2] - half
                    if u < zero or v < zero or u >= np.float32(width - 1) or v >= np.float32(height - 1):
                        continue
                    left, top = np.int64(u), np.int64(v)
                    right_share, low_share = u - np.float32(left), v - np.float32(top)
                    a, b = seen[top, left], seen[top, left + 1]
                    c, d = seen[top + 1, left], seen[top + 1, left + 1]
                    nearest, farthest = min(min(a, b), min(c, d)), max(max(a, b), max(c, d))
                    if farthest - nearest < truncation:
                        upper = a + right_share * (b - a)
                        surface = upper + low_share * (c + right_share * (d - c) - upper)
                    elif low_share < half:
                        surface = a if right_share < half else b
                    else:
                        surface = c if right_share < half else d
                    below = (here - surface) / truncation
                    if below <= one:
                        sums[k] += max(below, -one)
                        weights[k] += one
            for k in range(num_points):
                field[i, j, k] = sums[k] / weights[k] if weights[k] > zero else one
