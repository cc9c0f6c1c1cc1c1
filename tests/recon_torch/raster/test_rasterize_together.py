"""Scenes of different sizes in one call of gsplat: each as it is alone, forward and backward."""

import pytest
import torch

from recon_torch.raster import gsplat_kernels
from recon_torch.raster import rasterize as rasterize_module
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.rasterize import rasterize, rasterize_together
from recon_torch.raster.reference import composite, project
from recon_torch.views.cameras import orbit

COUNTS, WIDTH, HEIGHT = (7, 40, 23), 30, 24
BACKGROUND = torch.tensor([0.2, 0.5, 0.9])


def scene(count: int, device: str = "cpu") -> Gaussians:
    generator = torch.Generator().manual_seed(count)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = (0.2 * draw(count, 3), draw(count, 4), draw(count, 3) / 2 - 3, draw(count), draw(count, 3))
    return Gaussians(*(tensor.to(device).requires_grad_() for tensor in tensors))


def cameras(index: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Two for each scene, other ones each time."""
    around = orbit(2, 0.2 * index, HEIGHT)
    return torch.from_numpy(around.w2c).to(device), torch.from_numpy(around.intrinsics_px).to(device)


def loss_of(render, index: int) -> torch.Tensor:
    """Random and linear."""
    generator = torch.Generator().manual_seed(index)
    weights = [torch.randn(image.shape, generator=generator).to(image) for image in render[:3]]
    return sum((image * weight).sum() for image, weight in zip(render[:3], weights, strict=True))


def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
    """What gsplat computes for a batch, by the reference twin. Checks what gsplat asserts of a batch."""
    assert not options["packed"] and options["render_mode"] == "RGB+ED"
    assert means.shape[:2] == opacities.shape and options["backgrounds"].shape == (*viewmats.shape[:2], 3)
    scenes = list(zip(means, quats, scales, opacities, viewmats, Ks, strict=True))
    projections = [project(*each, width, height) for each in scenes]
    means2d = torch.stack([projection.means2d for projection in projections])
    images = [
        composite(projection._replace(means2d=means2d[b]), opacities[b], colors[b], BACKGROUND, width, height)
        for b, projection in enumerate(projections)
    ]
    rgb, alpha, depth = map(torch.stack, zip(*images, strict=True))
    radii = torch.stack([projection.radii for projection in projections])
    return torch.cat([rgb, depth], -1), alpha, {"means2d": means2d, "radii": radii}


def assert_each_is_as_alone(device: str, engine: str) -> None:
    background = BACKGROUND.to(device)
    scenes, alone = ([scene(count, device) for count in COUNTS] for _ in range(2))
    poses, lenses = zip(*(cameras(index, device) for index in range(len(COUNTS))), strict=True)
    renders = rasterize_together(scenes, poses, lenses, WIDTH, HEIGHT, background=background, engine="gsplat")
    expected = [
        rasterize(*fields_of(each), pose, lens, WIDTH, HEIGHT, background=background, engine=engine)
        for each, pose, lens in zip(alone, poses, lenses, strict=True)
    ]
    for each in (renders, expected):
        for render in each:
            render.info["means2d"].retain_grad()
        sum(loss_of(render, index) for index, render in enumerate(each)).backward()
    for index in range(len(COUNTS)):
        for image, expected_image in zip(renders[index][:3], expected[index][:3], strict=True):
            torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=1e-5)
        info, expected_info = renders[index].info, expected[index].info
        assert torch.equal(info["radii"], expected_info["radii"])
        ours, theirs = [*scenes[index], info["means2d"]], [*alone[index], expected_info["means2d"]]
        for tensor, expected_tensor in zip(ours, theirs, strict=True):
            assert tensor.grad.abs().max() > 0
            torch.testing.assert_close(tensor.grad, expected_tensor.grad, atol=1e-4, rtol=1e-4)


def fields_of(gaussians: Gaussians) -> tuple[torch.Tensor, ...]:
    return gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.colors


def test_each_scene_of_a_batch_is_as_alone(monkeypatch):
    monkeypatch.setattr(gsplat_kernels, "load", lambda: rasterization)
    choose = rasterize_module._choose_engine

    def allow_gsplat(engine, device):
        return engine if engine == "gsplat" else choose(engine, device)

    monkeypatch.setattr(rasterize_module, "_choose_engine", allow_gsplat)
    assert_each_is_as_alone("cpu", "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_scene_of_a_batch_is_as_alone_on_a_gpu():
    assert_each_is_as_alone("cuda", "gsplat")
