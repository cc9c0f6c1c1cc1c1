"""Stable Diffusion's UNet in the spatial layers: against diffusers with the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from im3d_jax import backbones, checkpoint, config_flags, pretrained
from im3d_jax.backbones import emu_video, emu_video_checkpoints, layers
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.pretrained import Source
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
from diffusers import UNet2DConditionModel  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

B, SIDE, WORDS, TEXT = 2, 4, 5, 24
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
    identity = re.compile("_temporal/|temporal_embedding|temporal_attentions_./proj_out|conv_in/")

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


def test_what_is_not_spatial_keeps_its_values(case, loaded):
    _, initial, _, _ = case
    before, after = flatten(initial), flatten(loaded)
    assert before.keys() == after.keys()
    kept = {path for path in before if "temporal" in path}
    assert all(np.array_equal(before[path], after[path]) for path in kept)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == before.keys() - kept
    assert not np.any(after["conv_in/kernel"][:, :, 4:])


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
    block = layers.ResBlock(64, emu_video.GROUPS, 1e-5, "float32")
    x, emb, weights = draw(B, SIDE, SIDE, 32), draw(B, 128), draw(B, SIDE, SIDE, 64)
    theirs = unet.down_blocks[1].resnets[0]

    def ours(params, x, emb):
        return (block.apply({"params": params}, x[:, None], emb[:, None])[:, 0] * weights).sum()

    given = loaded["down_blocks_1"]["resnets_0"]
    given = {path: leaf for path, leaf in given.items() if "temporal" not in path}
    ours = jax.jit(jax.grad(ours, (0, 1, 2)))(given, jnp.asarray(x), jnp.asarray(emb))
    inputs = torch.tensor(x, requires_grad=True), torch.tensor(emb, requires_grad=True)
    out = theirs(inputs[0].permute(0, 3, 1, 2), inputs[1]).permute(0, 2, 3, 1)
    unet.zero_grad()
    (out * torch.tensor(weights)).sum().backward()
    gradients = pretrained.to_tensors(ours[0], lambda path: Source(pretrained.torch_name(path)))
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        assert relative(gradient, expected[path]) < 1e-4, path
    for mine, other in zip(ours[1:], inputs, strict=True):
        assert relative(mine, other.grad.numpy()) < 1e-4


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
    rejects(case, path, "cut off")


@pytest.mark.parametrize(
    "setting, words",
    [
        ('{"_class_name": "UNet3DConditionModel"}', "_class_name 'UNet3DConditionModel'"),
        ('{"attention_head_dim": 3}', "attention_head_dim 3"),
    ],
)
def test_another_family_or_other_heads_are_seen_in_its_config(case, tmp_path, setting, words):
    (tmp_path / "config.json").write_text(setting)
    rejects(case, tmp_path, words)


# ---- Weights files of ours from before the layers had diffusers' names ----

OLD_NAMES = {  # a name of today's -> the one in older files, one of each kind
    "conv_in/kernel": "conv_in/conv/kernel",
    "conv_in_temporal/kernel": "conv_in_temporal/kernel",
    "conv_norm_out/scale": "norm_out/norm/scale",
    "conv_out/bias": "conv_out/bias",
    "time_embedding/linear_2/kernel": "time_embedding_2/kernel",
    "temporal_embedding/Dense_0/kernel": "temporal_embedding/Dense_0/kernel",
    "temporal_copy_gate/conv/kernel": "temporal_copy_gate/conv/kernel",
    "text_encoder/norm1/scale": "text_encoder/norm1/scale",
    "down_blocks_1/resnets_0/conv_shortcut/kernel": "down_1_0_res/shortcut/kernel",
    "down_blocks_1/resnets_0/time_emb_proj/bias": "down_1_0_res/emb/bias",
    "down_blocks_1/resnets_0/norm2/bias": "down_1_0_res/norm2/norm/bias",
    "down_blocks_0/downsamplers_0/conv/kernel": "down_0_sample/kernel",
    "down_blocks_0/downsamplers_0/conv_temporal/bias": "down_0_sample_temporal/bias",
    "mid_block/resnets_1/conv1_temporal/kernel": "middle_1_res/conv1_temporal/kernel",
    "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/bias":
        "middle_0_attention/cross_0/to_out/bias",
    "mid_block/temporal_attentions_0/transformer_blocks_0/ff/net_2/kernel":
        "middle_0_temporal_attention/ff_0/ff_out/kernel",
    "up_blocks_0/attentions_1/norm/scale": "up_2_1_attention/norm/norm/scale",
    "up_blocks_0/upsamplers_0/conv/kernel": "up_2_sample/kernel",
    "up_blocks_1/temporal_attentions_0/place": "up_1_0_temporal_attention/place",
    "up_blocks_1/temporal_attentions_0/transformer_blocks_0/norm2/scale":
        "up_1_0_temporal_attention/norm2_0/norm/scale",
    "up_blocks_2/resnets_1/conv2/kernel": "up_0_1_res/conv2/kernel",
}  # fmt: skip


def old_file(params, path):
    """Writes parameters under their older names, by the inverse of `emu_video_checkpoints.OLD_NAMES`."""
    inverse = [(r"(?<!text_encoder)/(norm\d?|conv_norm_out)/(scale|bias)$", r"/\1/norm/\2")]
    inverse += [
        (r"/transformer_blocks_(\d+)/norm(\d)/", r"/norm\2_\1/"),
        (r"/transformer_blocks_(\d+)/attn1/", r"/self_\1/"),
        (r"/transformer_blocks_(\d+)/attn2/", r"/cross_\1/"),
        (r"/transformer_blocks_(\d+)/ff/net_0/proj/", r"/ff_\1/ff_in/"),
        (r"/transformer_blocks_(\d+)/ff/net_2/", r"/ff_\1/ff_out/"),
        (r"/to_out_0/", "/to_out/"),
        (r"/time_emb_proj/", "/emb/"),
        (r"/conv_shortcut/", "/shortcut/"),
        (r"^conv_in/", "conv_in/conv/"),
        (r"^conv_norm_out/", "norm_out/norm/"),
        (r"^time_embedding/linear_", "time_embedding_"),
        (r"^mid_block/resnets_(\d)/", r"middle_\1_res/"),
        (r"^mid_block/(temporal_)?attentions_0/", r"middle_0_\1attention/"),
        (r"^(down|up)_blocks_(\d)/resnets_(\d)/", r"\1_\2_\3_res/"),
        (r"^(down|up)_blocks_(\d)/(temporal_)?attentions_(\d)/", r"\1_\2_\4_\3attention/"),
        (r"^(down|up)_blocks_(\d)/(?:down|up)samplers_0/conv", r"\1_\2_sample"),
    ]
    tensors = {}
    for name, value in flatten(params).items():
        name = re.sub(r"^up_blocks_(\d)", lambda found: f"up_blocks_{2 - int(found[1])}", name)
        for new, old in inverse:
            name = re.sub(new, old, name)
        tensors[name] = np.asarray(value)[0, 0] if name.endswith("shortcut/kernel") else np.asarray(value)
    checkpoint.save_weights(path, traverse_util.unflatten_dict(tensors, sep="/"), {"words": []}, np.float32)
    return tensors


def test_older_weights_files_load(tmp_path):
    model = backbones.build("emu_video", config_flags.load("configs/tiny.py").backbone.kwargs.to_dict())
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    params = {path: draw(*leaf.shape, seed=i) for i, (path, leaf) in enumerate(shapes.items())}
    path = tmp_path / "old.safetensors"
    tensors = old_file(traverse_util.unflatten_dict(params, sep="/"), path)
    assert set(OLD_NAMES.values()) <= tensors.keys() and not any("_blocks_" in name for name in tensors)
    loaded, metadata = backbones.load_weights(model, path)
    loaded = flatten(loaded)
    assert metadata == {"words": []} and loaded.keys() == params.keys()
    assert all(np.array_equal(loaded[name], value) for name, value in params.items())
    for name, old in OLD_NAMES.items():
        assert np.array_equal(loaded[name].squeeze(), tensors[old].squeeze()), name


def test_a_tensor_that_an_older_file_lacks_is_named(tmp_path):
    tensors = {"conv_in/conv/kernel": draw(3, 3, 9, 32)}
    assert emu_video_checkpoints.renew(tensors, 3).keys() == {"conv_in/kernel"}
    save_file(tensors, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="lack conv_in/bias"):
        backbones.load_weights(emu_video.Model(**SIZES), tmp_path / "old.safetensors")
