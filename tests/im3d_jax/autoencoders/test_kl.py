"""AutoencoderKL against diffusers with the same weights, and its weights on disk."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from im3d_jax import autoencoders, pretrained, sharding
from im3d_jax.autoencoders import kl, kl_network
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
import diffusers  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"
BATCH, FRAMES, SIDE = 2, 3, 16

SMALL = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2}
IMAGE = SMALL | {"up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 8}
PUBLIC = {
    "stable_diffusion": (diffusers.AutoencoderKL, IMAGE | {"latent_channels": 4}),
    "sdxl": (diffusers.AutoencoderKL, IMAGE | {"layers_per_block": 2, "scaling_factor": 0.13025}),
    # As Stable Diffusion 3's: no convolutions around the latents, which have a mean.
    "shifted": (
        diffusers.AutoencoderKL,
        IMAGE
        | {"latent_channels": 8, "scaling_factor": 1.5305, "shift_factor": 0.0609}
        | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    ),
    "svd": (diffusers.AutoencoderKLTemporalDecoder, SMALL | {"layers_per_block": 2}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Family -> (diffusers' module, directory that it was saved in). No parameter is where it starts."""
    torch.manual_seed(0)
    made = {}
    for family, (cls, config) in PUBLIC.items():
        module = cls(**config).eval()
        for name, parameter in module.named_parameters():
            scale = 1.0 if name.endswith("mix_factor") else 0.05
            parameter.data += scale * torch.randn_like(parameter)
        directory = tmp_path_factory.mktemp(family)
        module.save_pretrained(directory)
        made[family] = module, str(directory)
    return made


@pytest.fixture(scope="module")
def codecs(checkpoints):
    return {family: kl.load(directory) for family, (_, directory) in checkpoints.items()}


@pytest.fixture(scope="module")
def rgb():
    return np.random.default_rng(0).random((BATCH, FRAMES, SIDE, SIDE, 3), np.float32)


def encode(codec, rgb):
    return np.asarray(codec.encode(rgb, np.ones_like(rgb[..., :1])))


def channels_first(clips) -> torch.Tensor:
    return torch.from_numpy(np.array(clips)).flatten(0, 1).movedim(-1, 1)


def channels_last(images: torch.Tensor, num_frames: int = FRAMES) -> np.ndarray:
    return images.detach().movedim(1, -1).unflatten(0, (-1, num_frames)).numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    """Within `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# ---- The whole, against diffusers ----


def their_decode(module, latents: torch.Tensor) -> torch.Tensor:
    temporal = isinstance(module, diffusers.AutoencoderKLTemporalDecoder)
    return module.decode(latents, **{"num_frames": FRAMES} if temporal else {}).sample


@pytest.mark.parametrize("family", PUBLIC)
@torch.no_grad()
def test_agrees_with_diffusers(checkpoints, codecs, rgb, family):
    (module, _), codec = checkpoints[family], codecs[family]
    shift, scale = module.config.get("shift_factor") or 0, module.config.scaling_factor

    mean = module.encode(channels_first(rgb) * 2 - 1).latent_dist.mean
    latents = channels_last(mean - shift) * scale
    assert latents.std() > 0.05
    assert_close(encode(codec, rgb), latents)

    images = channels_last(their_decode(module, mean) / 2 + 0.5)
    assert images.std() > 0.1 and np.mean((images > 0) & (images < 1)) > 0.7
    decoded, alpha = codec.decode(jnp.asarray(latents))
    assert alpha is None
    assert_close(np.asarray(decoded), images.clip(0, 1))


@torch.no_grad()
def test_rgba_with_patches_agrees_with_diffusers_on_patches_as_channels(tmp_path, rgb):
    """diffusers has no patches before its AutoencoderKL, so its images are cut into them by torch."""
    module = diffusers.AutoencoderKL(**IMAGE, latent_channels=6, in_channels=16, out_channels=16).eval()
    module.register_to_config(patch_size=2)
    module.save_pretrained(tmp_path)
    codec = kl.load(str(tmp_path))
    assert codec.latent_shape(SIDE) == (SIDE // 4, SIDE // 4, 6)
    alpha = np.random.default_rng(1).random((BATCH, FRAMES, SIDE, SIDE, 1), np.float32)

    # Channels of torch's patches are ordered by channel, row, column; ours by row, column, channel.
    images = channels_first(np.concatenate([rgb, alpha], -1)) * 2 - 1
    patches = (
        torch.nn.functional.pixel_unshuffle(images, 2).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    )
    mean = module.encode(patches).latent_dist.mean
    latents = codec.encode(rgb, alpha)
    assert_close(np.asarray(latents), channels_last(mean) * module.config.scaling_factor)

    made = module.decode(mean).sample.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    made = channels_last(torch.nn.functional.pixel_shuffle(made, 2) / 2 + 0.5).clip(0, 1)
    decoded = np.concatenate(codec.decode(latents), -1)
    assert_close(decoded, made)


def test_other_numbers_of_channels_are_refused(tmp_path):
    diffusers.AutoencoderKL(**IMAGE, in_channels=5, out_channels=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="5 channels in and 5 out; autoencoder_kl builds 3"):
        kl.load(str(tmp_path))


def test_paper_size_has_the_tensors_of_diffusers():
    with torch.device("meta"):
        module = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=8,
        )
    emu = kl_network.read_architecture("")
    assert emu.latent_shape(512) == (64, 64, 8)
    shapes = jax.eval_shape(emu.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    tensors = pretrained.to_tensors(zeros, kl_network.source_of)
    assert {name: x.shape for name, x in tensors.items()} == {
        name: tuple(x.shape) for name, x in module.state_dict().items()
    }


# ---- Blocks, forward and backward ----

RES, SVD_RES = kl_network.res_block, kl_network.SpatioTemporalResBlock
BLOCKS = {
    "down": ("stable_diffusion", "encoder/down_blocks_0", kl_network.DownBlock, (32, True), 32),
    "down, last": ("stable_diffusion", "encoder/down_blocks_1", kl_network.DownBlock, (64, False), 32),
    "middle": ("stable_diffusion", "encoder/mid_block", kl_network.MidBlock, (RES,), 64),
    "up": ("stable_diffusion", "decoder/up_blocks_0", kl_network.UpBlock, (RES, 64, True), 64),
    "svd middle": ("svd", "decoder/mid_block", kl_network.MidBlock, (SVD_RES,), 64),
    "svd residual": ("svd", "decoder/up_blocks_1/resnets_0", SVD_RES, (32,), 64),
    "svd up": ("svd", "decoder/up_blocks_1", kl_network.UpBlock, (SVD_RES, 32, False), 64),
    "svd over time": (
        "svd",
        "decoder/up_blocks_1/resnets_0/temporal_res_block",
        kl_network.temporal_res_block,
        (),
        32,
    ),
}


def block_of(checkpoints, codecs, name):
    """(our module, its parameters, diffusers' module as a function of clips, itself, a clip)."""
    family, path, cls, arguments, channels = BLOCKS[name]
    params = codecs[family].params
    for part in path.split("/"):
        params = params[part]
    their_path = pretrained.torch_name(f"{path}/bias").removesuffix(".bias")
    theirs = checkpoints[family][0].get_submodule(their_path)

    def call(x):  # [B * F, C, H, W]
        if cls is kl_network.temporal_res_block:
            return theirs(x.unflatten(0, (-1, FRAMES)).transpose(1, 2), None).transpose(1, 2).flatten(0, 1)
        return theirs(x, **{"image_only_indicator": torch.zeros(BATCH, FRAMES)} if family == "svd" else {})

    # Small, so that the epsilons of the norms show.
    x = 0.01 * np.random.default_rng(1).normal(size=(BATCH, FRAMES, 4, 4, channels)).astype(np.float32)
    return cls(codecs[family].architecture, *arguments), params, call, theirs, x


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block_agrees_with_diffusers(checkpoints, codecs, name):
    ours, params, call, _, x = block_of(checkpoints, codecs, name)
    output = jax.jit(ours.apply)({"params": params}, x)
    assert_close(np.asarray(output), channels_last(call(channels_first(x))), 1e-4)


@torch.no_grad()
def test_means_far_beyond_the_spread(checkpoints, codecs):
    """Against diffusers in float64: what the block adds to activations around 100."""
    ours, params, _, theirs, x = block_of(checkpoints, codecs, "middle")
    x = 100 * x + 100
    exact = copy.deepcopy(theirs).double()(channels_first(x).double())
    output = np.asarray(jax.jit(ours.apply)({"params": params}, x))
    assert_close(output - x, channels_last(exact) - x, 1e-4)


@pytest.mark.parametrize("name", ["middle", "svd residual"])
def test_gradients_agree_with_autograd(checkpoints, codecs, name):
    ours, params, call, theirs, x = block_of(checkpoints, codecs, name)
    x = 100 * x
    leaf = channels_first(x).requires_grad_()
    output = call(leaf)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    theirs.zero_grad()
    (output * weight).sum().backward()

    def loss(params, x):
        return jnp.sum(ours.apply({"params": params}, x) * channels_last(weight))

    of_params, of_x = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert_close(np.asarray(of_x), channels_last(leaf.grad), 1e-4)
    of_params = pretrained.to_tensors(of_params, kl_network.source_of)
    expected = {name: each.grad.numpy() for name, each in theirs.named_parameters()}
    # No output depends on the bias of the keys, because softmax does not see it; it gets rounding errors.
    largest = max(np.abs(each).max() for each in expected.values())
    assert of_params.keys() == expected.keys()
    for path, gradient in expected.items():
        atol = 1e-4 * max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(of_params[path], gradient, rtol=0, atol=atol, err_msg=path)


# ---- Frames, devices, precision ----


def test_chunks_of_frames_equal_all_at_once(codecs, rgb):
    """Three frames, two at a time."""
    whole = codecs["stable_diffusion"]
    assert whole.frames_per_call > FRAMES
    chunked = dataclasses.replace(whole, frames_per_call=2)
    latents = encode(whole, rgb)
    np.testing.assert_allclose(encode(chunked, rgb), latents, atol=1e-5)
    np.testing.assert_allclose(chunked.decode(latents)[0], whole.decode(latents)[0], atol=1e-5)


@torch.no_grad()
def test_chunks_of_a_temporal_decoder_are_clips(checkpoints, codecs):
    """As those of diffusers' pipeline for SVD."""
    module = checkpoints["svd"][0]
    latents = np.random.default_rng(2).normal(size=(1, FRAMES, 8, 8, 4)).astype(np.float32)
    clips = channels_first(latents / module.config.scaling_factor).split(2)
    theirs = torch.cat([module.decode(clip, num_frames=len(clip)).sample for clip in clips])
    theirs = channels_last(theirs / 2 + 0.5).clip(0, 1)
    ours, _ = dataclasses.replace(codecs["svd"], frames_per_call=2).decode(latents)
    assert_close(np.asarray(ours), theirs)
    at_once = module.decode(torch.cat(clips), num_frames=FRAMES).sample
    assert np.abs(channels_last(at_once / 2 + 0.5).clip(0, 1) - theirs).max() > 0.01


def test_images_without_an_asset_axis(codecs, rgb):
    codec = codecs["stable_diffusion"]
    np.testing.assert_allclose(encode(codec, rgb[0]), encode(codec, rgb)[0], atol=1e-5)


def test_sharded_equals_unsharded(codecs, rgb):
    mesh = sharding.make_mesh()
    rgb = np.resize(rgb[:, :2], (8, 2, SIDE, SIDE, 3))
    codec = dataclasses.replace(codecs["stable_diffusion"], frames_per_call=1)
    replicated = jax.device_put(codec, sharding.replicated(mesh))
    latents = replicated.encode(*jax.device_put((rgb, rgb[..., :1]), sharding.along_batch(mesh)))
    assert len(latents.sharding.device_set) == 8 and not latents.sharding.is_fully_replicated
    np.testing.assert_allclose(latents, encode(codec, rgb), atol=1e-5)


def test_bfloat16_stays_close(checkpoints, codecs, rgb):
    exact = codecs["stable_diffusion"]
    rough = kl.load(checkpoints["stable_diffusion"][1], dtype="bfloat16")
    latents, rough_latents = encode(exact, rgb), encode(rough, rgb)
    images, rough_images = (np.asarray(each.decode(latents)[0]) for each in (exact, rough))
    for ours, theirs in ((rough_latents, latents), (rough_images, images)):
        assert ours.dtype == np.float32
        error = np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std()
        assert 1e-4 < error < 0.03  # 1.8% here: eight bits of mantissa, some twenty layers


def test_weights_are_arguments_and_not_constants(codecs, rgb):
    codec = codecs["stable_diffusion"]
    traced = jax.make_jaxpr(lambda codec, rgb: codec.encode(rgb, rgb[..., :1]))(codec, rgb)
    assert len(traced.jaxpr.invars) == len(jax.tree.leaves(codec.params)) + 1
    assert sum(np.size(constant) for constant in traced.consts) < 100


def test_codec_is_hashable_by_its_settings(codecs):
    codec = codecs["stable_diffusion"]
    same = dataclasses.replace(codec, params={})
    assert codec == same and hash(codec) == hash(same)
    assert codec != dataclasses.replace(codec, frames_per_call=1)
    assert codec != codecs["svd"]


# ---- Weights on disk ----


@pytest.mark.parametrize("family", PUBLIC)
def test_conversion_there_and_back_is_the_identity(checkpoints, codecs, family):
    back = pretrained.to_tensors(codecs[family].params, kl_network.source_of)
    state = checkpoints[family][0].state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def assert_same_weights(codec, other):
    assert codec.architecture == other.architecture
    jax.tree.map(np.testing.assert_array_equal, codec.params, other.params)


def test_old_names_of_attention(checkpoints, codecs, tmp_path):
    """As in the files of Stable Diffusion 1."""
    _, directory = checkpoints["stable_diffusion"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(f"{directory}/{WEIGHTS}")
    for present, name in old.items():
        tensors = {key.replace(f".{present}.", f".{name}."): x for key, x in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, tmp_path / "old.safetensors")
    sizes = {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4}
    codec = kl.load(str(tmp_path / "old.safetensors"), norm_num_groups=8, **sizes)
    assert_same_weights(codec, codecs["stable_diffusion"])


def test_file_of_a_temporal_decoder(checkpoints, codecs):
    sizes = {"block_out_channels": [32, 64], "latent_channels": 4, "temporal_decoder": True}
    codec = kl.load(f"{checkpoints['svd'][1]}/{WEIGHTS}", **sizes)
    assert_same_weights(codec, codecs["svd"])


def test_directory_of_a_pipeline(checkpoints, codecs, tmp_path):
    checkpoints["svd"][0].save_pretrained(tmp_path / "vae")
    assert_same_weights(kl.load(str(tmp_path)), codecs["svd"])


def test_build_reads_the_architecture_from_the_directory(checkpoints):
    kwargs = {"path": checkpoints["sdxl"][1], "frames_per_call": 2}
    codec = autoencoders.build("autoencoder_kl", kwargs, SIDE, (8, 8, 4))
    assert codec.architecture.scaling_factor == 0.13025 and codec.frames_per_call == 2
    with pytest.raises(UserError, match=r"config.size 32 makes latents \(16, 16, 4\)"):
        autoencoders.build("autoencoder_kl", kwargs, 32, (8, 8, 4))
    with pytest.raises(UserError, match="config.size is 15; this autoencoder takes multiples of 2"):
        autoencoders.build("autoencoder_kl", kwargs, 15, (8, 8, 4))


def test_random_weights_are_asked_for_by_name():
    tiny = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    codec = kl.load("random", **tiny)
    assert all(
        np.std(each["kernel"]) > 0.05
        for each in (codec.params["quant_conv"], codec.params["decoder"]["conv_in"])
    )
    with pytest.raises(UserError, match="config.autoencoder.kwargs.path is empty"):
        kl.load("", **tiny)


def edited(checkpoints, directory, edit_tensors=None, **config):
    """A copy of the checkpoint of Stable Diffusion with something changed."""
    _, original = checkpoints["stable_diffusion"]
    tensors = load_file(f"{original}/{WEIGHTS}")
    if edit_tensors:
        edit_tensors(tensors)
    save_file(tensors, directory / WEIGHTS)
    with open(f"{original}/config.json") as file:
        (directory / "config.json").write_text(json.dumps(json.load(file) | config))
    return str(directory)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda x: x.pop("quant_conv.bias"), r"lacks quant_conv.bias \(1 such\)"),
        (lambda x: x.update(extra=torch.ones(1)), r"has an unknown tensor extra \(1 such\)"),
        (
            lambda x: x.update({"decoder.conv_in.weight": torch.ones(64, 8, 3, 3)}),
            r"decoder.conv_in.weight is \(64, 8, 3, 3\); the config makes \S+ \(3, 3, 4, 64\)",
        ),
    ],
)
def test_wrong_tensors_are_named(checkpoints, tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        kl.load(edited(checkpoints, tmp_path, edit))


def test_truncated_file_is_named(checkpoints, tmp_path):
    path = edited(checkpoints, tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{WEIGHTS} is cut off"):
        kl.load(path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "holds AutoencoderTiny; give an AutoencoderKL or"),
        ({"latents_mean": [0.5]}, r"has latents_mean \[0.5\], which autoencoder_kl does not build"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "has AttnUpDecoderBlock2D"),
    ],
)
def test_other_architectures_are_refused(checkpoints, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        kl.load(edited(checkpoints, tmp_path, **config))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"block_out_channels": [32]}, "kwargs.block_out_channels: config.json of .* says it; remove it"),
        ({"channel_mult": [1, 2]}, "autoencoder_kl takes no argument channel_mult; remove it"),
        ({"dtype": "float16"}, "dtype is 'float16'; give one of float32, bfloat16"),
    ],
)
def test_wrong_arguments_are_named(checkpoints, kwargs, message):
    with pytest.raises(UserError, match=message):
        kl.load(checkpoints["stable_diffusion"][1], **kwargs)
