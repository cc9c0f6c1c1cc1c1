"""ModelScope and I2VGen-XL against diffusers with the same random weights: whole, by block, backwards."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from im3d_jax import pretrained
from im3d_jax.backbones import layers, unet3d, unet3d_checkpoints
from im3d_jax.backbones.unet import DownBlock
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
from diffusers import I2VGenXLUNet, UNet3DConditionModel  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

B, WORDS, TEXT = 2, unet3d.SMALL["max_words"], unet3d.SMALL["cross_attention_dim"]
THREE_LEVELS = dict(block_out_channels=(32, 64, 64), latent_shape=(8, 8, 8))
MODELS = {
    "none": unet3d.Model(**unet3d.SMALL | dict(image="none")),
    "channels": unet3d.Model(**unet3d.SMALL | THREE_LEVELS | dict(image="channels")),
    "i2vgen": unet3d.Model(**unet3d.SMALL),
}
FILE = "diffusion_pytorch_model.safetensors"


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()


def diffusers_unet(model):
    torch.manual_seed(0)
    levels, channels = len(model.block_out_channels), model.latent_shape[-1]
    unet = (I2VGenXLUNet if model.image == "i2vgen" else UNet3DConditionModel)(
        in_channels=2 * channels + 1 if model.image == "channels" else channels,
        out_channels=channels,
        block_out_channels=model.block_out_channels,
        layers_per_block=1,
        norm_num_groups=model.norm_num_groups,
        cross_attention_dim=TEXT,
        attention_head_dim=model.head_dim,
        down_block_types=(*["CrossAttnDownBlock3D"] * (levels - 1), "DownBlock3D"),
        up_block_types=("UpBlock3D", *["CrossAttnUpBlock3D"] * (levels - 1)),
    )
    for parameter in unet.parameters():  # also what initialisation leaves at zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.eval()


@pytest.fixture(scope="module")
def unets():
    return {image: diffusers_unet(model) for image, model in MODELS.items()}


@pytest.fixture(scope="module")
def directories(unets, tmp_path_factory):
    """Kind of image -> a directory of diffusers."""
    paths = {image: tmp_path_factory.mktemp(image) for image in unets}
    for image, unet in unets.items():
        unet.save_pretrained(paths[image])
    return paths


def zeros(model):
    """Parameters that a checkpoint replaces."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.fixture(scope="module")
def loaded(directories):
    return {image: model.from_pretrained(directories[image], zeros(model)) for image, model in MODELS.items()}


def conditioning(model, batch, image_mask):
    text, tokens = draw(B, WORDS, TEXT, seed=2), draw(B, 1, TEXT, seed=3)
    image = draw(B, *model.latent_shape, seed=4)
    text, tokens, image = (jnp.asarray(x).repeat(batch // B, 0) for x in (text, tokens, image))
    # The public networks attend to the padding of a prompt as well.
    return Conditioning(image, jnp.asarray(image_mask), (text,), (jnp.ones((batch, WORDS)),), tokens)


def expected(unet, model, noisy, timestep, given):
    """What diffusers' network makes of it: arguments as its pipeline would give them."""

    def frames(x):
        return torch.tensor(np.moveaxis(np.array(x), -1, 1))

    mask = np.asarray(given.image_mask)[:, None, None, None]
    text, image = torch.tensor(np.array(given.text[0])), np.asarray(given.image) * mask
    with torch.no_grad():
        if model.image == "i2vgen":
            distance = np.linspace(0, 1, noisy.shape[1], dtype=np.float32).reshape(-1, 1, 1, 1)
            shown = np.broadcast_to(distance, noisy.shape) * mask[:, None]
            shown[:, 0] = image
            tokens = torch.tensor(np.array(given.image_tokens) * mask[..., 0])
            rate = torch.full((B,), model.fps)
            out = unet(frames(noisy), torch.tensor(timestep), rate, frames(shown), tokens, text)
        else:
            if model.image == "channels":
                shown = np.zeros((*noisy.shape[:-1], noisy.shape[-1] + 1), np.float32)
                shown[:, 0] = np.concatenate([image, np.ones_like(image[..., :1]) * mask], -1)
                noisy = np.concatenate([noisy, shown], -1)
            out = unet(frames(noisy), torch.tensor(timestep), text)
    return np.moveaxis(out.sample.numpy(), 1, -1)


@pytest.mark.parametrize("image, frames", [("none", 1), ("channels", 3), ("i2vgen", 4)])
def test_the_whole_network_is_diffusers(image, frames, unets, loaded):
    """Two assets of different text and noise level, with and without an image."""
    model, apply = MODELS[image], jax.jit(MODELS[image].apply)
    noisy = draw(B, frames, *model.latent_shape)
    for timestep, given in (((3.0, 998.0), (1.0, 0.0)), ((500.0, 20.0), (1.0, 1.0))):
        inputs = noisy, np.array(timestep, np.float32), conditioning(model, B, given)
        theirs = expected(unets[image], model, *inputs)
        assert theirs.std() > 0.1
        ours = apply(loaded[image], *inputs)
        assert ours.dtype == jnp.float32 and relative(ours, theirs) < 1e-4


# ---- Blocks, forwards and backwards ----

K, SIDE, WIDTH = 3, 4, 32


def spatial(x):
    """[B, K, h, w, c] -> the batch [B K, c, h, w] of diffusers' blocks."""
    return x.reshape(-1, *x.shape[2:]).permute(0, 3, 1, 2)


def resnet(theirs, x, other):
    return theirs(spatial(x), other.repeat_interleave(K, 0))


def temporal_convs(theirs, x, other):
    return theirs(spatial(x), num_frames=K)


def spatial_transformer(theirs, x, other):
    text = other.reshape(B, 4, TEXT).repeat_interleave(K, 0)
    return theirs(spatial(x), encoder_hidden_states=text, return_dict=False)[0]


def temporal_transformer(theirs, x, other):
    return theirs(spatial(x), num_frames=K, return_dict=False)[0]


SPEC = MODELS["none"]
BLOCKS = {  # name among the modules of "none" -> (their call, our module and the arguments it takes)
    "resnets_0": (
        resnet,
        layers.ResBlock(WIDTH, SPEC.norm_num_groups, 1e-5, SPEC.dtype),
        lambda x, other: (x, other[:, None]),
    ),
    "temp_convs_0": (temporal_convs, unet3d.TemporalConvs(SPEC), lambda x, other: (x,)),
    "attentions_0": (
        spatial_transformer,
        unet3d.SpatialTransformer(SPEC),
        lambda x, other: (x, unet3d.Context(other.reshape(B, 4, TEXT), jnp.ones((B, 4)))),
    ),
    "temp_attentions_0": (
        temporal_transformer,
        unet3d.TemporalTransformer(SPEC, WIDTH),
        lambda x, other: (x,),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients_of_a_block(name, unets, loaded):
    call, ours, arguments = BLOCKS[name]
    theirs = unets["none"].down_blocks[0].get_submodule(name.replace("_0", ".0"))
    x, other, weights = (
        draw(B, K, SIDE, SIDE, WIDTH),
        draw(B, 4 * TEXT),
        draw(B, K, SIDE, SIDE, WIDTH, seed=5),
    )

    def weighted(params, x, other):
        out = ours.apply({"params": params}, *arguments(x, other))
        return (out * weights).sum(), out

    params = loaded["none"]["down_blocks_0"][name]
    gradients, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(params, x, other)

    inputs = torch.tensor(x, requires_grad=True), torch.tensor(other, requires_grad=True)
    theirs.zero_grad()
    result = call(theirs, *inputs).permute(0, 2, 3, 1).reshape(x.shape)
    (result * torch.tensor(weights)).sum().backward()
    assert relative(out, result.detach()) < 1e-4
    assert relative(gradients[1], inputs[0].grad) < 1e-4
    if inputs[1].grad is not None:
        assert relative(gradients[2], inputs[1].grad) < 1e-4
    by_name = pretrained.to_tensors(gradients[0], unet3d_checkpoints.source_of)
    reference = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert by_name.keys() == reference.keys()
    # Relative to all of them: a gradient of keys is that of nearly equal queries, small and full of rounding.
    largest = max(np.abs(gradient).max() for gradient in reference.values())
    for key, gradient in reference.items():
        assert np.abs(by_name[key] - gradient).max() < 1e-4 * largest, key


def test_recomputation_is_of_every_layer_and_changes_no_name(loaded):
    x, emb = jnp.asarray(draw(B, K, SIDE, SIDE, WIDTH)), jnp.asarray(draw(B, 1, 4 * WIDTH))
    context = unet3d.Context(jnp.asarray(draw(B, 4, TEXT)), jnp.ones((B, 4)))

    def num_recomputed(remat):
        block = DownBlock(unet3d.parts(dataclasses.replace(SPEC, remat=remat)), 0)

        def loss(params):
            return block.apply({"params": params}, x, emb, context)[0].sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(loaded["none"]["down_blocks_0"])
        return sum("differentiated" in equation.params for equation in jaxpr.eqns)

    assert num_recomputed("") == 0 and num_recomputed("nothing_saveable") == 4


def test_masked_words_have_no_influence(loaded):
    block, x = unet3d.SpatialTransformer(SPEC), jnp.asarray(draw(B, K, SIDE, SIDE, WIDTH))
    mask = jnp.array([[1.0, 1, 0, 0], [1, 0, 0, 0]])

    @jax.jit
    def apply(words):
        params = loaded["none"]["down_blocks_0"]["attentions_0"]
        return block.apply({"params": params}, x, unet3d.Context(words, mask))

    words = jnp.asarray(draw(B, 4, TEXT))
    before, padded = apply(words), apply(jnp.where(mask[..., None] > 0, words, 9.0))
    assert np.array_equal(before, padded)
    assert np.abs(apply(words + 1) - before).max() > 1e-3


@pytest.mark.parametrize("size, number", [(8, 32), (40, 32), (64, 32), (32, 32)])
def test_averages_are_adaptive_pooling(size, number):
    x = draw(2, size, size + 8, 3)
    ours = unet3d.averages(jnp.asarray(x), number)
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x).permute(0, 3, 1, 2), number)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


# ---- Checkpoints ----


@pytest.mark.parametrize("image", MODELS)
def test_there_and_back(image, unets, loaded):
    model, original = MODELS[image], unets[image].state_dict()
    tensors = model.to_pretrained(loaded[image])
    assert tensors.keys() == original.keys()
    assert all(np.array_equal(value, original[name].numpy()) for name, value in tensors.items())


def test_what_was_trained_here_opens_in_diffusers(unets, loaded, tmp_path):
    tuned = jax.tree.map(lambda leaf: leaf + 1, loaded["channels"])
    tensors = MODELS["channels"].to_pretrained(tuned)
    save_file(tensors, tmp_path / FILE)
    unets["channels"].save_config(tmp_path)
    opened = UNet3DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert opened.conv_in.weight.shape[1] == 17
    assert all(np.array_equal(tensors[name], value) for name, value in opened.state_dict().items())


def test_a_text_to_video_checkpoint_leaves_the_images_channels_as_they_are(directories, loaded):
    model = dataclasses.replace(MODELS["none"], image="channels")
    start = zeros(MODELS["none"])
    start["conv_in"]["kernel"] = np.full((3, 3, 9, 32), 0.5, np.float32)
    kernel = model.from_pretrained(directories["none"], start)["conv_in"]["kernel"]
    assert np.array_equal(kernel[:, :, :4], loaded["none"]["conv_in"]["kernel"])
    assert (kernel[:, :, 4:] == 0.5).all()


def rejects(image, params, path, words):
    with pytest.raises(UserError, match=words) as error:
        MODELS[image].from_pretrained(path, params[image])
    assert "\n" not in str(error.value)


def test_checkpoints_of_another_family_or_size_are_named(loaded, directories, tmp_path):
    rejects("none", loaded, directories["i2vgen"], "_class_name 'I2VGenXLUNet'")
    bare = directories["none"] / FILE
    rejects("i2vgen", loaded, bare, "lacks context_embedding.0.bias")
    rejects("none", loaded, directories["i2vgen"] / FILE, "unknown tensor context_embedding")
    (tmp_path / "config.json").write_text('{"attention_head_dim": 64}')
    rejects("none", loaded, tmp_path, "attention_head_dim 64, config.backbone makes it 8")

    tensors, name = load_file(bare), "mid_block.temp_convs.1.conv4.3.weight"
    path = tmp_path / "unet.safetensors"
    save_file(tensors | {name: draw(64, 64, 1, 3, 1)}, path)
    rejects("none", loaded, path, rf"{name} is \(64, 64, 1, 3, 1\)")
    path.write_bytes(bare.read_bytes()[:-1000])
    rejects("none", loaded, path, "cut off")


def test_bfloat16_inside_float32_outside(loaded):
    model = dataclasses.replace(MODELS["i2vgen"], dtype="bfloat16")
    inputs = draw(B, 2, *model.latent_shape), np.ones(B, np.float32), conditioning(model, B, (1.0, 0.0))
    jaxpr = jax.make_jaxpr(model.apply)(loaded["i2vgen"], *inputs)
    assert [out.dtype for out in jaxpr.out_avals] == [jnp.float32]
    products = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(products) > 10 and all(eqn.outvars[0].aval.dtype == jnp.bfloat16 for eqn in products)


def test_the_public_size_has_the_public_names():
    """I2VGen-XL has all that ModelScope has, and more."""
    shapes = flatten(jax.eval_shape(unet3d.Model(image="i2vgen").init, jax.random.key(0)))
    with torch.device("meta"):
        theirs = I2VGenXLUNet().state_dict()
    assert {unet3d_checkpoints.source_of(path).name for path in shapes} == theirs.keys()
    assert sum(leaf.size for leaf in shapes.values()) == sum(leaf.numel() for leaf in theirs.values())
    temporal = sum(
        leaf.size for path, leaf in shapes.items() if re.search(unet3d.Model.temporal_pattern, path)
    )
    assert temporal == sum(
        leaf.numel() for name, leaf in theirs.items() if re.search(unet3d.Model.temporal_pattern, name)
    )
