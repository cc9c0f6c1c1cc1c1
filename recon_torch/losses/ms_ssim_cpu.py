"""MS-SSIM (Wang et al. 2003) and its gradient on the CPU in one kernel; `ssim` has the same in torch.

As torch operations the scales of one view are some 300 calls on small arrays. Here one task takes a channel
of a view through all scales, and blurs, compares and differentiates a row of windows while it is in cache.

SSIM depends on the means of x, x^2 and x y in each window. Its gradient by the image is therefore its
gradient by these means, blurred by the transposed window and multiplied by 1, 2 x and y.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.kernel import FAST_MATH, arrays, inlined, kernel, run

ZERO, ONE, TWO, QUARTER = np.float32(0), np.float32(1), np.float32(2), np.float32(0.25)


def ms_ssim(
    images: Float[Tensor, "K H W C"],
    targets: Float[Tensor, "K H W C"],
    window: Float[Tensor, " w"],
    weights: Float[Tensor, " scales"],
    constants: Float[Tensor, "3"],
) -> Float[Tensor, " K"]:
    """MS-SSIM: the product over the scales of similarity ** weight, as a mean over the channels.

    It is differentiable by `images`.

    Args:
        images, targets: float32 like all other arguments.
        window: weights of the pixels in a window, which must fit into every scale.
        weights: of the scales, finest first.
        constants: SSIM's C1 and C2, and the least value that the similarity of a scale counts as.
    """
    return _MsSsim.apply(images, targets, window, weights, constants)


class _MsSsim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, targets, *parameters):
        values, gradients = torch.empty(len(images), images.shape[3]), torch.empty(images.shape)
        run(_channels, values.numel(), *arrays(images, targets, *parameters, values, gradients))
        ctx.save_for_backward(gradients)
        return values.mean(1)

    @staticmethod
    def backward(ctx, v_values):
        (gradients,) = ctx.saved_tensors
        return gradients * (v_values / gradients.shape[3]).view(-1, 1, 1, 1), *[None] * 4


@kernel(fastmath=FAST_MATH)
def _channels(begin, end, images, targets, window, weights, constants, values, gradients):
    """MS-SSIM of channels [begin, end) of all views' channels, and its gradients by the images."""
    height, width, channels = images.shape[1:]
    for task in range(begin, end):
        k, c = task // channels, task % channels
        x, y = images[k, :, :, c].copy(), targets[k, :, :, c].copy()
        slopes = np.empty((len(weights), height, width), np.float32)  # gradient of log MS-SSIM by scale
        value = ONE
        for scale in range(len(weights)):
            slope = slopes[scale, : x.shape[0], : x.shape[1]]
            similarity = _similarity(x, y, window, scale == len(weights) - 1, constants, slope)
            value *= max(similarity, constants[2]) ** weights[scale]
            slope *= weights[scale] / similarity if similarity > constants[2] else ZERO
            x, y = _halved(x), _halved(y)
        values[k, c] = value
        for scale in range(len(weights) - 1, 0, -1):
            _add_doubled(slopes[scale], slopes[scale - 1], height >> scale, width >> scale)
        for i in range(height):
            for j in range(width):
                gradients[k, i, j, c] = value * slopes[0, i, j]


@inlined()
def _halved(image):
    """Means of 2x2 pixels, without a last row or column that is odd."""
    half = np.empty((image.shape[0] // 2, image.shape[1] // 2), np.float32)
    for i in range(half.shape[0]):
        for j in range(half.shape[1]):
            upper = image[2 * i, 2 * j] + image[2 * i, 2 * j + 1]
            half[i, j] = QUARTER * (upper + image[2 * i + 1, 2 * j] + image[2 * i + 1, 2 * j + 1])
    return half


@inlined()
def _add_doubled(half, image, height, width):
    """The transpose of `_halved`, for the first [height, width] entries of `half`."""
    for i in range(2 * height):
        for j in range(2 * width):
            image[i, j] += QUARTER * half[i // 2, j // 2]


@inlined(fastmath=FAST_MATH)
def _similarity(x, y, window, with_luminance, constants, slope):
    """Mean of SSIM, or of its contrast-structure part, over the windows; `slope` gets the gradient by x."""
    height, width = x.shape[0] - len(window) + 1, x.shape[1] - len(window) + 1
    columns, means = np.empty((5, x.shape[1]), np.float32), np.empty((5, width), np.float32)
    spread, by_means = np.empty((3, x.shape[1]), np.float32), np.zeros((3, *x.shape), np.float32)
    total = ZERO
    for i in range(height):
        _blur_columns(x, y, i, window, columns)
        _blur_row(columns, window, means)
        total += _compare(means, with_luminance, constants)  # puts gradients in place of three of the means
        _spread_row(means, window, spread)
        for t in range(len(window)):
            for moment in range(3):
                for j in range(x.shape[1]):
                    by_means[moment, i + t, j] += window[t] * spread[moment, j]
    share = ONE / np.float32(height * width)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            by_product = TWO * x[i, j] * by_means[1, i, j] + y[i, j] * by_means[2, i, j]
            slope[i, j] = share * (by_means[0, i, j] + by_product)
    return total * share


@inlined(fastmath=FAST_MATH)
def _blur_columns(x, y, i, window, columns):
    """Weighted sums of x, xx, xy, y and yy over the rows of the row of windows that begins at row i."""
    columns[:] = ZERO
    for t in range(len(window)):
        for j in range(x.shape[1]):
            a, b = window[t] * x[i + t, j], window[t] * y[i + t, j]
            columns[0, j] += a
            columns[1, j] += a * x[i + t, j]
            columns[2, j] += a * y[i + t, j]
            columns[3, j] += b
            columns[4, j] += b * y[i + t, j]


@inlined(fastmath=FAST_MATH)
def _blur_row(columns, window, means):
    means[:] = ZERO
    for moment in range(5):
        for t in range(len(window)):
            for j in range(means.shape[1]):
                means[moment, j] += window[t] * columns[moment, j + t]


@inlined(fastmath=FAST_MATH)
def _spread_row(means, window, spread):
    """The transpose of `_blur_row`, for the moments of x."""
    spread[:] = ZERO
    for moment in range(3):
        for t in range(len(window)):
            for j in range(means.shape[1]):
                spread[moment, j + t] += window[t] * means[moment, j]


@inlined(fastmath=FAST_MATH)
def _compare(means, with_luminance, constants):
    """Sum of SSIM over a row of windows; the means of x, xx and xy are replaced by the gradients by them."""
    c1, c2 = constants[0], constants[1]
    total = ZERO
    for j in range(means.shape[1]):
        x, xx, xy, y, yy = means[0, j], means[1, j], means[2, j], means[3, j], means[4, j]
        inverse = ONE / (xx + yy - x * x - y * y + c2)
        contrast = (TWO * (xy - x * y) + c2) * inverse
        by_x, by_xx, by_xy = TWO * (x * contrast - y) * inverse, -contrast * inverse, TWO * inverse
        if with_luminance:
            inverse = ONE / (x * x + y * y + c1)
            luminance = (TWO * x * y + c1) * inverse
            by_x = by_x * luminance + contrast * TWO * (y - x * luminance) * inverse
            by_xx, by_xy, contrast = by_xx * luminance, by_xy * luminance, contrast * luminance
        total += contrast
        means[0, j], means[1, j], means[2, j] = by_x, by_xx, by_xy
    return total
