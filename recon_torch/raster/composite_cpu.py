"""Blending of splats on the CPU: numba kernels with hand-written gradients that are repeatable bit for bit.

The splats of each view are sorted by depth and binned into tiles. One task per tile then goes through its
splats from near to far (from far to near for the gradients) and, within a splat, through runs of LANES
pixels, each of which the compiler turns into a few vector instructions. Gradients are written into one row
per tile and splat and are added up in a fixed order, so neither the number of threads nor their timing
changes a bit.
`reference.composite` has the formulas.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.kernel import FAST_MATH, arrays, gradient_arrays, inlined, kernel, run
from recon_torch.raster import CameraTensors, Projection, reference
from recon_torch.raster.gaussians import Activated

ALPHA_MIN, ALPHA_MAX = np.float32(reference.ALPHA_MIN), np.float32(reference.ALPHA_MAX)
TRANSMITTANCE_MIN = np.float32(reference.TRANSMITTANCE_MIN)
SMALLEST_ALPHA = np.float32(reference.SMALLEST_ALPHA)
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)

LANES = 16  # pixels in a run, which fill one AVX-512 register
TILE_WIDTH, TILE_HEIGHT = 64, 16
STRIDE = TILE_WIDTH + LANES  # a run may begin in the last column; pixels beyond it are never read
PLANE = STRIDE * TILE_HEIGHT
# Where the planes of a tile begin. Unsigned, or numba would look for negative indices in the innermost loop.
P1, P2, P3, P4, P5, P6 = (np.uint64(plane * PLANE) for plane in range(1, 7))

LOOK_EVERY = 64  # splats between two searches for pixels that are finished

# exp(x) = p(x / 8) ** 8 on [-6, 0], fitted by least squares in relative error: within 4e-7 of exp.
LOWEST_EXPONENT = np.float32(-6)  # exp(-6) < ALPHA_MIN
EXP_SCALE = np.float32(1 / 8)
E0, E1, E2 = np.float32(0.9999999967792356), np.float32(0.9999996143658061), np.float32(0.499992251415808)
E3, E4, E5 = np.float32(0.1666071011839554), np.float32(0.04144465382934853), np.float32(0.00789911580597863)
E6 = np.float32(0.0009503807497972944)


def composite(
    projection: Projection, gaussians: Activated, cameras: CameraTensors, background: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"], Float[Tensor, "K H W 1"]]:
    """The same as `reference.composite`, in float32."""
    splats = (*projection[:4], gaussians.opacities, gaussians.colors)
    return Composite.apply(*splats, background, cameras.width, cameras.height)


class Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conics, depths, extents, opacities, colors, background, width, height):
        splats = arrays(means2d, conics, depths, extents, opacities, colors)
        records, owners, begins = _bin(*splats, width, height)
        views = len(means2d)
        rgb, alpha, depth = (torch.empty(views, height, width, channels) for channels in (3, 1, 1))
        transmittance, last = np.empty((2, views, height, width), np.float32)
        reached = np.empty(len(records), np.bool_)
        background, *images = arrays(background, rgb, alpha, depth)
        run(_forward, len(begins) - 1, records, begins, background, *images, transmittance, last, reached)
        ctx.saved = records, begins, background, images[2], transmittance, last, reached
        ctx.owners, ctx.images, ctx.shape = owners, images, depths.shape
        ctx.set_materialize_grads(False)
        return rgb, alpha, depth

    @staticmethod
    def backward(ctx, v_rgb, v_alpha, v_depth):
        records, begins, *_, reached = ctx.saved
        rows = np.empty((len(records), 10), np.float32)
        v_images = gradient_arrays((v_rgb, v_alpha, v_depth), ctx.images)
        run(_backward, len(begins) - 1, *ctx.saved, *v_images, rows)
        sizes = (2,), (3,), (), (), (3,)
        by_view = [np.zeros((*ctx.shape, *size), np.float32) for size in sizes]
        run(_sum_rows, len(by_view[0]), rows, ctx.owners, begins, reached, *by_view)
        v_means2d, v_conics, v_depths, v_opacities, v_colors = by_view
        gradients = v_means2d, v_conics, v_depths, v_opacities.sum(0), v_colors.sum(0)
        v_means2d, v_conics, v_depths, v_opacities, v_colors = map(torch.from_numpy, gradients)
        return v_means2d, v_conics, v_depths, None, v_opacities, v_colors, None, None, None


# Sorting and binning


def _bin(means2d, conics, depths, extents, opacities, colors, width, height):
    """The splats that reach each tile, from near to far, tile by tile and view by view.

    Returns their records [M,12] (mean x, y; conic xx, xy, yy; opacity; red, green, blue, depth; extent x, y),
    the Gaussian behind each [M], and where each tile's records begin [K * tiles + 1].
    """
    views, columns, rows = len(means2d), -(-width // TILE_WIDTH), -(-height // TILE_HEIGHT)
    order, found = np.empty(depths.shape, np.int32), np.empty(views, np.int64)
    counts = np.empty((views, rows * columns), np.int64)
    run(_sort, views, means2d, depths, extents, width, height, order, found, counts)
    begins = np.concatenate([[0], counts.ravel().cumsum()])
    records, owners = np.empty((begins[-1], 12), np.float32), np.empty(begins[-1], np.int32)
    splats = means2d, conics, depths, extents, opacities, colors
    run(_fill, views, *splats, width, height, order, found, begins, records, owners)
    return records, owners, begins


@inlined()
def _pixels(centre, extent, begin, end):
    """The first pixel whose centre lies within the extent and in [begin, end), and one past the last."""
    first = max(np.float32(begin), np.ceil(centre - extent - HALF))
    last = min(np.float32(end), np.floor(centre + extent - HALF) + ONE)
    return np.int64(first), np.int64(last)


@inlined()
def _tiles(means2d, extents, k, n, width, height):
    """Tile columns [left, right) and rows [top, bottom) with a pixel that the splat can reach."""
    x0, x1 = _pixels(means2d[k, n, 0], extents[k, n, 0], 0, width)
    y0, y1 = _pixels(means2d[k, n, 1], extents[k, n, 1], 0, height)
    if extents[k, n, 0] <= ZERO or x0 >= x1 or y0 >= y1:
        return 0, 0, 0, 0
    return x0 // TILE_WIDTH, (x1 - 1) // TILE_WIDTH + 1, y0 // TILE_HEIGHT, (y1 - 1) // TILE_HEIGHT + 1


@kernel()
def _sort(begin, end, means2d, depths, extents, width, height, order, found, counts):
    """For each view: its visible Gaussians from near to far, their number, and how many reach each tile."""
    columns = -(-width // TILE_WIDTH)
    for k in range(begin, end):
        bits, keys = depths[k].view(np.uint32), np.empty(depths.shape[1], np.uint32)
        counts[k] = 0
        seen = 0
        for n in range(depths.shape[1]):
            left, right, top, bottom = _tiles(means2d, extents, k, n, width, height)
            for tile_y in range(top, bottom):
                for tile_x in range(left, right):
                    counts[k, tile_y * columns + tile_x] += 1
            if right > left:
                keys[seen], order[k, seen] = bits[n], n
                seen += 1
        found[k] = seen
        _radix_sort(keys[:seen], order[k, :seen])


@inlined()
def _radix_sort(keys, order):
    """Sorts `order` by keys that are the bits of non-negative floats. Stable; overwrites the keys."""
    result, spare_keys, spare_order = order, np.empty_like(keys), np.empty_like(order)
    for shift in (0, 11, 22):
        begins = np.zeros(2049, np.int64)
        for key in keys:
            begins[((key >> shift) & 2047) + 1] += 1
        for digit in range(2048):
            begins[digit + 1] += begins[digit]
        for i in range(len(keys)):
            digit = (keys[i] >> shift) & 2047
            spare_keys[begins[digit]], spare_order[begins[digit]] = keys[i], order[i]
            begins[digit] += 1
        keys, spare_keys, order, spare_order = spare_keys, keys, spare_order, order
    result[:] = order


@kernel()
def _fill(
    begin, end, means2d, conics, depths, extents, opacities, colors, width, height,
    order, found, begins, records, owners,
):  # fmt: skip
    columns = -(-width // TILE_WIDTH)
    tiles = columns * -(-height // TILE_HEIGHT)
    for k in range(begin, end):
        cursor = begins[k * tiles : (k + 1) * tiles].copy()
        for i in range(found[k]):
            n = order[k, i]
            left, right, top, bottom = _tiles(means2d, extents, k, n, width, height)
            for tile_y in range(top, bottom):
                for tile_x in range(left, right):
                    m = cursor[tile_y * columns + tile_x]
                    cursor[tile_y * columns + tile_x] += 1
                    owners[m] = n
                    records[m, 0], records[m, 1] = means2d[k, n, 0], means2d[k, n, 1]
                    for j in range(3):
                        records[m, 2 + j], records[m, 6 + j] = conics[k, n, j], colors[n, j]
                    records[m, 5], records[m, 9] = opacities[n], depths[k, n]
                    records[m, 10], records[m, 11] = extents[k, n, 0], extents[k, n, 1]


# Blending


@inlined()
def _tile_place(tile, width, height):
    """The view of a tile, and its left, top, right and bottom pixel."""
    columns, rows = -(-width // TILE_WIDTH), -(-height // TILE_HEIGHT)
    left, top = tile % columns * TILE_WIDTH, tile // columns % rows * TILE_HEIGHT
    right, bottom = min(left + TILE_WIDTH, width), min(top + TILE_HEIGHT, height)
    return tile // (columns * rows), (left, top, right, bottom)


@inlined()
def _splat_place(records, m, box):
    """The pixels [x0, x1) and [y0, y1) of a tile's box that a splat reaches."""
    left, top, right, bottom = box
    x0, x1 = _pixels(records[m, 0], records[m, 10], left, right)
    y0, y1 = _pixels(records[m, 1], records[m, 11], top, bottom)
    return x0, x1, y0, y1


@inlined(fastmath=FAST_MATH)
def _exp(x):
    """exp(x) for x in [-6, 0]; lower values count as -6."""
    y = max(x, LOWEST_EXPONENT) * EXP_SCALE
    p = E0 + y * (E1 + y * (E2 + y * (E3 + y * (E4 + y * (E5 + y * E6)))))
    p = p * p
    p = p * p
    return p * p


@kernel(fastmath=FAST_MATH)
def _forward(begin, end, records, begins, background, rgb, alpha, depth, transmittance, last, reached):
    """Fills the images and, for `_backward`, each pixel's last splat (from 1) and which splats show."""
    height, width = rgb.shape[1:3]
    for tile in range(begin, end):
        k, box = _tile_place(tile, width, height)
        left, top, right, bottom = box
        # Planes: red, green, blue, depth, last splat, transmittance (negative where the pixel is finished).
        state, shown = np.zeros(6 * PLANE, np.float32), np.empty(LANES, np.float32)
        unfinished = np.ones(PLANE // LANES + 1, np.bool_)
        for y in range(TILE_HEIGHT):
            for x in range(STRIDE):
                state[5 * PLANE + y * STRIDE + x] = ONE if x < right - left else -ONE
        for m in range(begins[tile], begins[tile + 1]):
            number = m - begins[tile] + 1
            if number % LOOK_EVERY == 0:
                _find_unfinished(state, unfinished)
            reached[m] = _blend(records, m, np.float32(number), state, unfinished, shown, box)
        for y in range(top, bottom):
            for x in range(left, right):
                i = (y - top) * STRIDE + x - left
                t = abs(state[5 * PLANE + i])
                for channel in range(3):
                    rgb[k, y, x, channel] = state[channel * PLANE + i] + t * background[channel]
                alpha[k, y, x, 0] = ONE - t
                depth[k, y, x, 0] = state[3 * PLANE + i] / max(ONE - t, SMALLEST_ALPHA)
                transmittance[k, y, x], last[k, y, x] = t, state[4 * PLANE + i]


@inlined(fastmath=FAST_MATH)
def _find_unfinished(state, unfinished):
    """Finds the blocks of LANES pixels that have a pixel which is not finished."""
    for block in range(PLANE // LANES):
        most = -ONE
        for lane in range(LANES):
            most = max(most, state[5 * PLANE + block * LANES + lane])
        unfinished[block] = most > ZERO


@inlined(fastmath=FAST_MATH)
def _blend(records, m, number, state, unfinished, shown, box):
    """Blends a splat into its tile, and returns whether it shows. `shown` is working memory."""
    left, top = box[:2]
    mean_x, mean_y, opacity = records[m, 0], records[m, 1], records[m, 5]
    conic_xx, conic_xy, conic_yy = records[m, 2], records[m, 3], records[m, 4]
    red, green, blue, depth = records[m, 6], records[m, 7], records[m, 8], records[m, 9]
    x0, x1, y0, y1 = _splat_place(records, m, box)
    shown[:] = ZERO
    for y in range(y0, y1):
        dy = mean_y - (np.float32(y) + HALF)
        a, b, c = -HALF * conic_xx, -conic_xy * dy, -HALF * conic_yy * dy * dy
        for x in range(x0, x1, LANES):
            first = (y - top) * STRIDE + x - left
            if not (unfinished[first // LANES] or unfinished[first // LANES + 1]):
                continue
            dx0, run = mean_x - (np.float32(x) + HALF), np.uint64(first)
            for lane in range(LANES):
                i, dx = run + np.uint64(lane), dx0 - np.float32(lane)
                exponent = (a * dx + b) * dx + c
                alpha = min(ALPHA_MAX, opacity * _exp(exponent))
                t = state[P5 + i]
                counts = (t > ZERO) & (exponent <= ZERO) & (alpha >= ALPHA_MIN)
                alpha = alpha if counts else ZERO
                after = t - alpha * t
                finished = (t > ZERO) & (after <= TRANSMITTANCE_MIN)
                weight = ZERO if finished else alpha * t
                state[i] += weight * red
                state[P1 + i] += weight * green
                state[P2 + i] += weight * blue
                state[P3 + i] += weight * depth
                state[P4 + i] = number if weight > ZERO else state[P4 + i]
                state[P5 + i] = -t if finished else after
                shown[lane] += weight
    return shown.sum() > ZERO


@kernel(fastmath=FAST_MATH)
def _backward(
    begin, end, records, begins, background, depth, transmittance, last, reached,
    v_rgb, v_alpha, v_depth, rows,
):  # fmt: skip
    """Fills `rows` [M,10] with the gradients by the first ten entries of the records."""
    height, width = v_rgb.shape[1:3]
    for tile in range(begin, end):
        k, box = _tile_place(tile, width, height)
        left, top, right, bottom = box
        # Planes: gradients by red, green, blue and blended depth; the last splat; the transmittance in front
        # of the current splat; what lies behind it, multiplied by the gradients and summed.
        state, sums = np.zeros(7 * PLANE, np.float32), np.empty(7 * LANES, np.float32)
        for y in range(top, bottom):
            for x in range(left, right):
                i = (y - top) * STRIDE + x - left
                t = transmittance[k, y, x]
                behind = -v_alpha[k, y, x, 0]
                for channel in range(3):
                    state[channel * PLANE + i] = v_rgb[k, y, x, channel]
                    behind += v_rgb[k, y, x, channel] * background[channel]
                if ONE - t > SMALLEST_ALPHA:
                    state[3 * PLANE + i] = v_depth[k, y, x, 0] / (ONE - t)
                    behind += state[3 * PLANE + i] * depth[k, y, x, 0]
                state[4 * PLANE + i], state[5 * PLANE + i] = last[k, y, x], t
                state[6 * PLANE + i] = t * behind
        for m in range(begins[tile + 1] - 1, begins[tile] - 1, -1):
            if reached[m]:
                _unblend(records, m, np.float32(m - begins[tile] + 1), state, sums, box, rows)


@inlined(fastmath=FAST_MATH)
def _unblend(records, m, number, state, sums, box, rows):
    """Removes a splat from its tile again, and writes the gradients by it.

    `sums` is working memory for each lane: the gradient by sigma times 1, dy and dy^2, and the gradients by
    red, green, blue and depth.
    """
    left, top = box[:2]
    mean_x, mean_y, opacity = records[m, 0], records[m, 1], records[m, 5]
    conic_xx, conic_xy, conic_yy = records[m, 2], records[m, 3], records[m, 4]
    red, green, blue, depth = records[m, 6], records[m, 7], records[m, 8], records[m, 9]
    x0, x1, y0, y1 = _splat_place(records, m, box)
    rows[m] = ZERO
    for x in range(x0, x1, LANES):
        dx0 = mean_x - (np.float32(x) + HALF)
        sums[:] = ZERO
        for y in range(y0, y1):
            dy = mean_y - (np.float32(y) + HALF)
            a, b, c = -HALF * conic_xx, -conic_xy * dy, -HALF * conic_yy * dy * dy
            run = np.uint64((y - top) * STRIDE + x - left)
            for lane in range(LANES):
                i, dx = run + np.uint64(lane), dx0 - np.float32(lane)
                exponent = (a * dx + b) * dx + c
                faded = opacity * _exp(exponent)
                counts = (number <= state[P4 + i]) & (exponent <= ZERO) & (faded >= ALPHA_MIN)
                alpha = min(ALPHA_MAX, faded) if counts else ZERO
                ratio = ONE / (ONE - alpha)
                t = state[P5 + i] * ratio
                weight = alpha * t
                v_red, v_green, v_blue, v_depth = state[i], state[P1 + i], state[P2 + i], state[P3 + i]
                shade = v_red * red + v_green * green + v_blue * blue + v_depth * depth
                v_sigma = ZERO if faded > ALPHA_MAX else -alpha * (t * shade - state[P6 + i] * ratio)
                state[P5 + i] = t
                state[P6 + i] += weight * shade
                sums[lane] += v_sigma
                sums[LANES + lane] += v_sigma * dy
                sums[2 * LANES + lane] += v_sigma * dy * dy
                sums[3 * LANES + lane] += weight * v_red
                sums[4 * LANES + lane] += weight * v_green
                sums[5 * LANES + lane] += weight * v_blue
                sums[6 * LANES + lane] += weight * v_depth
        _add_run(records, m, dx0, sums, rows)


@inlined(fastmath=FAST_MATH)
def _add_run(records, m, dx0, sums, rows):
    """Adds a column of runs to the gradients by a splat, where sigma = (xx dx^2 + yy dy^2) / 2 + xy dx dy."""
    total = x = y = xx = xy = yy = red = green = blue = depth = ZERO
    for lane in range(LANES):
        dx = dx0 - np.float32(lane)
        total += sums[lane]
        x += sums[lane] * dx
        xx += sums[lane] * dx * dx
        y += sums[LANES + lane]
        xy += sums[LANES + lane] * dx
        yy += sums[2 * LANES + lane]
        red += sums[3 * LANES + lane]
        green += sums[4 * LANES + lane]
        blue += sums[5 * LANES + lane]
        depth += sums[6 * LANES + lane]
    rows[m, 0] += records[m, 2] * x + records[m, 3] * y
    rows[m, 1] += records[m, 3] * x + records[m, 4] * y
    rows[m, 2] += HALF * xx
    rows[m, 3] += xy
    rows[m, 4] += HALF * yy
    rows[m, 5] -= total / records[m, 5]
    rows[m, 6] += red
    rows[m, 7] += green
    rows[m, 8] += blue
    rows[m, 9] += depth


@kernel()
def _sum_rows(
    begin, end, rows, owners, begins, reached, v_means2d, v_conics, v_depths, v_opacities, v_colors
):
    """Adds up the rows of each Gaussian within a view, in the order of the tiles."""
    views = len(v_means2d)
    tiles = (len(begins) - 1) // max(views, 1)
    for k in range(begin, end):
        for m in range(begins[k * tiles], begins[(k + 1) * tiles]):
            if reached[m]:
                n = owners[m]
                v_means2d[k, n, 0] += rows[m, 0]
                v_means2d[k, n, 1] += rows[m, 1]
                for j in range(3):
                    v_conics[k, n, j] += rows[m, 2 + j]
                    v_colors[k, n, j] += rows[m, 6 + j]
                v_opacities[k, n] += rows[m, 5]
                v_depths[k, n] += rows[m, 9]
