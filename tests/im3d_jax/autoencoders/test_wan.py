"""Wan's autoencoders against diffusers' AutoencoderKLWan with the same weights; chunks; files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from im3d_jax import pretrained
from im3d_jax.autoencoders import wan, wan_checkpoints, wan_sizes
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
from diffusers import AutoencoderKLWan  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 16, 8
RNG = np.random.default_rng(0)


def in_diffusers(sizes):
    """diffusers' module of these sizes, with random weights."""
    names = "base_dim z_dim dim_mult num_res_blocks temperal_downsample is_residual"
    kwargs = {name: getattr(sizes, name) for name in names.split()}
    kwargs |= {name: list(kwargs[name]) for name in ("dim_mult", "temperal_downsample")}
    kwargs |= dict(in_channels=sizes.out_channels, out_channels=sizes.out_channels)
    kwargs |= dict(latents_mean=list(sizes.latents_mean), latents_std=list(sizes.latents_std))
    if sizes.is_residual:
        kwargs |= dict(decoder_base_dim=sizes.decoder_base_dim, patch_size=sizes.patch_size)
    torch.manual_seed(0)
    module = AutoencoderKLWan(**kwargs).eval().requires_grad_(False)
    for parameter in module.parameters():  # also what starts at zero or one
        parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope="module", params=wan_sizes.SMALL)
def pair(request, tmp_path_factory):
    """(our autoencoder, which encodes whole clips; diffusers' module)."""
    module = in_diffusers(wan_sizes.SMALL[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(directory)
    return wan.load(str(directory), frames_per_call=0), module


def draw(frames):
    """Two clips of pictures in [0, 1], and their alpha."""
    rgb = RNG.random((2, frames, HEIGHT, WIDTH, 3), np.float32)
    return rgb, np.ones_like(rgb[..., :1])


def to_torch(clips):
    return torch.from_numpy(np.moveaxis(np.asarray(clips), -1, 1).copy())


def to_numpy(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


def assert_close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert np.std(theirs) > 0.01
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def normal(sizes):
    """What the latents' channels are to be shifted and divided by."""
    if not sizes.latents_mean:
        return 0, 1
    return np.array(sizes.latents_mean), np.array(sizes.latents_std)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encodes_and_decodes_as_diffusers(pair, frames):
    ours, theirs = pair
    rgb, alpha = draw(frames)
    latents = ours.encode(rgb, alpha)
    expected = to_numpy(theirs.encode(to_torch(rgb * 2 - 1)).latent_dist.mean)
    mean, deviation = normal(ours.architecture)
    assert latents.shape[1] == (frames - 1) // 4 + 1
    assert_close(latents, (expected - mean) / deviation)

    decoded, none = ours.decode(latents)
    again = to_numpy(theirs.decode(to_torch(expected)).sample)
    assert none is None
    assert_close(decoded, np.clip(again / 2 + 0.5, 0, 1))
    assert np.mean((np.asarray(decoded) > 0) & (np.asarray(decoded) < 1)) > 0.2  # not all of it is clipped


@pytest.mark.parametrize("size", [1, 3])
def test_chunks_give_what_the_whole_clip_gives(pair, size):
    """17 pictures are the first and four chunks, or the first, one chunk of three latent frames, and one."""
    whole, _ = pair
    chunked = dataclasses.replace(whole, frames_per_call=size)
    rgb, alpha = draw(17)
    latents = whole.encode(rgb, alpha)
    assert_close(chunked.encode(rgb, alpha), np.asarray(latents), 1e-5)
    assert_close(chunked.decode(latents)[0], np.asarray(whole.decode(latents)[0]), 1e-5)


def test_no_frame_sees_a_later_one(pair):
    ours, _ = pair
    rgb, alpha = draw(9)
    changed = rgb.copy()
    changed[:, 5:] = 0
    before, after = ours.encode(rgb, alpha), ours.encode(changed, alpha)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2] - after[:, 2]).max() > 0.01


def test_gradients_of_decoding(pair):
    ours, theirs = pair
    latents = RNG.standard_normal((1, 2, 2, 2, ours.architecture.z_dim)).astype(np.float32)
    found = jax.jit(jax.grad(lambda z: (ours.decode(z)[0] ** 2).sum()))(latents)
    mean, deviation = normal(ours.architecture)
    given = torch.from_numpy(latents).requires_grad_()
    z = (given * torch.tensor(deviation) + torch.tensor(mean)).float().movedim(-1, 1)
    ((theirs.decode(z).sample / 2 + 0.5) ** 2).sum().backward()
    assert_close(found, given.grad.numpy(), 1e-3)


@pytest.mark.parametrize("frames, fit", [(2, "1 or 5"), (6, "5 or 9"), (16, "13 or 17")])
def test_other_numbers_of_pictures_are_refused(pair, frames, fit):
    with pytest.raises(UserError, match=rf"takes 4n \+ 1 pictures, not {frames}; give {fit}"):
        pair[0].encode(*draw(frames))


def test_sides_that_latents_do_not_fill_are_refused(pair):
    ours, _ = pair
    factor = ours.architecture.side_factor
    rgb = np.zeros((1, 1, 30, 32, 3), np.float32)
    with pytest.raises(UserError, match=rf"multiples of {factor} px, not pictures of 30x32; resize or crop"):
        ours.encode(rgb, rgb[..., :1])
    with pytest.raises(UserError, match=f"config.size is 30; this autoencoder takes multiples of {factor}"):
        ours.latent_shape(30)
    assert ours.latent_shape(64) == (64 // factor, 64 // factor, ours.architecture.z_dim)


# ---- Files ----

# Names and shapes in Wan's own files, one or more of each kind of layer.
WANS = {
    "wan2.1": {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.middle.2.residual.3.gamma": (384, 1, 1, 1),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.14.residual.2.bias": (96,),
        "decoder.head.0.gamma": (96, 1, 1, 1),
    },
    "wan2.2": {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.0.downsamples.2.resample.1.weight": (160, 160, 3, 3),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (320, 160, 1, 1, 1),
        "encoder.downsamples.2.downsamples.2.time_conv.weight": (640, 640, 3, 1, 1),
        "decoder.upsamples.0.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
        "decoder.upsamples.2.upsamples.0.shortcut.weight": (512, 1024, 1, 1, 1),
        "decoder.upsamples.3.upsamples.2.residual.6.bias": (256,),
        "decoder.head.2.weight": (12, 256, 3, 3, 3),
    },
}


@pytest.mark.parametrize("published", wan_sizes.PUBLISHED)
def test_published_sizes_are_diffusers_and_have_wans_names(published):
    sizes = wan_sizes.PUBLISHED[published]
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in in_diffusers(sizes).state_dict().items()}
    shapes = jax.eval_shape(lambda key: wan_checkpoints.init(sizes, key), jax.random.key(0))
    blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    ours = {
        name: tensor.shape
        for name, tensor in pretrained.to_tensors(blank, wan_checkpoints.diffusers_source).items()
    }
    assert ours == theirs
    named = {wan_checkpoints.wans_name(sizes, name): shape for name, shape in theirs.items()}
    assert len(named) == len(theirs)
    assert WANS[published].items() <= named.items()


def test_wans_own_layout_is_read(pair, tmp_path):
    ours, _ = pair
    source = wan_checkpoints.wans_source(ours.architecture)
    save_file(pretrained.to_tensors(ours.params, source), tmp_path / "vae.safetensors")
    said = dataclasses.asdict(ours.architecture)
    again = wan.load(str(tmp_path / "vae.safetensors"), **said)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"_class_name": "AutoencoderKL"},
            "holds AutoencoderKL, not Wan's autoencoder; give an AutoencoderKLW",
        ),
        ({"in_channels": 4}, "in_channels 4; wan builds 3, for RGB"),
        ({"attn_scales": [0.5]}, r"attn_scales \[0.5\], which wan does not build"),
        ({"z_dim": 8}, "latents_mean has 4 entries for 8 channels"),
        ({"base_dim": 16}, r"conv_in\.bias is \(16,\); the config makes decoder/conv_in/bias \(32,\)"),
    ],
)
def test_a_config_that_does_not_belong_is_refused(tmp_path, changes, message):
    module = in_diffusers(wan_sizes.SMALL["wan2.1"])
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        wan.load(str(tmp_path))


def test_published_sizes_by_name():
    sizes = wan_checkpoints.read_architecture("", published="wan2.2", dtype="bfloat16")
    assert sizes == dataclasses.replace(wan_sizes.PUBLISHED["wan2.2"], dtype="bfloat16")
    assert sizes.side_factor == 16 and sizes.frame_factor == 4
    with pytest.raises(UserError, match="published is 'wan3'; give one of wan2.1, wan2.2"):
        wan_checkpoints.read_architecture("", published="wan3")
