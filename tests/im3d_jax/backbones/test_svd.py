"""SVD and SV3D against diffusers' UNetSpatioTemporalConditionModel with the same random weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from im3d_jax import backbones, config_flags
from im3d_jax.backbones import svd, unet
from im3d_jax.diffusion import objective, sampler, schedules

pytestmark = pytest.mark.slow

BATCH, VIEWS, SIDE = 2, 3, 4
SMALL = svd.SMALL
ROOT = Path(__file__).parents[3]
TIMESTEP = np.array([1.6, -1.2], np.float32)  # ln(sigma) / 4 of sigma 602 and 0.008


def loaded(model, theirs, directory):
    theirs.save_pretrained(directory)
    return model.from_pretrained(directory, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def theirs(diffusers_svd):
    return diffusers_svd()


@pytest.fixture(scope="module")
def model():
    return svd.Model(**SMALL)


@pytest.fixture(scope="module")
def params(model, theirs, tmp_path_factory):
    return loaded(model, theirs, tmp_path_factory.mktemp("svd"))


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def given(model, image_mask=(1, 1), elevation_rad=(0, 0)):
    """Conditions with a picture for the assets whose mask is 1."""
    elevation_rad = jnp.asarray(elevation_rad, jnp.float32) if model.vector == "sv3d_p" else None
    return model.empty_conditioning(BATCH)._replace(
        image=jnp.asarray(random(BATCH, SIDE, SIDE, 4)),
        image_mask=jnp.asarray(image_mask, jnp.float32),
        image_tokens=jnp.asarray(random(BATCH, 1, 24)),
        elevation_rad=elevation_rad,
    )


def torch_prediction(theirs, frames, image_mask=(1, 1)):
    """Diffusers' prediction of frames [B, K, h, w, c], in its pipeline's way of giving the picture."""
    mask = np.reshape(image_mask, (-1, 1, 1, 1, 1)).astype(np.float32)
    image = random(BATCH, SIDE, SIDE, 4)[:, None] / 0.18215 * mask
    tokens = torch.tensor(random(BATCH, 1, 24) * mask[:, 0, 0])
    sample = np.concatenate([frames, np.broadcast_to(image, frames.shape)], -1).transpose(0, 1, 4, 2, 3)
    told = torch.tensor([[6, 127, 0.02]] * BATCH)  # 7 frames per second
    with torch.no_grad():
        prediction = theirs(torch.tensor(sample), torch.tensor(TIMESTEP), tokens, told).sample
    return prediction.numpy().transpose(0, 1, 3, 4, 2)


def compare(ours, theirs, tolerance=1e-4):
    """Relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# ---- Parity ----


def test_svd_predicts_as_diffusers_does(model, params, theirs):
    noisy = random(BATCH, VIEWS, SIDE, SIDE, 4)
    apply = jax.jit(model.apply)
    for image_mask in ((1, 1), (1, 0)):
        expected = torch_prediction(theirs, noisy, image_mask)
        compare(apply(params, noisy, TIMESTEP, given(model, image_mask)), expected)


def sinusoids(values, dim):
    """Float64; values [...] -> [..., dim]."""
    frequencies = 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    phases = np.asarray(values, np.float64)[..., None] * frequencies
    return np.concatenate([np.cos(phases), np.sin(phases)], -1)


def tell_each_frame(theirs, told):
    """Makes diffusers' residual blocks take what each frame is told, [B, K, d], in place of one for all."""
    told = torch.tensor(told, dtype=torch.float32).flatten(0, 1)
    time = theirs.time_proj(torch.tensor(TIMESTEP).repeat_interleave(len(told) // BATCH))
    emb = theirs.time_embedding(time) + theirs.add_embedding(told)

    def replace(module, args, kwargs):
        return (args[0], emb), kwargs

    for name, module in theirs.named_modules():
        if type(module).__name__ == "SpatioTemporalResBlock":
            module.register_forward_pre_hook(replace, with_kwargs=True)
        if name.endswith(("res_block.norm1", "res_block.norm2")):
            module.eps = 1e-5  # as in Stability's code


def test_sv3d_p_tells_every_frame_its_camera_and_has_the_picture_last(diffusers_svd, tmp_path):
    theirs, elevations = diffusers_svd((1 + 2 + 2) * 16), np.array([0.3, -0.1])
    kwargs = dict(vector="sv3d_p", input_view="last", groupnorm_eps=1e-5, noise_aug=1e-5)
    ours = svd.Model(**SMALL | kwargs)
    params = loaded(ours, theirs, tmp_path)
    azimuths = 2 * np.pi * np.array([1 / 3, 2 / 3, 0])
    shape = (BATCH, VIEWS, 32)
    told = [
        np.broadcast_to(sinusoids(1e-5, 16), (BATCH, VIEWS, 16)),
        np.broadcast_to(sinusoids(np.pi / 2 - elevations, 32)[:, None], shape),
        np.broadcast_to(sinusoids(azimuths, 32), shape),
    ]
    tell_each_frame(theirs, np.concatenate(told, -1))
    theirs.add_embedding.forward = lambda x: torch.zeros(len(x), 128)  # what it adds is replaced
    noisy = random(BATCH, VIEWS, SIDE, SIDE, 4)
    prediction = jax.jit(ours.apply)(params, noisy, TIMESTEP, given(ours, elevation_rad=elevations))
    frames = torch_prediction(theirs, np.roll(noisy, -1, 1))
    compare(prediction, np.roll(frames, 1, 1))


def torch_frames(x):
    """[B, K, h, w, c] -> [B * K, c, h, w]."""
    return torch.tensor(x).flatten(0, 1).permute(0, 3, 1, 2)


def our_frames(x):
    """[B * K, c, h, w] -> [B, K, h, w, c]."""
    return x.detach().unflatten(0, (BATCH, VIEWS)).permute(0, 1, 3, 4, 2).numpy()


@pytest.fixture(scope="module")
def embedding():
    """What the blocks are told, [B, K, d] here and [B * K, d] there."""
    emb = random(BATCH, VIEWS, 128)
    return emb, torch.tensor(emb).flatten(0, 1)


@pytest.fixture(scope="module")
def context():
    tokens = random(BATCH, 1, 24)
    return tokens, torch.tensor(tokens).repeat_interleave(VIEWS, 0)


IMAGE_ONLY = torch.zeros(BATCH, VIEWS)


def small(*shape, seed=0):
    """So small that the epsilon of a norm shows."""
    return 3e-3 * random(*shape, seed=seed)


@pytest.mark.parametrize("level", [0, 1])
def test_down_block(model, params, theirs, embedding, context, level):
    x, block = small(BATCH, VIEWS, SIDE, SIDE, 32), unet.DownBlock(svd.parts(model), level)
    ours, skips = jax.jit(block.apply)(
        {"params": params[f"down_blocks_{level}"]}, x, embedding[0], context[0]
    )
    attended = {"encoder_hidden_states": context[1]} if level == 0 else {}
    expected = theirs.down_blocks[level]
    out, outputs = expected(torch_frames(x), embedding[1], image_only_indicator=IMAGE_ONLY, **attended)
    compare(ours, our_frames(out))
    for skip, output in zip(skips, outputs, strict=True):
        compare(skip, our_frames(output))


@pytest.mark.parametrize("level", [0, 1])
def test_up_block(model, params, theirs, embedding, context, level):
    x = small(BATCH, VIEWS, SIDE, SIDE, 64)
    channels = [(32, 32), (32, 64)][level]
    skips = [small(BATCH, VIEWS, SIDE, SIDE, c, seed=i) for i, c in enumerate(channels, start=1)]
    block, weights = unet.UpBlock(svd.parts(model), level), {"params": params[f"up_blocks_{1 - level}"]}
    ours = jax.jit(block.apply)(weights, x, skips, embedding[0], context[0])
    attended = {"encoder_hidden_states": context[1]} if level == 0 else {}
    inputs = torch_frames(x), tuple(map(torch_frames, skips)), embedding[1]
    out = theirs.up_blocks[1 - level](*inputs, image_only_indicator=IMAGE_ONLY, **attended)
    compare(ours, our_frames(out))


def test_middle_block_and_its_gradients(model, params, theirs, embedding, context):
    x = small(BATCH, VIEWS, SIDE, SIDE, 64)
    cotangent = random(BATCH, VIEWS, SIDE, SIDE, 64, seed=1)
    block = unet.MidBlock(svd.parts(model))

    @jax.jit
    def value_and_gradients(params, x, emb, tokens):
        value, pull_back = jax.vjp(
            lambda *args: block.apply({"params": args[0]}, *args[1:]), params, x, emb, tokens
        )
        return value, pull_back(cotangent)

    ours, gradients = value_and_gradients(params["mid_block"], x, embedding[0], context[0])
    inputs = [t.clone().requires_grad_() for t in (torch_frames(x), embedding[1], context[1])]
    out = theirs.mid_block(*inputs, IMAGE_ONLY)
    compare(ours, our_frames(out))

    theirs.zero_grad()
    out.backward(torch_frames(cotangent))
    named = {"mid_block": gradients[0]}
    found = model.to_pretrained(named)
    expected = {f"mid_block.{name}": p.grad.numpy() for name, p in theirs.mid_block.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            found[name], gradient, atol=1e-4 * np.abs(gradient).max() + 1e-5, err_msg=name
        )
    compare(gradients[1], our_frames(inputs[0].grad))
    compare(gradients[2].reshape(-1, 128), inputs[1].grad)
    compare(gradients[3], inputs[2].grad.unflatten(0, (BATCH, VIEWS)).sum(1, keepdim=False))


def test_bfloat16_stays_near(params, theirs, embedding, context):
    x, block = (
        random(BATCH, VIEWS, SIDE, SIDE, 64),
        unet.MidBlock(svd.parts(svd.Model(**SMALL, dtype="bfloat16"))),
    )
    inputs = jnp.asarray(x, jnp.bfloat16), embedding[0], jnp.asarray(context[0], jnp.bfloat16)
    ours = jax.jit(block.apply)({"params": params["mid_block"]}, *inputs)
    assert ours.dtype == jnp.bfloat16
    out = theirs.mid_block(torch_frames(x), embedding[1], context[1], IMAGE_ONLY)
    compare(ours.astype(jnp.float32), our_frames(out), tolerance=0.03)


# ---- Properties ----


@pytest.mark.parametrize("input_view, step", [("first", 0), ("last", 1)])
@pytest.mark.parametrize("direction", [1, -1])
def test_frames_stand_where_their_model_has_them(input_view, step, direction):
    """Our view k is at 2 pi k / K counter-clockwise, frame i at 2 pi (i + step) / K in its direction."""
    model = svd.Model(**SMALL | dict(input_view=input_view, orbit_direction=direction))
    views = np.exp(2j * np.pi * np.arange(7) / 7)
    frames = np.exp(direction * 2j * np.pi * (np.arange(7) + step) / 7)
    np.testing.assert_allclose(views[model.frame_order(7)], frames, atol=1e-12)


def test_triangular_guidance_is_sv3ds_wave_in_the_order_of_our_views():
    times = np.linspace(0, 1, 21)
    wave = 1 + 1.5 * 2 * np.abs(
        times - np.floor(times + 0.5)
    )  # over their frames, of which the last is view 0
    np.testing.assert_allclose(svd.triangular(21), np.roll(wave, 1), atol=1e-12)
    clockwise = svd.Model(input_view="last", orbit_direction=-1).frame_order(21)
    np.testing.assert_allclose(svd.triangular(21, frame_order=clockwise), wave[::-1], atol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 1.0, 14.6, 700.0])
def test_v_prediction_on_the_edm_schedule_is_karras_denoiser(sigma):
    """D = c_skip x + c_out F(c_in x, c_noise), with SVD's factors, x noised without scaling its signal."""
    schedule = schedules.make_schedule(kind="edm", num_steps=2, sigma_min=sigma, sigma_max=2 * sigma)
    alpha, noise_level, told = (column[0] for column in schedule[:3])
    assert told == pytest.approx(0.25 * np.log(sigma), rel=1e-12)
    x = random(1, 2, 2, 2, 4).astype(np.float64) * (1 + sigma)
    network = random(1, 2, 2, 2, 4, seed=1).astype(np.float64)
    denoised = x / (sigma**2 + 1) - sigma / np.sqrt(sigma**2 + 1) * network
    c_in = 1 / np.sqrt(sigma**2 + 1)
    np.testing.assert_allclose(alpha * (c_in * x) - noise_level * network, denoised, rtol=1e-9, atol=1e-12)
    ours = objective.to_x0("v", *map(jnp.asarray, (network, c_in * x, alpha, noise_level)))
    np.testing.assert_allclose(ours, denoised, rtol=1e-5, atol=1e-6)


def test_rematerialisation_takes_the_same_parameters(model, params, embedding, context):
    again = svd.Model(**SMALL, remat="nothing_saveable")
    args = {"params": params["mid_block"]}, random(BATCH, VIEWS, SIDE, SIDE, 64), embedding[0], context[0]
    traced = [jax.make_jaxpr(unet.MidBlock(svd.parts(spec)).apply)(*args) for spec in (model, again)]
    recomputed = [sum("remat" in str(eqn.primitive) for eqn in jaxpr.eqns) for jaxpr in traced]
    assert recomputed == [0, 3]


def test_attention_within_a_frame_is_in_chunks(model, params, embedding, context):
    chunked, x = svd.Model(**SMALL, query_chunk=4), random(BATCH, VIEWS, SIDE, SIDE, 64)
    args = {"params": params["mid_block"]}, x, embedding[0], context[0]
    blocks = [unet.MidBlock(svd.parts(spec)) for spec in (model, chunked)]
    traced = [str(jax.make_jaxpr(block.apply)(*args)) for block in blocks]
    assert [jaxpr.count("scan[") for jaxpr in traced] == [0, 1]


@pytest.mark.parametrize(
    "name, vector, num_steps", [("sv3d_u", "sv3d_u", 50), ("sv3d_p", "sv3d_p", 50), ("svd_xt", "svd", 25)]
)
def test_shipped_configs_sample_as_stabilitys_do(name, vector, num_steps):
    """Euler steps over Karras' levels of rho 7, from sigma 700."""
    config = config_flags.load(ROOT / f"configs/{name}.py")
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    assert model.vector == vector
    assert len(config.video.w_image) == config.num_views == (model.num_views or 16)
    schedule = schedules.make_schedule(**config.schedule)
    steps = sampler.make_steps(schedule, config.video.num_steps, config.video.spacing)
    ramp = np.linspace(700 ** (1 / 7), 0.002 ** (1 / 7), num_steps)
    levels = np.append(ramp**7, 0)
    np.testing.assert_allclose(steps.sigmas / steps.alphas, levels, rtol=1e-6)
    np.testing.assert_allclose(steps.timesteps, np.log(levels[:-1]) / 4, rtol=1e-6)
    # x + (sigma' - sigma) (x - D) / sigma, where x here is that one divided by sqrt(1 + sigma^2).
    shrink = np.sqrt((1 + levels[:-1] ** 2) / (1 + levels[1:] ** 2))
    from_x, from_d = levels[1:] / levels[:-1], 1 - levels[1:] / levels[:-1]
    euler = [from_x * shrink, from_d / np.sqrt(1 + levels[1:] ** 2)]
    weights = sampler.coefficients(steps, config.video.solver)
    np.testing.assert_allclose(weights[:, :2].T, euler, rtol=1e-6, atol=1e-9)
    assert not weights[:, 2:].any()
