"""The reference against gsplat's PyTorch projection, a per-pixel loop in NumPy, and finite differences."""

import numpy as np
import pytest
import torch
from gsplat.cuda import _torch_impl as gsplat_reference

from recon_torch.raster import LOW_PASS_PX2, CameraTensors
from recon_torch.raster.gaussians import Activated
from recon_torch.raster.reference import project
from recon_torch.raster.render import render
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras, orbit

WIDTH, HEIGHT = 21, 34


def scene(count: int, seed: int = 0) -> Activated:
    generator = torch.Generator().manual_seed(seed)
    draws = {"means": 3, "quats": 4, "scales": 3, "opacities": 1, "colors": 3}
    tensors = {name: torch.rand(count, n, generator=generator).double() for name, n in draws.items()}
    tensors["means"] = tensors["means"] * 1.2 - 0.6
    tensors["quats"] = tensors["quats"] * 4 - 2
    tensors["scales"] = 0.01 + tensors["scales"] * 0.15
    tensors["opacities"] = tensors["opacities"][:, 0]
    return Activated(**{name: tensor.requires_grad_() for name, tensor in tensors.items()})


def cameras(views: int = 2, width: int = WIDTH, height: int = HEIGHT) -> Cameras:
    """Unequal focal lengths, a principal point off the centre, and so close that Gaussians fall outside."""
    rig = orbit(views, 0.4, 32, radius=0.8)
    intrinsics_px = rig.intrinsics_px.astype(np.float64)
    intrinsics_px[:, 0] *= 0.9
    intrinsics_px[:, 0, 2], intrinsics_px[:, 1, 2] = 8.0, 19.5
    return Cameras(rig.w2c, intrinsics_px, width, height)


@pytest.mark.parametrize("low_pass_px2", [LOW_PASS_PX2, 0.075])
def test_projection_equals_gsplats_forward_and_backward(low_pass_px2):
    gaussians = scene(200)._replace(opacities=torch.ones(200, dtype=torch.float64))
    means, quats, scales, *_ = gaussians
    rig = CameraTensors.of(cameras(), means, low_pass_px2)
    ours = project(gaussians, rig)
    # gsplat's own tests compare its kernels with these functions, which it does not export.
    covariances, _ = gsplat_reference._quat_scale_to_covar_preci(quats, scales, compute_preci=False)  # noqa: SLF001
    radii, *theirs, _ = gsplat_reference._fully_fused_projection(means, covariances, *rig)  # noqa: SLF001

    seen = (ours.radii > 0).all(-1)
    assert 50 < seen.sum() < 390
    # Its radii are 3.33 sigmas; in gsplat's CUDA kernel and here they end where alpha falls under 1/255.
    assert (radii - ours.radii)[seen].abs().max() <= 1
    assert ((radii > 0).all(-1) == seen).float().mean() > 0.99
    weights = [torch.randn(tensor[seen].shape, dtype=torch.float64) for tensor in theirs]
    for our, their in zip((ours.means2d, ours.depths, ours.conics), theirs, strict=True):
        torch.testing.assert_close(our[seen], their[seen], rtol=1e-9, atol=1e-9)

    def gradients(outputs):
        loss = sum((output[seen] * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, (means, quats, scales), retain_graph=True)

    for our, their in zip(
        gradients((ours.means2d, ours.depths, ours.conics)), gradients(theirs), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-7, atol=1e-7)


def test_radii_end_where_alpha_falls_under_its_threshold():
    intrinsics_px = torch.tensor([[[50.0, 0.0, 100.0], [0.0, 50.0, 100.0], [0.0, 0.0, 1.0]]]).double()
    rig = CameraTensors(torch.eye(4)[None].double(), intrinsics_px, 200, 200)
    opacities = torch.tensor([1 / 256, 0.02, 0.3, 1.0], dtype=torch.float64)
    gaussians = Activated(
        means=torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64).expand(4, 3),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(4, 4),
        scales=torch.tensor([[0.4, 0.2, 0.1]], dtype=torch.float64).expand(4, 3),
        opacities=opacities,
        colors=torch.zeros(4, 3, dtype=torch.float64),
    )
    projection = project(gaussians, rig)
    sigma_px = np.sqrt(np.array([25 * 0.4, 25 * 0.2]) ** 2 + 0.3)
    sigmas = np.sqrt(2 * np.log(np.maximum(opacities.numpy() * 255, 1)))
    np.testing.assert_allclose(projection.extents_px[0].numpy(), sigmas[:, None] * sigma_px, rtol=1e-12)
    np.testing.assert_array_equal(projection.radii[0].numpy(), np.ceil(sigmas[:, None] * sigma_px))


def blend_pixel(x, y, splats, background):
    """Front-to-back blending as 3DGS states it, one pixel and one splat at a time."""
    colour, depth, transmittance = np.zeros(3), 0.0, 1.0
    for (mean_x, mean_y), (xx, xy, yy), z, opacity, splat_colour in splats:
        dx, dy = mean_x - x - 0.5, mean_y - y - 0.5
        sigma = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
        alpha = min(0.999, opacity * np.exp(-sigma))
        if sigma < 0 or alpha < 1 / 255:
            continue
        if transmittance * (1 - alpha) <= 1e-4:
            break
        colour += transmittance * alpha * splat_colour
        depth += transmittance * alpha * z
        transmittance *= 1 - alpha
    alpha = 1 - transmittance
    return colour + transmittance * background, alpha, depth / alpha if alpha else 0.0


@pytest.mark.parametrize("opacity", [None, 1.0])  # 1.0: thick enough to finish pixels early
def test_images_equal_a_loop_over_pixels(opacity):
    gaussians, rig = scene(60), cameras()
    if opacity is not None:
        gaussians = gaussians._replace(opacities=torch.full_like(gaussians.opacities, opacity))
    background = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    rendered = render(gaussians, rig, background=background, engine=Engine.TORCH)
    projection = project(gaussians, CameraTensors.of(rig, gaussians.means))
    opacities, colours = gaussians.opacities.detach().numpy(), gaussians.colors.detach().numpy()
    finished = 0
    for k in range(2):
        means2d, conics, depths, _, radii = (tensor[k].detach().numpy() for tensor in projection)
        order = [n for n in np.argsort(depths, kind="stable") if radii[n].min() > 0]
        splats = [(means2d[n], conics[n], depths[n], opacities[n], colours[n]) for n in order]
        for y in range(HEIGHT):
            for x in range(WIDTH):
                rgb, alpha, depth = blend_pixel(x, y, splats, background.numpy())
                finished += alpha > 0.999
                np.testing.assert_allclose(rendered.rgb[k, y, x].detach(), rgb, atol=1e-12)
                np.testing.assert_allclose(rendered.alpha[k, y, x].item(), alpha, atol=1e-12)
                np.testing.assert_allclose(rendered.depth[k, y, x].item(), depth, atol=1e-10)
    assert opacity is None or finished > 20


def test_gradients_equal_finite_differences():
    gaussians, rig = scene(5, seed=3), cameras(width=9, height=12)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(2, 12, 9, n, generator=generator, dtype=torch.float64) for n in (3, 1, 1)]

    def loss(*tensors):
        images = render(Activated(*tensors), rig, engine=Engine.TORCH)[:3]
        return sum((image * weight).sum() for image, weight in zip(images, weights, strict=True))

    assert torch.autograd.gradcheck(loss, tuple(gaussians), eps=1e-7, atol=1e-5, rtol=1e-5)
