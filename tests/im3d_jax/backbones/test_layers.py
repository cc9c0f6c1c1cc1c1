"""Layers that the UNets share, against PyTorch in float64."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

from im3d_jax.backbones import layers

FRAMES = (2, 3, 4, 5, 12)


class Normalised(nn.Module):
    over_frames: bool

    @nn.compact
    def __call__(self, x):
        return layers.group_norm(x, 8, 1e-5, "norm", self.over_frames)  # of 12 channels: 4 groups of 3


def reference(x, scale, bias, over_frames):
    """PyTorch normalises [N, C, ...] over all that follows C."""
    frames = x.movedim(-1, 1) if over_frames else x.flatten(0, 1).movedim(-1, 1)
    made = torch.nn.functional.group_norm(frames, 4, scale, bias, eps=1e-5).movedim(1, -1)
    return made if over_frames else made.unflatten(0, x.shape[:2])


@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_and_its_gradients(over_frames, mean):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal(FRAMES).astype(np.float32) for _ in range(2))
    x = np.float32(x + mean)
    scale, bias = (rng.standard_normal(12).astype(np.float32) for _ in range(2))
    net = Normalised(over_frames)
    made, backward = jax.vjp(net.apply, {"params": {"norm": {"scale": scale, "bias": bias}}}, x)
    gradients, of_x = backward(cotangent)
    ours = [made, of_x, gradients["params"]["norm"]["scale"], gradients["params"]["norm"]["bias"]]

    inputs = [torch.from_numpy(each).double().requires_grad_() for each in (x, scale, bias)]
    expected = reference(*inputs, over_frames)
    theirs = torch.autograd.grad(expected, inputs, torch.from_numpy(cotangent).double())
    for mine, other in zip(ours, [expected.detach(), *theirs], strict=True):
        # Positions of 300 have 5 digits after the point that float32 does not hold.
        np.testing.assert_allclose(mine, other, rtol=0, atol=3e-5 if mean == 0 else 3e-3)
