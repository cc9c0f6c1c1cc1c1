"""How much is seen of Gaussians, compared with integrals of Gaussians."""

import math

import pytest
import torch

from recon_torch.raster import LOW_PASS_PX2
from recon_torch.raster.gaussians import Gaussians
from recon_torch.scene.visibility import seen_px
from recon_torch.views.cameras import orbit

SIZE, SCALE, OPACITY = 64, 0.05, 0.9


def spheres(means: list[list[float]]) -> Gaussians:
    num = len(means)
    return Gaussians(
        means=torch.tensor(means),
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(num, 1),
        log_scales=torch.full((num, 3), math.log(SCALE)),
        opacity_logits=torch.logit(torch.full((num,), OPACITY)),
        sh0=torch.zeros(num, 3),
    )


def variance_px2(depth: float) -> float:
    return (SCALE * orbit(1, 0.0, SIZE).intrinsics_px[0, 0, 0].item() / depth) ** 2 + LOW_PASS_PX2


def test_a_lone_gaussian_fills_its_integral():
    found = seen_px(spheres([[0.0, 0.0, 0.0]]), orbit(4, 0.3, SIZE))
    assert found.tolist() == [pytest.approx(2 * math.pi * OPACITY * variance_px2(2.0), rel=0.02)]


def test_a_hidden_gaussian_counts_by_the_light_that_reaches_it():
    """Two in line with the camera: of the far one, its alpha times 1 - alpha of the near one."""
    near, far = variance_px2(1.7), variance_px2(2.3)
    both = OPACITY * near * far / (near + far)
    expected = [2 * math.pi * OPACITY * near, 2 * math.pi * OPACITY * (far - both)]
    found = seen_px(spheres([[0.3, 0.0, 0.0], [-0.3, 0.0, 0.0]]), orbit(1, 0.0, SIZE))
    assert found.tolist() == pytest.approx(expected, rel=0.03)


def test_it_works_without_grad_mode_and_leaves_no_gradients():
    gaussians = spheres([[0.0, 0.0, 0.0]])
    gaussians.means.requires_grad_()
    with torch.no_grad():
        assert seen_px(gaussians, orbit(1, 0.0, SIZE)) > 0
    assert gaussians.means.grad is None
