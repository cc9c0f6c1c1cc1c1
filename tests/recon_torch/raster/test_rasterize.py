"""The CPU engine against the torch twin, forward and backward; repeatability; odd input; densification."""

import numpy as np
import pytest
import torch
from gsplat import DefaultStrategy

from recon_torch.errors import UserError
from recon_torch.kernel import kernel
from recon_torch.raster.rasterize import rasterize
from recon_torch.views.cameras import orbit

NAMES = ("means", "quats", "scales", "opacities", "colors", "means2d")


def scene(count, seed=0, scale=0.04, opacity=None, dtype=torch.float32):
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
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def view(views=3, width=70, height=45, radius=2.0):
    cameras = orbit(views, 0.3, height, radius=radius)
    intrinsics = torch.from_numpy(cameras.intrinsics_px.copy())
    intrinsics[:, 0, 2] = 0.45 * width
    return torch.from_numpy(cameras.w2c), intrinsics, width, height


def render_and_differentiate(engine, gaussians, cameras, with_depth=True):
    """The render, and the gradients by NAMES of a random linear loss."""
    w2c, intrinsics, width, height = cameras
    dtype = gaussians[0].dtype
    background = torch.tensor([0.2, 0.5, 0.9], dtype=dtype)
    render = rasterize(
        *gaussians, w2c.to(dtype), intrinsics.to(dtype), width, height, background=background, engine=engine
    )
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(image.shape, generator=generator).to(dtype) for image in render[:3]]
    images = list(zip(render[:3], weights, strict=True))[: 3 if with_depth else 2]
    loss = sum((image * weight).sum() for image, weight in images)
    inputs = (*gaussians, render.info["means2d"])
    return render, dict(zip(NAMES, torch.autograd.grad(loss, inputs), strict=True))


def assert_same(ours, theirs):
    """Equal up to float32, but for the odd pixel where a splat is a rounding error away from a threshold."""
    (render, gradients), (expected, expected_gradients) = ours, theirs
    for name in ("rgb", "alpha", "depth"):
        error = (getattr(render, name) - getattr(expected, name)).abs().flatten().double()
        assert error.quantile(0.999) < 3e-5, name
        assert error.max() < 0.02, name
    assert (render.info["radii"] != expected.info["radii"]).float().mean() < 1e-3
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
def test_cpu_engine_equals_the_twin(name):
    gaussians, cameras = SCENES[name]
    ours = render_and_differentiate("cpu", scene(**gaussians), view(**cameras))
    theirs = render_and_differentiate("torch", scene(**gaussians, dtype=torch.float64), view(**cameras))
    assert ours[0].alpha.max() > 0.005
    assert_same(ours, theirs)


def test_gradients_without_depth():
    ours = render_and_differentiate("cpu", scene(300), view(), with_depth=False)
    theirs = render_and_differentiate("torch", scene(300, dtype=torch.float64), view(), with_depth=False)
    assert_same(ours, theirs)


def test_gradients_of_one_output_alone():
    weights = torch.randn(3, 300, 2, generator=torch.Generator().manual_seed(1))
    gradients = []
    for engine, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        gaussians = scene(300, opacity=0.5, dtype=dtype)
        w2c, intrinsics, width, height = view()
        render = rasterize(*gaussians, w2c.to(dtype), intrinsics.to(dtype), width, height, engine=engine)
        assert (render.info["radii"] > 0).all()
        loss = (render.info["means2d"] * weights).sum()
        (of_means2d,) = torch.autograd.grad(loss, gaussians[:1], retain_graph=True)
        (of_depth,) = torch.autograd.grad(render.depth.sum(), gaussians[:1])
        gradients.append((of_means2d, of_depth))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm() > 0


def test_equal_depths_are_blended_in_order_of_index():
    means = torch.tensor([[0.0, 0.0, 0.0]]).expand(3, 3)
    colors = torch.eye(3)
    arguments = (means, torch.eye(4)[:1].expand(3, 4), torch.full((3, 3), 0.2), torch.full((3,), 0.9), colors)
    w2c, intrinsics, _, _ = view(views=1, width=33, height=33)
    rgb = rasterize(*arguments, w2c, intrinsics, 33, 33, engine="cpu").rgb[0, 16, 14]
    assert rgb[0] > 5 * rgb[1] > 25 * rgb[2] > 0


def test_same_bytes_every_time_with_any_number_of_threads():
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return render_and_differentiate("cpu", scene(800), view())
        finally:
            torch.set_num_threads(before)

    (first, gradients), *others = (run(threads) for threads in (1, 2, 2))
    for render, other_gradients in others:
        for a, b in zip(first[:3], render[:3], strict=True):
            assert torch.equal(a, b)
        for name in NAMES:
            assert torch.equal(gradients[name], other_gradients[name]), name


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_nothing_in_sight_shows_the_background(engine):
    for gaussians in (scene(0), [tensor + 0 for tensor in scene(20)]):
        if len(gaussians[0]):
            gaussians[0] = gaussians[0] + torch.tensor([50.0, 0.0, 0.0])  # behind both cameras
        w2c, intrinsics, width, height = view(views=2)
        w2c = w2c[:1].expand(2, 4, 4)
        background = torch.tensor([0.2, 0.5, 0.9])
        render = rasterize(*gaussians, w2c, intrinsics, width, height, background=background, engine=engine)
        assert torch.equal(render.rgb, background.expand(2, height, width, 3))
        assert not render.alpha.any() and not render.depth.any() and not render.info["radii"].any()
        gradients = torch.autograd.grad(render.rgb.sum() + render.depth.sum(), gaussians)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_broken_gaussians_are_left_out_with_zero_gradients(engine):
    clean, broken, cameras = scene(60), scene(60), view()
    with torch.no_grad():
        broken[0][0, 1] = torch.nan
        broken[0][1, 2] = torch.inf
        broken[0][2, 0] = -1e30
        broken[1][3, 3] = torch.nan
        broken[1][4] = 0.0
        broken[2][5, 0] = torch.inf
        broken[2][6] = 1e20
        broken[2][7, 2] = torch.nan
        broken[3][8] = torch.nan
        broken[3][9] = 0.001  # fainter than can be seen
    render, gradients = render_and_differentiate(engine, broken, cameras)
    expected, expected_gradients = render_and_differentiate(engine, [t[10:] for t in clean], cameras)
    for image, other in zip(render[:3], expected[:3], strict=True):
        torch.testing.assert_close(image, other, atol=1e-6, rtol=1e-6)
    assert not render.info["radii"][:, :10].any()
    for name in NAMES[:5]:
        assert not gradients[name][:10].any(), name
        torch.testing.assert_close(gradients[name][10:], expected_gradients[name], atol=1e-3, rtol=1e-4)


def test_gsplats_strategy_densifies_on_our_gradients():
    means, quats, scales, opacities, colors = scene(200, opacity=0.5)
    params = {
        "means": means.detach(),
        "scales": scales.detach().log(),
        "quats": quats.detach(),
        "opacities": torch.logit(opacities.detach()),
        "colors": colors.detach(),
    }
    params = {name: torch.nn.Parameter(tensor) for name, tensor in params.items()}
    optimizers = {name: torch.optim.Adam([param], lr=1e-3) for name, param in params.items()}
    strategy = DefaultStrategy(refine_start_iter=0, refine_every=2, grow_grad2d=1e-3, verbose=False)
    strategy.check_sanity(params, optimizers)
    w2c, intrinsics, width, height = view(views=2)
    gradients = {}
    for engine in ("torch", "cpu"):
        state = strategy.initialize_state(scene_scale=1.0)
        for step in (1, 2):
            render = rasterize(
                params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid(),
                params["colors"], w2c, intrinsics, width, height, engine=engine,
            )  # fmt: skip
            strategy.step_pre_backward(params, optimizers, state, step, render.info)
            (render.rgb - 1).square().mean().backward()
            if step == 1:
                strategy.step_post_backward(params, optimizers, state, step, render.info)
                gradients[engine] = state["grad2d"] / state["count"]
            elif engine == "cpu":
                strategy.step_post_backward(params, optimizers, state, step, render.info)
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    torch.testing.assert_close(gradients["cpu"], gradients["torch"], rtol=1e-3, atol=1e-7)
    assert len(params["means"]) > 200
    assert torch.isfinite(params["means"]).all()


def test_no_gradients_are_kept_without_need():
    with torch.no_grad():
        render = rasterize(*scene(50), *view(), engine="cpu")
    assert not render.rgb.requires_grad and not render.info["means2d"].requires_grad
    assert render.info["n_cameras"] == 3 and render.info["gaussian_ids"] is None


def test_wrong_calls_say_so():
    gaussians, cameras = scene(5), view()
    with pytest.raises(UserError, match="needs tensors on cuda"):
        rasterize(*gaussians, *cameras, engine="gsplat")
    with pytest.raises(ValueError, match="computes in float32"):
        rasterize(*scene(5, dtype=torch.float64), *cameras, engine="cpu")
    with pytest.raises(ValueError, match=r"quats has shape \(5, 3\), expected \(5, 4\)"):
        rasterize(gaussians[0], gaussians[0], *gaussians[2:], *cameras)
    with pytest.raises(ValueError, match="must be positive"):
        rasterize(*gaussians, *cameras[:2], 0, 4)


def test_kernels_compile_where_no_cache_can_be_written():
    namespace = {}
    exec("def double(x):\n    return 2 * x", namespace)  # no file, so numba finds no place for its cache
    assert kernel()(namespace["double"])(21) == 42


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["general", "opaque and deep", "camera among them"])
def test_gsplat_engine_equals_the_twin(name):
    gaussians, cameras = SCENES[name]
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in scene(**gaussians)]
    w2c, intrinsics, width, height = view(**cameras)
    background = torch.tensor([0.2, 0.5, 0.9])
    render = rasterize(*on_gpu, w2c.cuda(), intrinsics.cuda(), width, height, background=background)
    expected, expected_gradients = render_and_differentiate("torch", scene(**gaussians), view(**cameras))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(image.shape, generator=generator).cuda() for image in render[:3]]
    loss = sum((image * weight).sum() for image, weight in zip(render[:3], weights, strict=True))
    gradients = torch.autograd.grad(loss, (*on_gpu, render.info["means2d"]))
    info = {"radii": render.info["radii"].cpu()}
    on_cpu = type(render)(*(image.detach().cpu() for image in render[:3]), info)
    named = {name: gradient.cpu() for name, gradient in zip(NAMES, gradients, strict=True)}
    assert_same((on_cpu, named), (expected, expected_gradients))
    assert np.isfinite(on_cpu.rgb.numpy()).all()
