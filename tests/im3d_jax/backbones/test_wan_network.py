"""Wan's transformer against diffusers' WanTransformer3DModel with the same weights, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from im3d_jax import pretrained
from im3d_jax.backbones import wan_network, wan_sizes
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
from diffusers import WanTransformer3DModel  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

WORDS = 512  # which diffusers takes for granted where there is an image
RNG = np.random.default_rng(0)


def in_diffusers(spec):
    """diffusers' module of these sizes, with random weights."""
    names = (
        "num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim ffn_dim num_layers"
    )
    sizes = {name: getattr(spec, name) for name in names.split()}
    if spec.image_dim:
        sizes |= dict(image_dim=spec.image_dim, added_kv_proj_dim=spec.width)
    if spec.pos_embed_seq_len:
        sizes["pos_embed_seq_len"] = spec.pos_embed_seq_len
    torch.manual_seed(0)
    module = WanTransformer3DModel(**sizes).eval()
    for parameter in module.parameters():  # also what starts at zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def params_of(module, spec):
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    shapes = wan_network.shapes(spec)
    return pretrained.to_params(
        tensors, shapes, lambda path: pretrained.Source(pretrained.torch_name(path)), "the module"
    )


@pytest.fixture(scope="module", params=wan_sizes.SMALL)
def pair(request):
    """(sizes, our parameters, diffusers' module)."""
    spec = wan_sizes.SMALL[request.param]
    module = in_diffusers(spec)
    return spec, params_of(module, spec), module


def draw(spec, batch, frames, height, width):
    """(latents, text, image or None), channels last."""
    latents = RNG.standard_normal((batch, frames, height, width, spec.in_channels), np.float32)
    text = RNG.standard_normal((batch, WORDS, spec.text_dim), np.float32)
    image = RNG.standard_normal((batch, 5, spec.image_dim), np.float32) if spec.image_dim else None
    return latents, text, image


def channels_first(latents):
    return torch.from_numpy(np.moveaxis(np.asarray(latents), -1, 1).copy())


def run(spec, params, *inputs):
    return jax.jit(wan_network.Transformer(spec).apply)({"params": params}, *inputs)


def run_theirs(module, latents, timestep, text, image):
    image = None if image is None else torch.from_numpy(image)
    with torch.no_grad():
        (out,) = module(
            channels_first(latents),
            torch.from_numpy(timestep),
            torch.from_numpy(text),
            image,
            return_dict=False,
        )
    return np.moveaxis(out.numpy(), 1, -1)


def assert_close(ours, theirs, relative=1e-4):
    assert np.std(theirs) > 0.01
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * np.abs(theirs).max()


@pytest.mark.parametrize("frames, height, width", [(1, 4, 4), (2, 6, 4), (5, 4, 8)])
def test_one_noise_level(pair, frames, height, width):
    spec, params, module = pair
    latents, text, image = draw(spec, 2, frames, height, width)
    timestep = np.array([999.0, 31.5], np.float32)
    ours = run(spec, params, latents, timestep, text, image)
    assert ours.dtype == jnp.float32
    assert_close(ours, run_theirs(module, latents, timestep, text, image))


def test_a_noise_level_for_each_token_or_each_frame(pair):
    spec, params, module = pair
    latents, text, image = draw(spec, 2, 3, 4, 6)
    by_frame = np.array([[0.0, 999, 450], [20, 0, 730]], np.float32)
    by_token = np.repeat(by_frame, 6, axis=1)
    theirs = run_theirs(module, latents, by_token, text, image)
    assert_close(run(spec, params, latents, by_token, text, image), theirs)
    assert_close(run(spec, params, latents, by_frame, text, image), theirs)


def test_a_first_and_a_last_image():
    spec = dataclasses.replace(wan_sizes.SMALL["i2v"], pos_embed_seq_len=10, num_layers=1)
    module = in_diffusers(spec)
    latents, text, _ = draw(spec, 1, 2, 4, 4)
    image = RNG.standard_normal((1, 10, spec.image_dim), np.float32)
    timestep = np.array([500.0], np.float32)
    theirs = run_theirs(module, latents, timestep, text, image.reshape(2, 5, -1))
    assert_close(run(spec, params_of(module, spec), latents, timestep, text, image), theirs)


def test_gradients_of_a_block(pair):
    spec, params, module = pair
    grid, width = (2, 2, 3), spec.width
    x, text = (RNG.standard_normal((2, n, width)).astype(np.float32) for n in (12, WORDS))
    image = RNG.standard_normal((2, 5, width)).astype(np.float32) if spec.image_dim else None
    modulation = RNG.standard_normal((2, 12, 6, width)).astype(np.float32)
    weights = RNG.standard_normal(x.shape).astype(np.float32)

    def loss(params, x, text, image, modulation):
        turned = wan_network.rotations(grid, spec.attention_head_dim)
        block = wan_network.Block(spec)
        y = block.apply({"params": params}, x[:, :, None], modulation, text, image, turned)
        return (y[:, :, 0] * weights).sum()

    of_params, *of_inputs = jax.jit(jax.grad(loss, argnums=range(5)))(
        params["blocks_0"], x, text, image, modulation
    )

    theirs = [torch.from_numpy(each).requires_grad_() for each in (x, text, modulation)]
    of_image = None if image is None else torch.from_numpy(image).requires_grad_()
    context = theirs[1] if of_image is None else torch.cat([of_image, theirs[1]], 1)
    places = module.rope(torch.zeros(1, 1, grid[0], 2 * grid[1], 2 * grid[2]))
    block = module.blocks[0]
    block.zero_grad()
    out = block(theirs[0], context, theirs[2], places)
    (out * torch.from_numpy(weights)).sum().backward()

    for ours, each in zip([of_inputs[0], of_inputs[1], of_inputs[3]], theirs, strict=True):
        assert_close(ours, each.grad.numpy())
    if of_image is not None:
        assert_close(of_inputs[2], of_image.grad.numpy())
    expected = {name: parameter.grad.numpy() for name, parameter in block.named_parameters()}
    found = pretrained.to_tensors(
        jax.tree.map(np.asarray, of_params), lambda path: pretrained.Source(pretrained.torch_name(path))
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, atol=tolerance, rtol=0, err_msg=name)


def test_recomputation_changes_no_gradient(pair):
    spec, params, _ = pair
    spec = dataclasses.replace(spec, num_layers=1)
    params = {name: value for name, value in params.items() if name != "blocks_1"}
    inputs = draw(spec, 1, 1, 4, 4)

    def gradient(spec):
        def loss(params, latents, text, image):
            timestep = jnp.array([500.0])
            return (
                wan_network.Transformer(spec).apply({"params": params}, latents, timestep, text, image).std()
            )

        return jax.jit(jax.grad(loss))(params, *inputs)

    kept, recomputed = gradient(spec), gradient(dataclasses.replace(spec, remat="nothing_saveable"))
    for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_bfloat16_computes_as_diffusers_does(pair):
    """diffusers keeps normalisation, modulation and the embedding of time in float32, as we do."""
    spec, params, module = pair
    spec = dataclasses.replace(spec, dtype="bfloat16")
    latents, text, image = draw(spec, 1, 2, 4, 4)
    timestep = np.array([700.0], np.float32)
    exact = run_theirs(module, latents, timestep, text, image)
    ours = run(spec, params, latents, timestep, text, image)
    assert ours.dtype == jnp.float32
    assert 1e-4 < np.abs(ours - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize("name", wan_sizes.PUBLISHED)
def test_published_sizes_are_diffusers_sizes(name):
    spec = dataclasses.replace(wan_sizes.PUBLISHED[name], num_layers=1)
    shapes = traverse_util.flatten_dict(wan_network.shapes(spec), sep="/")
    with torch.device("meta"):
        names = "num_attention_heads attention_head_dim in_channels out_channels ffn_dim num_layers"
        sizes = {each: getattr(spec, each) for each in names.split()}
        image = dict(image_dim=1280, added_kv_proj_dim=spec.width) if spec.image_dim else {}
        theirs = WanTransformer3DModel(**sizes, **image).state_dict()
    assert {pretrained.torch_name(path): leaf.size for path, leaf in shapes.items()} == {
        key: tensor.numel() for key, tensor in theirs.items()
    }


def test_latents_that_patches_do_not_fill():
    spec = wan_sizes.SMALL["ti2v"]
    with pytest.raises(UserError, match="latents of 5x3x4 do not divide into patches of 1x2x2; give other"):
        spec.grid(5, 3, 4)
