"""Training of an autoencoder, against diffusers on what it wrote, scikit-image and closed forms."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.utils.flop_counter import FlopCounterMode

from im3d_jax import config_flags, sharding
from im3d_jax.autoencoders import kl as kl_module
from im3d_jax.autoencoders import kl_network
from im3d_jax.commands import train
from im3d_jax.data import procedural
from im3d_jax.tasks import autoencoder as task_module
from im3d_jax.trainable import Part
from recon_torch import hosting
from recon_torch.errors import UserError

hosting.declare()
import diffusers  # noqa: E402  (imports torchvision)

pytestmark = pytest.mark.slow

SIZE = 16


def shrunk(**settings):
    """The shipped config at 16 px, with latents of 8x8x4."""
    config = config_flags.load("configs/autoencoder_tiny.py")
    config.size = SIZE
    config.autoencoder.kwargs.update(block_out_channels=(16, 32))
    config.train.streams.frames.update(batch_size=8, num_views=2)
    config.train.update(dict(num_steps=8, warmup_steps=0, decay_steps=0, learning_rate=3e-3, log_every=1))
    config.train.checkpoint.update(every=100, weights_every=0)
    config.train.loader.num_threads = 0
    config.train.update(settings)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdir of a short run."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(shrunk(), workdir)
    return workdir


@pytest.fixture(scope="module")
def module(trained):
    return diffusers.AutoencoderKL.from_pretrained(trained / "autoencoder").eval()


def first_views(num_objects):
    return np.asarray(
        procedural.turntables(0, range(20_000, 20_000 + num_objects), size=SIZE, num_views=2)[0].rgb
    )


def channels_first(rgb):
    return torch.from_numpy(np.array(rgb)).flatten(0, 1).movedim(-1, 1) * 2 - 1


def channels_last(images):
    return images.movedim(1, -1).unflatten(0, (-1, 2)).numpy()


def test_it_learns(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[-1]["frames_loss"] < 0.5 * lines[0]["frames_loss"]


@torch.no_grad()
def test_diffusers_reads_what_was_trained(trained, module):
    rgb = first_views(3)
    codec = kl_module.load(str(trained / "autoencoder"))
    latents = codec.encode(rgb, rgb[..., :1])
    mean = module.encode(channels_first(rgb)).latent_dist.mean
    np.testing.assert_allclose(latents, channels_last(mean) * module.config.scaling_factor, atol=1e-5)
    made = channels_last(module.decode(mean).sample) / 2 + 0.5
    np.testing.assert_allclose(codec.decode(latents)[0], made.clip(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("AutoencoderKL", dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)),
        ("AutoencoderKL", dict(mid_block_add_attention=False, layers_per_block=2, norm_num_groups=8)),
        ("AutoencoderKL", dict(rgba=True)),
        ("AutoencoderKLTemporalDecoder", dict(temporal_decoder=True, layers_per_block=2)),
    ],
)
def test_diffusers_reads_every_architecture(family, sizes, tmp_path):
    sizes = dict(block_out_channels=(32, 64), layers_per_block=1, scaling_factor=0.5) | sizes
    architecture = kl_network.Architecture(**sizes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(architecture.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    kl_network.write(tmp_path, params, architecture)
    module, problems = getattr(diffusers, family).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    kernel = params["decoder"]["conv_in"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(module.decoder.conv_in.weight.detach(), kernel)
    assert kl_network.read_architecture(str(tmp_path)) == architecture
    read = kl_network.read_params(str(tmp_path), architecture)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (read, params))))


@torch.no_grad()
def test_latents_have_a_deviation_of_one(module):
    means = module.encode(channels_first(first_views(16))).latent_dist.mean.double().numpy()
    assert means.std() * module.config.scaling_factor == pytest.approx(1, rel=1e-4)
    assert abs(means.std() - 1) > 0.05


@torch.no_grad()
def test_the_loss_is_that_of_the_public_parts(trained, module):
    config = shrunk()
    config.train.autoencoder.w_chroma = 0.7
    task = task_module.build(config, sharding.make_mesh())
    params = task.load(str(trained / "autoencoder"))
    rgb, keys = first_views(3), jax.random.split(jax.random.key(1), 3)
    loss, sums = task.loss(params, (), {"images": jnp.asarray(rgb)}, keys, None)

    noise = np.stack([jax.random.normal(key, (2, SIZE // 2, SIZE // 2, 4)) for key in keys])
    posterior = module.encode(channels_first(rgb)).latent_dist
    noise = torch.from_numpy(noise).flatten(0, 1).movedim(-1, 1)
    made = (
        channels_last(module.decode(posterior.mean + posterior.std * noise).sample).astype(np.float64) / 2
        + 0.5
    )
    l1, kl = np.abs(made - rgb).mean((1, 2, 3, 4)), posterior.kl().unflatten(0, (3, 2)).sum(1) / rgb[0].size
    similar = np.mean(
        [[reference_ssim(*pair) for pair in zip(*each, strict=True)] for each in zip(made, rgb, strict=True)],
        1,
    )
    psnr = -10 * np.log10(((made.clip(0, 1) - rgb) ** 2).mean((1, 2, 3, 4)))
    to_hues = np.array([[1, -1, 0], [0.5, 0.5, -1]])
    chroma = np.abs((made - rgb) @ to_hues.T).mean((1, 2, 3, 4))
    expected = {
        "l1": l1.sum(),
        "chroma": chroma.sum(),
        "ssim": similar.sum(),
        "kl": float(kl.sum()),
        "psnr": psnr.sum(),
    }
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, rel=1e-4)
    weights = config.train.autoencoder
    total = (
        weights.w_l1 * l1
        + weights.w_chroma * chroma
        + weights.w_ssim * (1 - similar)
        + weights.w_kl * kl.numpy()
    )
    assert float(loss) == pytest.approx(total.mean(), rel=1e-4)


def reference_ssim(x, y):
    gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    _, similar = structural_similarity(x, y, channel_axis=-1, data_range=1.0, full=True, **gaussian)
    return similar[5:-5, 5:-5].mean()


def test_ssim():
    rng = np.random.default_rng(0)
    x = rng.random((3, 20, 27, 3), np.float32)
    y = (x + rng.normal(0, [[[[0.02]]], [[[0.2]]], [[[0.0]]]], x.shape)).clip(0, 1).astype(np.float32)
    expected = [
        reference_ssim(*pair) for pair in zip(x.astype(np.float64), y.astype(np.float64), strict=True)
    ]
    np.testing.assert_allclose(task_module.ssim(jnp.asarray(x), jnp.asarray(y)), expected, atol=2e-5)
    assert expected[2] == 1 and expected[1] < 0.9


def test_the_decoder_alone(trained, tmp_path):
    """The latents of a public encoder stay what they are, so that diffusion models of them stay of use."""
    start = trained / "autoencoder" / "diffusion_pytorch_model.safetensors"
    config = shrunk(init_from=str(start), trainable="^(decoder|post_quant_conv)/", num_steps=1)
    config.autoencoder.kwargs.unlock()
    config.autoencoder.kwargs.scaling_factor = 0.25
    state, _ = train.train(config, tmp_path)
    assert all(path.startswith(("decoder/", "post_quant_conv/")) for path in state.trained)
    before, after = (
        diffusers.AutoencoderKL.from_pretrained(run / "autoencoder") for run in (trained, tmp_path)
    )
    assert after.config.scaling_factor == 0.25
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith(("encoder", "quant_conv")), name


@pytest.mark.parametrize("trainable", [".*", "^decoder/"])
def test_flops_are_those_that_torch_counts(module, trainable):
    task = task_module.build(shrunk(), sharding.make_mesh())
    module.requires_grad_(trainable == ".*")
    module.decoder.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(16, 3, SIZE, SIZE)).sample.sum().backward()
    assert task.flops(Part(trainable), 8, 2) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_mistakes_are_one_line():
    config = shrunk()
    task = task_module.build(config, sharding.make_mesh())
    with pytest.raises(UserError, match="holds latents"):
        task.collate([{"id": "a", "latents": np.zeros((1, 8, 8, 4))}])
    config.size = 8
    with pytest.raises(UserError, match=r"config\.size is 8; .* needs 11"):
        task_module.build(config, sharding.make_mesh())
