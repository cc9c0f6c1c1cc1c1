"""Each class of diffusers behind the contract: torch called by hand, dropped conditions, no copies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from im3d_jax import backbones
from im3d_jax.backbones import conformance, torch_hosted
from im3d_jax.backbones.conformance import Outcome
from im3d_jax.backbones.torch_hosted import Model
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

B, K, SIDE, C, D = 2, 3, 8, 4, 16
WIDTHS = dict(block_out_channels=(16, 32), layers_per_block=1, out_channels=C)
NORM = dict(norm_num_groups=8, cross_attention_dim=D)
DOWN_3D = dict(
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
)
KWARGS = {
    "UNet3DConditionModel": dict(in_channels=C, attention_head_dim=8, **WIDTHS, **NORM, **DOWN_3D),
    "UNet3DConditionModel with image": dict(
        in_channels=2 * C + 1, attention_head_dim=8, **WIDTHS, **NORM, **DOWN_3D
    ),
    "I2VGenXLUNet": dict(in_channels=C, attention_head_dim=8, **WIDTHS, **NORM, **DOWN_3D),
    "UNetMotionModel": dict(
        in_channels=C,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        **WIDTHS,
        **NORM,
    ),
    "UNetSpatioTemporalConditionModel": dict(
        in_channels=2 * C,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        out_channels=C,
        layers_per_block=1,
        num_attention_heads=(2, 4),
        cross_attention_dim=D,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=K,
    ),
}


def build(name, **kwargs):
    settings = dict(diffusers_class=name.split()[0], path="random", kwargs=KWARGS[name])
    return Model(**(settings | dict(latent_shape=(SIDE, SIDE, C), max_words=5) | kwargs))


@pytest.fixture(scope="module", params=KWARGS)
def model(request):
    built = build(request.param)
    generator = torch.Generator().manual_seed(1)
    for parameter in built.module.parameters():  # also those that start at zero
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def inputs(model, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    empty = model.empty_conditioning(B)
    given = empty._replace(
        image=normal(B, SIDE, SIDE, C),
        image_mask=jnp.ones(B),
        text=tuple(normal(*each.shape) for each in empty.text),
        text_mask=tuple(jnp.ones(each.shape) for each in empty.text_mask),
        image_tokens=None if empty.image_tokens is None else normal(*empty.image_tokens.shape),
    )
    return normal(B, K, SIDE, SIDE, C), jnp.array([700.0, 3.5]), given


def tensor(array):
    return torch.from_numpy(np.array(array))


def by_hand(model, noisy, timestep, given, has_image):
    """The forward pass as each pipeline of diffusers calls it."""
    x, t, text = tensor(noisy), tensor(timestep), [tensor(each) for each in given.text]
    image = tensor(given.image) * has_image
    tokens = None if given.image_tokens is None else tensor(given.image_tokens) * has_image
    net = model.module
    with torch.no_grad():
        if model.diffusers_class == "UNetSpatioTemporalConditionModel":
            repeated = torch.einsum("bhwc->bchw", image)[:, None].repeat(1, K, 1, 1, 1) / 0.18215
            sample = torch.cat([torch.einsum("bkhwc->bkchw", x), repeated], 2)
            ids = torch.tensor([[6, 127, 0.02]] * B)
            return torch.einsum("bkchw->bkhwc", net(sample, t, tokens, ids).sample)
        sample = torch.einsum("bkhwc->bckhw", x)
        if model.diffusers_class == "I2VGenXLUNet":
            first = torch.einsum("bhwc->bchw", image)[:, :, None]
            ramp = [torch.ones_like(first) * k / (K - 1) for k in range(1, K)]
            extra = dict(fps=torch.tensor([16, 16]), image_latents=torch.cat([first, *ramp], 2))
            out = net(sample, t, **extra, image_embeddings=tokens, encoder_hidden_states=text[0]).sample
        elif model.diffusers_class == "UNetMotionModel":
            out = net(sample, t, torch.stack([text[0]] * K, 1).flatten(0, 1)).sample
        else:
            if net.config.in_channels > C:
                extra = torch.zeros(B, C + 1, K, SIDE, SIDE)
                extra[:, :C, 0] = torch.einsum("bhwc->bchw", image)
                extra[:, C, 0] = has_image
                sample = torch.cat([sample, extra], 1)
            out = net(sample, t, text[0]).sample
        return torch.einsum("bckhw->bkhwc", out)


def test_the_prediction_is_that_of_the_torch_module(model):
    noisy, timestep, given = inputs(model)
    found = model.apply({}, noisy, timestep, given)
    assert found.shape == noisy.shape and found.dtype == jnp.float32 and isinstance(found, jax.Array)
    np.testing.assert_allclose(found, by_hand(model, noisy, timestep, given, 1.0), rtol=1e-5, atol=1e-5)


def test_a_dropped_image_is_zeros(model):
    noisy, timestep, given = inputs(model)
    whole = model.apply({}, noisy, timestep, given)
    dropped = model.apply({}, noisy, timestep, given._replace(image_mask=jnp.zeros(B)))
    np.testing.assert_allclose(dropped, by_hand(model, noisy, timestep, given, 0.0), rtol=1e-5, atol=1e-5)
    takes_image = model.module.config.in_channels > C or given.image_tokens is not None
    assert (np.abs(whole - dropped).max() > 1e-3) == takes_image


def test_the_empty_prompt_is_one_token_of_zeros_however_padded(model):
    noisy, timestep, given = inputs(model)
    whole = model.apply({}, noisy, timestep, given)
    empty = model.apply({}, noisy, timestep, given._replace(text=model.empty_conditioning(B).text))
    assert (np.abs(whole - empty).max() > 1e-3) == bool(given.text)
    one = given._replace(text=tuple(jnp.zeros((B, 1, D)) for _ in given.text))
    if model.diffusers_class != "I2VGenXLUNet":  # which attends to text and image together
        np.testing.assert_allclose(empty, model.apply({}, noisy, timestep, one), rtol=1e-5, atol=1e-5)


def test_temporal_parameters_are_named(model):
    names = [name for name, _ in model.module.named_parameters()]
    temporal = [name for name in names if re.search(model.temporal_pattern, name)]
    assert 0 < len(temporal) < len(names)
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding")) for name in temporal)


def test_there_is_nothing_to_differentiate_or_to_compile(model):
    noisy, timestep, given = inputs(model)
    assert model.init(jax.random.key(0)) == {} and not model.traceable and hash(model) == hash(model)
    for traced in (
        lambda: jax.grad(lambda x: model.apply({}, x, timestep, given).sum())(noisy),
        lambda: jax.jit(model.apply)({}, noisy, timestep, given),
        lambda: jax.vjp(lambda g: model.apply({}, noisy, timestep, g), given),
    ):
        with pytest.raises(UserError, match="cannot be differentiated or compiled .*im3d convert"):
            traced()


def test_the_contract_is_kept(model):
    results = conformance.check(model, ".*")
    takes_image = model.module.config.in_channels > C or model.empty_conditioning(1).image_tokens is not None
    failed = {result.check for result in results if result.outcome == Outcome.FAILED}
    # A network that is published without an image is no generator of this method, which the check says.
    assert failed == (set() if takes_image else {"image matters"})
    passed = {result.check for result in results if result.outcome == Outcome.PASSED}
    assert passed >= {"assets do not see each other", "a dropped image is not seen", "model is hashable"}
    assert ("text matters" in passed) == bool(model.empty_conditioning(1).text)


def test_arrays_change_hands_without_a_copy():
    array = jax.device_put(jnp.arange(4096.0).reshape(1, 4, 8, 8, 16), jax.devices()[0])
    there = torch_hosted.to_torch(array)
    assert there.data_ptr() == array.unsafe_buffer_pointer()
    with torch.inference_mode():
        made = there + 1
    back = torch_hosted.to_jax(made)
    assert back.unsafe_buffer_pointer() == made.data_ptr()
    np.testing.assert_array_equal(back, np.asarray(array) + 1)


def test_weights_come_from_a_directory_and_nothing_is_left_random(tmp_path):
    name = "UNet3DConditionModel"
    made = build(name)
    made.module.save_pretrained(tmp_path)
    loaded = build(name, path=str(tmp_path), kwargs={})
    noisy, timestep, given = inputs(made)
    np.testing.assert_array_equal(
        made.apply({}, noisy, timestep, given), loaded.apply({}, noisy, timestep, given)
    )
    half = build(name, path=str(tmp_path), kwargs={}, dtype="bfloat16")
    rounded = half.apply({}, noisy, timestep, given)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.abs(rounded - made.apply({}, noisy, timestep, given)).max() < 0.1

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    removed = {key: value for key, value in tensors.items() if key != "conv_in.bias"}
    for content, words in (
        (removed, "lacks conv_in.bias"),
        (tensors | {"conv_extra.bias": torch.ones(2)}, "unknown tensor conv_extra.bias"),
        (tensors | {"conv_in.bias": torch.ones(5)}, "conv_in.bias"),
    ):
        save_file(content, weights)
        with pytest.raises(UserError, match=words):
            _ = build(name, path=str(tmp_path), kwargs={}).module
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is cut off"):
        _ = build(name, path=str(tmp_path), kwargs={}).module
    weights.unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="no .safetensors weights"):
        _ = build(name, path=str(tmp_path), kwargs={}).module
    with pytest.raises(UserError, match="is a UNet3DConditionModel"):
        build("I2VGenXLUNet", path=str(tmp_path), kwargs={})
    with pytest.raises(UserError, match="leave kwargs empty"):
        build(name, path=str(tmp_path))


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(diffusers_class="UNet2DModel"),
            "diffusers_class is 'UNet2DModel'; choose one of UNet3DConditionModel",
        ),
        (dict(path="nowhere", kwargs={}), "no config.json in 'nowhere'"),
        (dict(kwargs=KWARGS["UNet3DConditionModel"] | dict(depth=3)), "takes no depth"),
        (dict(kwargs=KWARGS["UNet3DConditionModel"] | dict(in_channels=7)), "need 4 or 9 and 4"),
        (dict(latent_shape=(8, 8, 5)), "latents of 5"),
        (dict(dtype="int8"), "dtype is 'int8'; give one of float32"),
    ],
)
def test_mistakes_are_one_line(wrong, words, user_error):
    settings = dict(
        diffusers_class="UNet3DConditionModel",
        path="random",
        kwargs=KWARGS["UNet3DConditionModel"],
        latent_shape=(SIDE, SIDE, C),
    )
    with user_error(words):
        backbones.build("torch_hosted", settings | wrong)


def test_a_network_that_wants_more_conditions_is_refused():
    kwargs = KWARGS["UNetMotionModel"] | dict(addition_embed_type="text_time")
    with pytest.raises(UserError, match="addition_embed_type"):
        build("UNetMotionModel", kwargs=kwargs)


def test_a_wrong_architecture_names_the_class():
    kwargs = KWARGS["UNet3DConditionModel"] | dict(block_out_channels=(16,))
    with pytest.raises(UserError, match="UNet3DConditionModel: Must provide"):
        _ = build("UNet3DConditionModel", kwargs=kwargs).module
