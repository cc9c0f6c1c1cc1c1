"""Stable Diffusion's UNet in the spatial layers: against diffusers with the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from im3d_jax.backbones import emu_video, emu_video_network
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
from diffusers import UNet2DConditionModel  # noqa: E402  (imports torchvision)

B, K, SIDE, WORDS, TEXT = 2, 16, 4, 5, 24
SIZES = dict(
    latent_shape=(SIDE, SIDE, 4),
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    attention_levels=(0,),
    num_transformer_layers=1,
    text_dims=(TEXT,),
    max_words=WORDS,
    prediction_type="epsilon",
)
LAYOUTS = {  # Stable Diffusion -> (what config.backbone says of it, what config.json says of it)
    "1": (dict(num_heads=8), dict(attention_head_dim=8, use_linear_projection=False)),
    "2": (dict(head_dim=16), dict(attention_head_dim=(2, 4), use_linear_projection=True)),
}


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def diffusers_unet(**settings):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )
    for parameter in unet.parameters():  # also what initialisation leaves at zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.eval()


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conditioning(model, batch, image_mask=0.0):
    text = jnp.asarray(draw(B, WORDS, TEXT, seed=2)).repeat(batch // B, 0)
    image = jnp.asarray(draw(batch, *model.latent_shape, seed=3))
    # Stable Diffusion attends to the padding of a prompt as well.
    return Conditioning(image, jnp.full(batch, image_mask), (text,), (jnp.ones((batch, WORDS)),))


def initial_params(model):
    """Random ones, but for those that make the temporal layers the identity and the image unseen."""
    identity = re.compile("_temporal/|temporal_embedding|temporal_attention/proj_out|conv_in/")

    def chosen(key):
        return {path: x for path, x in flatten(model.init(key)).items() if identity.search(path)}

    key = jax.random.key(0)
    shapes, initial = flatten(jax.eval_shape(model.init, key)), jax.jit(chosen)(key)
    random = {path: draw(*leaf.shape, seed=i) for i, (path, leaf) in enumerate(shapes.items())}
    return traverse_util.unflatten_dict(random | initial, sep="/")


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, tmp_path_factory):
    """(model, its initial parameters, diffusers' network, its directory)"""
    ours, theirs = LAYOUTS[request.param]
    model, unet = emu_video.Model(**SIZES, **ours), diffusers_unet(**theirs)
    directory = tmp_path_factory.mktemp("sd")
    unet.save_pretrained(directory)
    return model, initial_params(model), unet, directory


@pytest.fixture(scope="module")
def loaded(case):
    model, initial, _, directory = case
    return model.from_pretrained(directory, initial)


@pytest.fixture(scope="module")
def apply(case):
    return jax.jit(case[0].apply)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("timestep", [[0.0, 999.0], [17.0, 500.0]])
def test_one_image_is_the_public_network(case, apply, loaded, timestep):
    model, _, unet, _ = case
    noisy, given = draw(B, SIDE, SIDE, 4), conditioning(case[0], B)
    with torch.no_grad():
        latents, text = torch.tensor(noisy.transpose(0, 3, 1, 2)), torch.tensor(np.asarray(given.text[0]))
        theirs = unet(latents, torch.tensor(timestep), text, return_dict=False)[0].permute(0, 2, 3, 1).numpy()
    ours = apply(loaded, jnp.asarray(noisy)[:, None], jnp.asarray(timestep), given)
    assert theirs.std() > 0.1
    assert relative(ours[:, 0], theirs) < 1e-4


def test_sixteen_frames_are_sixteen_images(case, apply, loaded):
    model = case[0]
    noisy, timestep = jnp.asarray(draw(B, K, SIDE, SIDE, 4)), jnp.asarray([17.0, 500.0])
    # With an image: its channels are zero until they are trained.
    video = apply(loaded, noisy, timestep, conditioning(model, B, image_mask=1.0))
    separate = noisy.reshape(B * K, 1, SIDE, SIDE, 4)
    given = conditioning(model, B * K)
    images = apply(loaded, separate, jnp.repeat(timestep, K), given)
    assert relative(video.reshape(images.shape), np.asarray(images)) < 1e-5


def test_what_is_not_spatial_keeps_its_values(case, loaded):
    _, initial, _, _ = case
    before, after = flatten(initial), flatten(loaded)
    assert before.keys() == after.keys()
    kept = {path for path in before if "temporal" in path}
    assert all(np.array_equal(before[path], after[path]) for path in kept)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == before.keys() - kept
    assert not np.any(after["conv_in/conv/kernel"][:, :, 4:])


def test_there_and_back(case, loaded, tmp_path):
    """What diffusers gets is what it gave; what has no place there is kept on the way back."""
    model, _, unet, _ = case
    noise = iter(range(10**6))
    tuned = jax.tree.map(lambda leaf: leaf + 0.1 * draw(*leaf.shape, seed=next(noise)), loaded)
    tensors = model.to_pretrained(tuned)
    save_file(tensors, tmp_path / "unet.safetensors")
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})  # strict
    back = flatten(model.from_pretrained(tmp_path / "unet.safetensors", tuned))
    assert all(np.array_equal(value, back[path]) for path, value in flatten(tuned).items())
    original = unet.state_dict()
    for name, value in model.to_pretrained(loaded).items():
        assert np.array_equal(value, original[name].numpy()), name


def test_gradients_of_a_residual_block(case, loaded):
    model, _, unet, _ = case
    block = emu_video_network.ResBlock(model, 64, emu_video_network.Block(model, None))
    name = "down_1_0_res"
    x, emb, weights = draw(B, SIDE, SIDE, 32), draw(B, 128), draw(B, SIDE, SIDE, 64)
    theirs = unet.down_blocks[1].resnets[0]

    def ours(params, x, emb):
        return (block.apply({"params": params}, x[:, None], emb[:, None])[:, 0] * weights).sum()

    given = {path: leaf for path, leaf in loaded[name].items() if "temporal" not in path}
    ours = jax.jit(jax.grad(ours, (0, 1, 2)))(given, jnp.asarray(x), jnp.asarray(emb))
    inputs = torch.tensor(x, requires_grad=True), torch.tensor(emb, requires_grad=True)
    out = theirs(inputs[0].permute(0, 3, 1, 2), inputs[1]).permute(0, 2, 3, 1)
    unet.zero_grad()
    (out * torch.tensor(weights)).sum().backward()
    compare_gradients(ours[0], theirs, {"emb": "time_emb_proj", "shortcut": "conv_shortcut"})
    for mine, other in zip(ours[1:], inputs, strict=True):
        assert relative(mine, other.grad.numpy()) < 1e-4


def compare_gradients(ours, theirs, names):
    """Gradients by parameter, of layers whose own names `names` does not change."""
    flat = flatten(ours)
    assert len(flat) == len(list(theirs.parameters()))
    for path, gradient in flat.items():
        layer, leaf = path.split("/")[0], path.split("/")[-1]
        module = getattr(theirs, names.get(layer, layer))
        expected = (module.bias if leaf == "bias" else module.weight).grad.numpy()
        if leaf == "kernel":
            expected = expected.reshape(*expected.shape[:2], *gradient.shape[:-2]).transpose(
                *range(2, gradient.ndim), 1, 0
            )
        assert relative(gradient, expected) < 1e-4, path


# ---- What users can do wrong ----


def rejects(case, path, words):
    model, initial, _, _ = case
    with pytest.raises(UserError, match=words) as error:
        model.from_pretrained(path, initial)
    assert "\n" not in str(error.value)


@pytest.fixture
def tensors(case):
    return load_file(case[3] / "diffusion_pytorch_model.safetensors")


def test_a_missing_or_unknown_or_misshaped_tensor_is_named(case, tensors, tmp_path):
    path, name = tmp_path / "unet.safetensors", "mid_block.resnets.1.conv2.weight"
    without = {key: value for key, value in tensors.items() if key != name}
    for changed, words in (
        (without, f"lacks {name}"),
        (tensors | {"add_embedding.linear_1.weight": draw(2, 2)}, "unknown tensor add_embedding"),
        (tensors | {name: draw(64, 32, 3, 3)}, rf"{name} is \(64, 32, 3, 3\)"),
        (tensors | {"conv_in.weight": draw(32, 9, 3, 3)}, r"conv_in.weight is \(32, 9, 3, 3\)"),
    ):
        save_file(changed, path)
        rejects(case, path, words)


def test_a_truncated_file_is_said_to_be(case, tmp_path):
    whole = (case[3] / "diffusion_pytorch_model.safetensors").read_bytes()
    path = tmp_path / "unet.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    rejects(case, path, "damaged")


@pytest.mark.parametrize(
    "setting, words",
    [
        ('{"_class_name": "UNet3DConditionModel"}', "_class_name UNet3DConditionModel"),
        ('{"attention_head_dim": 3}', "attention_head_dim 3"),
    ],
)
def test_another_family_or_other_heads_are_seen_in_its_config(case, tmp_path, setting, words):
    (tmp_path / "config.json").write_text(setting)
    rejects(case, tmp_path, words)
