"""Scenes of different sizes in one call of gsplat: each as it is alone, forward and backward."""

import pytest
import torch

from recon_torch.raster import CameraTensors, Render, gsplat_engine, gsplat_kernels
from recon_torch.raster.gaussians import Activated, Gaussians
from recon_torch.raster.reference import composite, project
from recon_torch.raster.render import render, render_together
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras, orbit

COUNTS, WIDTH, HEIGHT = (7, 40, 23), 30, 24
BACKGROUND = torch.tensor([0.2, 0.5, 0.9])


def scene(count: int, device: str = "cpu") -> Gaussians:
    generator = torch.Generator().manual_seed(count)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = (0.2 * draw(count, 3), draw(count, 4), draw(count, 3) / 2 - 3, draw(count), draw(count, 3))
    return Gaussians(*(tensor.to(device).requires_grad_() for tensor in tensors))


def cameras(index: int) -> Cameras:
    """Two cameras for each scene, different ones for each."""
    square = orbit(2, 0.2 * index, HEIGHT)
    return Cameras(square.w2c, square.intrinsics_px, WIDTH, HEIGHT)


def loss_of(rendered: Render, index: int) -> torch.Tensor:
    """A random linear function of the images."""
    generator = torch.Generator().manual_seed(index)
    weights = [torch.randn(image.shape, generator=generator).to(image) for image in rendered[:3]]
    return sum((image * weight).sum() for image, weight in zip(rendered[:3], weights, strict=True))


def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
    """Computes what gsplat does for a batch by the reference, and checks what gsplat asserts of a batch."""
    assert not options["packed"] and options["render_mode"] == "RGB+ED"
    assert means.shape[:2] == opacities.shape and options["backgrounds"].shape == (*viewmats.shape[:2], 3)
    scenes = list(map(Activated, means, quats, scales, opacities, colors))
    rigs = [CameraTensors(*each, width, height) for each in zip(viewmats, Ks, strict=True)]
    projections = list(map(project, scenes, rigs))
    means2d = torch.stack([projection.means2d for projection in projections])
    images = [
        composite(projection._replace(means2d=means2d[b]), scenes[b], rigs[b], BACKGROUND)
        for b, projection in enumerate(projections)
    ]
    rgb, alpha, depth = map(torch.stack, zip(*images, strict=True))
    radii = torch.stack([projection.radii for projection in projections])
    return torch.cat([rgb, depth], -1), alpha, {"means2d": means2d, "radii": radii}


def assert_each_is_as_alone(render_all, device: str, engine: Engine) -> None:
    """render_all: a function of scenes and cameras."""
    scenes, alone = ([scene(count, device) for count in COUNTS] for _ in range(2))
    rigs = [cameras(index) for index in range(len(COUNTS))]
    renders = render_all(scenes, rigs)
    expected = [
        render(each, rig, background=BACKGROUND, engine=engine) for each, rig in zip(alone, rigs, strict=True)
    ]
    for each in (renders, expected):
        for rendered in each:
            rendered.info["means2d"].retain_grad()
        sum(loss_of(rendered, index) for index, rendered in enumerate(each)).backward()
    for index in range(len(COUNTS)):
        for image, expected_image in zip(renders[index][:3], expected[index][:3], strict=True):
            torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=1e-5)
        info, expected_info = renders[index].info, expected[index].info
        assert torch.equal(info["radii"], expected_info["radii"])
        ours, theirs = [*scenes[index], info["means2d"]], [*alone[index], expected_info["means2d"]]
        for tensor, expected_tensor in zip(ours, theirs, strict=True):
            assert tensor.grad.abs().max() > 0
            torch.testing.assert_close(tensor.grad, expected_tensor.grad, atol=1e-4, rtol=1e-4)


def test_each_scene_of_a_batch_renders_as_it_does_alone(monkeypatch):
    monkeypatch.setattr(gsplat_kernels, "load", lambda: rasterization)

    def render_all(scenes, rigs):
        tensors = [CameraTensors.of(rig, BACKGROUND) for rig in rigs]
        return gsplat_engine.rasterize_together([each.activated() for each in scenes], tensors, BACKGROUND)

    assert_each_is_as_alone(render_all, "cpu", Engine.TORCH)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_scene_of_a_batch_renders_as_it_does_alone_on_a_gpu():
    def render_all(scenes, rigs):
        return render_together(scenes, rigs, background=BACKGROUND, engine=Engine.GSPLAT)

    assert_each_is_as_alone(render_all, "cuda", Engine.GSPLAT)
