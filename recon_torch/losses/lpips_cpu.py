"""A stage of LPIPS (Zhang et al. 2018) on the CPU: distance and gradient in one pass over the features.

As torch operations a stage takes a dozen passes over arrays that are larger than a core's cache, which is a
quarter of the time of a fit. This kernel normalises, weights, compares and differentiates the channels of a
pixel while they are in cache.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.kernel import FAST_MATH, arrays, kernel, run

ZERO, ONE = np.float32(0), np.float32(1)
GRAIN = 256  # least pixels for a thread


def stage_distance(
    activation: Float[Tensor, "K C h w"], target: Float[Tensor, "K C h w"], root_weight: Float[Tensor, " C"]
) -> Float[Tensor, " K"]:
    """Mean over the pixels of |root_weight * activation / |activation| - target|^2, in float32.

    Differentiable by `activation`, with a gradient of 0 in pixels where all channels are 0. It is fastest for
    tensors in the memory format channels_last.
    """
    return _StageDistance.apply(activation, target, root_weight)


class _StageDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, target, root_weight):
        activation, target = (tensor.permute(0, 2, 3, 1).contiguous() for tensor in (activation, target))
        gradient, distances = torch.empty_like(activation), torch.empty(activation.shape[:3])
        pixels = arrays(*(tensor.flatten(0, 2) for tensor in (activation, target, gradient)))
        run(_compare, distances.numel(), *pixels, *arrays(root_weight, distances.flatten()), grain=GRAIN)
        ctx.save_for_backward(gradient)
        return distances.mean((1, 2))

    @staticmethod
    def backward(ctx, v_distance):
        (gradient,) = ctx.saved_tensors
        num_pixels = gradient.shape[1] * gradient.shape[2]
        scaled = gradient * (v_distance * (2 / num_pixels)).view(-1, 1, 1, 1)
        return scaled.permute(0, 3, 1, 2), None, None


@kernel(fastmath=FAST_MATH)
def _compare(begin, end, activations, targets, gradients, root_weight, distances):
    """Squared distances of pixels [begin, end), and half of their gradients by the activations."""
    channels = activations.shape[1]
    for p in range(begin, end):
        square = ZERO
        for c in range(channels):
            square += activations[p, c] * activations[p, c]
        inverse = ONE / np.sqrt(square) if square > ZERO else ZERO
        distance = radial = ZERO
        for c in range(channels):
            unit = activations[p, c] * inverse
            difference = unit * root_weight[c] - targets[p, c]
            distance += difference * difference
            radial += difference * root_weight[c] * unit
        distances[p] = distance
        for c in range(channels):
            unit = activations[p, c] * inverse
            difference = unit * root_weight[c] - targets[p, c]
            gradients[p, c] = (difference * root_weight[c] - radial * unit) * inverse
