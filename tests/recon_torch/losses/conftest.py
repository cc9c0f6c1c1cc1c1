"""Pairs of images that losses compare."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def image_pair() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function of the images' side, the number of views and the dtype."""

    def make(side: int, num_views: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Smooth random images and disturbed copies: [K,H,W,3] in [0, 1], the first with gradient."""
        generator = torch.Generator().manual_seed(side)
        coarse = torch.rand(num_views, 3, 5, 5, generator=generator, dtype=dtype)
        targets = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").permute(0, 2, 3, 1)
        noise = 0.2 * torch.randn(num_views, side, side, 3, generator=generator, dtype=dtype)
        return (targets + noise).clamp(0, 1).requires_grad_(), targets.contiguous()

    return make


@pytest.fixture(scope="session")
def gradient() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of values and the images that they were computed from: the gradient of the values' sum."""
    return lambda values, images: torch.autograd.grad(values.sum(), images)[0]
