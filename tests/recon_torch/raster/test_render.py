"""The CPU engine against the reference, forward and backward; repeatability; odd input; densification."""

import numpy as np
import pytest
import torch
from gsplat import DefaultStrategy

from recon_torch.errors import UserError
from recon_torch.raster import Render
from recon_torch.raster.gaussians import Activated, Gaussians
from recon_torch.raster.render import render, render_images
from recon_torch.settings import Engine
from recon_torch.views.cameras import Cameras, orbit

NAMES = (*Activated._fields, "means2d")


def scene(count, seed=0, scale=0.04, opacity=None, dtype=torch.float32, device="cpu") -> Activated:
    """Random Gaussians in a ball of radius 0.5."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    tensors = (
        directions * 0.5 * torch.rand(count, 1, generator=generator) ** (1 / 3),
        torch.randn(count, 4, generator=generator),
        torch.rand(count, 3, generator=generator) * scale + 0.002,
        torch.rand(count, generator=generator) if opacity is None else torch.full((count,), opacity),
        torch.rand(count, 3, generator=generator),
    )
    return Activated(*(tensor.to(device, dtype).requires_grad_() for tensor in tensors))


def view(views=3, width=70, height=45, radius=2.0) -> Cameras:
    square = orbit(views, 0.3, height, radius=radius)
    square.intrinsics_px[:, 0, 2] = 0.45 * width
    return Cameras(square.w2c, square.intrinsics_px, width, height)


def render_and_differentiate(engine, gaussians, cameras, with_depth=True, **options):
    """The render, and the gradients by NAMES of a random linear loss."""
    background = torch.tensor([0.2, 0.5, 0.9])
    rendered = render(gaussians, cameras, background=background, engine=engine, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(image.shape, generator=generator).to(image) for image in rendered[:3]]
    images = list(zip(rendered[:3], weights, strict=True))[: 3 if with_depth else 2]
    loss = sum((image * weight).sum() for image, weight in images)
    inputs = (*gaussians, rendered.info["means2d"])
    return rendered, dict(zip(NAMES, torch.autograd.grad(loss, inputs), strict=True))


def assert_same(ours, theirs):
    """Equal up to float32, except in a few pixels where a splat is a rounding error away from a threshold."""
    (rendered, gradients), (expected, expected_gradients) = ours, theirs
    for name in ("rgb", "alpha", "depth"):
        error = (getattr(rendered, name) - getattr(expected, name)).abs().flatten().double()
        assert error.quantile(0.999) < 3e-5, name
        assert error.max() < 0.02, name
    assert (rendered.info["radii"] != expected.info["radii"]).float().mean() < 1e-3
    for name in NAMES:
        difference = (gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert difference < 5e-4, (name, difference)


SCENES = {
    "general": (dict(count=400), dict()),
    "pixel-sized": (dict(count=400, scale=0.002), dict(width=64, height=64)),
    "larger than the image": (dict(count=40, scale=1.5, opacity=0.3), dict(views=2, width=50, height=33)),
    "opaque and deep": (dict(count=1500, opacity=1.0), dict(views=1)),
    "faint": (dict(count=400, opacity=0.01), dict()),
    "camera among them": (dict(count=400), dict(radius=0.25)),
    "wider than a tile": (dict(count=150, scale=0.15), dict(views=1, width=200, height=20)),
    "one pixel": (dict(count=50), dict(width=1, height=1)),
}


@pytest.mark.parametrize("name", SCENES)
def test_cpu_engine_equals_the_reference(name):
    gaussians, cameras = SCENES[name]
    ours = render_and_differentiate(Engine.CPU, scene(**gaussians), view(**cameras))
    theirs = render_and_differentiate(Engine.TORCH, scene(**gaussians, dtype=torch.float64), view(**cameras))
    assert ours[0].alpha.max() > 0.005
    assert_same(ours, theirs)


def test_cpu_engine_equals_the_reference_with_another_low_pass():
    ours, theirs, usual = (
        render_and_differentiate(engine, scene(400, scale=0.002, dtype=dtype), view(), **options)
        for engine, dtype, options in (
            (Engine.CPU, torch.float32, dict(low_pass_px2=0.075)),
            (Engine.TORCH, torch.float64, dict(low_pass_px2=0.075)),
            (Engine.CPU, torch.float32, {}),
        )
    )
    assert_same(ours, theirs)
    assert ours[0].alpha.mean() < 0.5 * usual[0].alpha.mean()  # tiny splats are mostly low-pass


def test_a_quarter_of_the_low_pass_shows_a_view_as_at_twice_its_size():
    """The mean over each pixel of a view of twice the size; splats are wide enough to be sampled well."""
    gaussians, cameras = scene(30, scale=0.06, opacity=0.2), view(width=70, height=46)
    large = render(gaussians, cameras.resized(140, 92)).rgb
    made_smaller = large.unflatten(1, (46, 2)).unflatten(3, (70, 2)).mean((2, 4))
    errors = [
        (render(gaussians, cameras, low_pass_px2=low_pass_px2).rgb - made_smaller).abs().mean()
        for low_pass_px2 in (0.3 / 4, 0.3)
    ]
    assert errors[0] < 0.3 * errors[1]


def test_gradients_without_depth():
    double = scene(300, dtype=torch.float64)
    ours = render_and_differentiate(Engine.CPU, scene(300), view(), with_depth=False)
    theirs = render_and_differentiate(Engine.TORCH, double, view(), with_depth=False)
    assert_same(ours, theirs)


def test_gradients_of_one_output_alone():
    weights = torch.randn(3, 300, 2, generator=torch.Generator().manual_seed(1))
    gradients = []
    for engine, dtype in ((Engine.CPU, torch.float32), (Engine.TORCH, torch.float64)):
        gaussians = scene(300, opacity=0.5, dtype=dtype)
        rendered = render(gaussians, view(), engine=engine)
        assert (rendered.info["radii"] > 0).all()
        loss = (rendered.info["means2d"] * weights).sum()
        (of_means2d,) = torch.autograd.grad(loss, gaussians[:1], retain_graph=True)
        (of_depth,) = torch.autograd.grad(rendered.depth.sum(), gaussians[:1])
        gradients.append((of_means2d, of_depth))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm() > 0


def test_equal_depths_are_blended_in_order_of_index():
    gaussians = Activated(
        means=torch.zeros(3, 3),
        quats=torch.eye(4)[:1].expand(3, 4),
        scales=torch.full((3, 3), 0.2),
        opacities=torch.full((3,), 0.9),
        colors=torch.eye(3),
    )
    rgb = render(gaussians, view(views=1, width=33, height=33), engine=Engine.CPU).rgb[0, 16, 14]
    assert rgb[0] > 5 * rgb[1] > 25 * rgb[2] > 0


def test_same_bytes_every_time_with_any_number_of_threads():
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return render_and_differentiate(Engine.CPU, scene(800), view())
        finally:
            torch.set_num_threads(before)

    (first, gradients), *others = (run(threads) for threads in (1, 2, 2))
    for other, other_gradients in others:
        for a, b in zip(first[:3], other[:3], strict=True):
            assert torch.equal(a, b)
        for name in NAMES:
            assert torch.equal(gradients[name], other_gradients[name]), name


@pytest.mark.parametrize("engine", [Engine.CPU, Engine.TORCH])
def test_nothing_in_sight_shows_the_background(engine):
    visible, cameras, background = scene(20), view()[[0, 0]], torch.tensor([0.2, 0.5, 0.9])
    behind_both_cameras = visible._replace(means=visible.means + torch.tensor([50.0, 0.0, 0.0]))
    for gaussians in (scene(0), behind_both_cameras):
        rendered = render(gaussians, cameras, background=background, engine=engine)
        assert torch.equal(rendered.rgb, background.expand(2, cameras.height, cameras.width, 3))
        assert not rendered.alpha.any() and not rendered.depth.any() and not rendered.info["radii"].any()
        gradients = torch.autograd.grad(rendered.rgb.sum() + rendered.depth.sum(), gaussians)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("engine", [Engine.CPU, Engine.TORCH])
def test_broken_gaussians_are_left_out_with_zero_gradients(engine):
    clean, broken, cameras = scene(60), scene(60), view()
    with torch.no_grad():
        broken.means[0, 1] = torch.nan
        broken.means[1, 2] = torch.inf
        broken.means[2, 0] = -1e30
        broken.quats[3, 3] = torch.nan
        broken.quats[4] = 0.0
        broken.scales[5, 0] = torch.inf
        broken.scales[6] = 1e20
        broken.scales[7, 2] = torch.nan
        broken.opacities[8] = torch.nan
        broken.opacities[9] = 0.001  # fainter than can be seen
    rendered, gradients = render_and_differentiate(engine, broken, cameras)
    rest = Activated(*(tensor[10:] for tensor in clean))
    expected, expected_gradients = render_and_differentiate(engine, rest, cameras)
    for image, other in zip(rendered[:3], expected[:3], strict=True):
        torch.testing.assert_close(image, other, atol=1e-6, rtol=1e-6)
    assert not rendered.info["radii"][:, :10].any()
    for name in NAMES[:5]:
        assert not gradients[name][:10].any(), name
        torch.testing.assert_close(gradients[name][10:], expected_gradients[name], atol=1e-3, rtol=1e-4)


def test_gsplats_strategy_densifies_on_our_gradients():
    start = Activated(*(tensor.detach() for tensor in scene(200, opacity=0.5)))
    start = start._replace(scales=start.scales.log(), opacities=torch.logit(start.opacities))
    params = {name: torch.nn.Parameter(tensor) for name, tensor in start._asdict().items()}
    optimizers = {name: torch.optim.Adam([param], lr=1e-3) for name, param in params.items()}
    strategy = DefaultStrategy(refine_start_iter=0, refine_every=2, grow_grad2d=1e-3, verbose=False)
    strategy.check_sanity(params, optimizers)
    cameras, gradients = view(views=2), {}
    for engine in (Engine.TORCH, Engine.CPU):
        state = strategy.initialize_state(scene_scale=1.0)
        for step in (1, 2):
            raw = Activated(**params)
            activated = raw._replace(scales=raw.scales.exp(), opacities=raw.opacities.sigmoid())
            rgb, *_, info = render(activated, cameras, engine=engine)
            strategy.step_pre_backward(params, optimizers, state, step, info)
            (rgb - 1).square().mean().backward()
            if step == 1:
                strategy.step_post_backward(params, optimizers, state, step, info)
                gradients[engine] = state["grad2d"] / state["count"]
            elif engine == Engine.CPU:
                strategy.step_post_backward(params, optimizers, state, step, info)
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    torch.testing.assert_close(gradients[Engine.CPU], gradients[Engine.TORCH], rtol=1e-3, atol=1e-7)
    assert len(params["means"]) > 200
    assert torch.isfinite(params["means"]).all()


def test_no_graph_is_kept_under_no_grad():
    with torch.no_grad():
        rendered = render(scene(50), view(), engine=Engine.CPU)
    assert not rendered.rgb.requires_grad and not rendered.info["means2d"].requires_grad
    assert rendered.info["n_cameras"] == 3 and rendered.info["gaussian_ids"] is None


def test_parameters_render_like_their_activated_gaussians():
    activated = scene(50)
    parameters = Gaussians(
        activated.means,
        activated.quats,
        activated.scales.log(),
        torch.logit(activated.opacities),
        (activated.colors - 0.5) * 2 * np.sqrt(np.pi),
    )
    ours, expected = (render(each, view(), engine=Engine.CPU) for each in (parameters, activated))
    torch.testing.assert_close(ours.rgb, expected.rgb, atol=1e-5, rtol=1e-5)


def test_images_rendered_in_parts_equal_one_render():
    gaussians = Gaussians(*(torch.randn_like(tensor) for tensor in scene(30)))
    cameras = view(views=11)  # more than are rendered at a time
    images = render_images(gaussians, cameras, background=0.25)
    rgb = render(gaussians, cameras, background=torch.full((3,), 0.25)).rgb
    np.testing.assert_array_equal(images, rgb.clamp(0, 1).numpy())


def test_wrong_calls_raise_clear_errors():
    gaussians, cameras = scene(5), view()
    with pytest.raises(UserError, match="needs tensors on cuda"):
        render(gaussians, cameras, engine=Engine.GSPLAT)
    with pytest.raises(ValueError, match="computes in float32"):
        render(scene(5, dtype=torch.float64), cameras, engine=Engine.CPU)
    with pytest.raises(ValueError, match=r"quats has shape \(5, 3\), expected \(5, 4\)"):
        render(gaussians._replace(quats=gaussians.means), cameras)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["general", "opaque and deep", "camera among them"])
def test_gsplat_engine_equals_the_reference(name):
    gaussians, cameras = SCENES[name]
    rendered, gradients = render_and_differentiate(
        Engine.AUTO, scene(**gaussians, device="cuda"), view(**cameras)
    )
    expected = render_and_differentiate(Engine.TORCH, scene(**gaussians), view(**cameras))
    info = {"radii": rendered.info["radii"].cpu()}
    on_cpu = Render(*(image.detach().cpu() for image in rendered[:3]), info)
    assert_same((on_cpu, {name: gradient.cpu() for name, gradient in gradients.items()}), expected)
    assert np.isfinite(on_cpu.rgb.numpy()).all()
