"""LoRAs that PEFT and diffusers load, and theirs that we load: the same prediction with the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import load_file, save_file

from im3d_jax import backbones
from im3d_jax.backbones import emu_video, svd
from im3d_jax.lora import files, public
from im3d_jax.lora.adapters import Adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"]
"""Linear layers, and convolutions within frames and over them."""


def close(found, expected):
    difference = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    assert difference <= 1e-4 * float(np.abs(expected).max())


@pytest.fixture(scope="module")
def small_svd(diffusers_svd, tmp_path_factory):
    """diffusers' network, our model, and the parameters of both."""
    directory = tmp_path_factory.mktemp("svd")
    module, model = diffusers_svd(), backbones.build("svd", svd.SMALL)
    module.save_pretrained(directory)
    return module, model, model.from_pretrained(directory, backbones.blank_params(model))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shape = svd.SMALL["latent_shape"]
    return [
        rng.standard_normal(each).astype(np.float32) for each in ((1, 2, *shape), (1, *shape), (1, 1, 24))
    ]


def ours(model, params, inputs):
    noisy, image, tokens = map(jnp.asarray, inputs)
    given = model.empty_conditioning(1)._replace(image=image, image_mask=jnp.ones(1), image_tokens=tokens)
    return jax.jit(model.apply)(params, noisy, jnp.full(1, 0.4), given)


def theirs(module, model, inputs):
    """diffusers' network is given the image on channels, and what our model tells each frame."""
    noisy, image, tokens = map(torch.from_numpy, inputs)
    image = image[:, None].expand_as(noisy) / model.latent_scale
    told = torch.tensor([[model.fps - 1, model.motion_bucket, model.noise_aug]])
    frames = torch.cat([noisy, image], -1).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        made = module(frames, torch.tensor(0.4), tokens, told).sample
    return made.permute(0, 1, 3, 4, 2).numpy()


def with_adapters(module, **settings):
    """Puts random adapters of PEFT into a copy of a module, all of whose factors are random."""
    import copy

    adapted = copy.deepcopy(module)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **settings)
    peft.inject_adapter_in_model(config, adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn_like(value))
    return adapted


@pytest.mark.parametrize(
    "settings", [dict(lora_alpha=8), dict(lora_alpha=8, use_rslora=True, alpha_pattern={"attn1.to_q": 2})]
)
def test_adapters_of_peft_give_our_network_the_same(settings, small_svd, inputs, tmp_path):
    module, model, params = small_svd
    adapted = with_adapters(module, **settings)
    tensors = peft.get_peft_model_state_dict(adapted)
    kept = {f"unet.{name}": x.contiguous() for name, x in tensors.items()}
    told = {f"unet.{key}": value for key, value in settings.items()}
    save_file(kept, tmp_path / "l.safetensors", metadata={public.METADATA: json.dumps(told)})
    found, _ = files.read(tmp_path / "l.safetensors", model, "svd")
    assert len(found) == len(kept) / 2
    expected = theirs(adapted, model, inputs)
    assert np.abs(expected - theirs(module, model, inputs)).max() > 0.01 * np.abs(expected).max()
    close(ours(model, files.add(params, found, 1.0), inputs), expected)


def test_peft_loads_ours(small_svd, inputs):
    """As diffusers loads it: PEFT's settings are what the metadata tells."""
    module, model, params = small_svd
    rng = np.random.default_rng(2)
    given = {}
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        if path.endswith("/kernel") and any(part in path for part in ("to_q", "to_out_0", "ff/", "conv1")):
            a, b = rng.standard_normal((*x.shape[:-1], 3)), rng.standard_normal((3, x.shape[-1]))
            given[path] = Adapter(a.astype(np.float32) * 0.3, b.astype(np.float32) * 0.3, 0.5)
    tensors, told, _ = public.write(given, model, "svd")
    settings = {key.removeprefix("unet."): value for key, value in json.loads(told).items()}
    import copy

    adapted = copy.deepcopy(module)
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), adapted)
    arrays = {name.removeprefix("unet."): torch.from_numpy(x) for name, x in tensors.items()}
    loaded = peft.set_peft_model_state_dict(adapted, arrays)
    assert not loaded.unexpected_keys and not any("lora" in key for key in loaded.missing_keys)
    close(ours(model, files.add(params, given, 1.0), inputs), theirs(adapted, model, inputs))


def test_diffusers_loads_ours_and_writes_what_we_read(tmp_path):
    """A UNet2DConditionModel, which is the spatial half of `emu_video`, through diffusers' own loader."""
    import diffusers

    sizes = dict(latent_shape=(8, 8, 4), model_channels=32, channel_mult=(1,), num_res_blocks=(1,))
    sizes |= dict(attention_levels=(0,), num_transformer_layers=1, head_dim=16, text_dims=(12,))
    model = emu_video.Model(**sizes, temporal_span=("pixel",))
    torch.manual_seed(0)
    module = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2, use_linear_projection=True,
    )  # fmt: skip
    module.save_pretrained(tmp_path / "unet")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params = model.from_pretrained(tmp_path / "unet", blank)
    given = {}
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        if path.endswith("/kernel") and "attn" in path and "temporal" not in path:
            a, b = rng.standard_normal((*x.shape[:-1], 2)), rng.standard_normal((2, x.shape[-1]))
            given[path] = Adapter(a.astype(np.float32) * 0.3, b.astype(np.float32) * 0.3, 0.5)
    tensors, told, _ = public.write(given, model, "emu_video")
    arrays = {name: torch.from_numpy(x) for name, x in tensors.items()}
    save_file(arrays, tmp_path / "l.safetensors", metadata={"format": "pt", public.METADATA: told})

    module.load_lora_adapter(str(tmp_path / "l.safetensors"), prefix="unet", adapter_name="ours")
    noisy, text = rng.standard_normal((1, 8, 8, 4)), rng.standard_normal((1, 5, 12))
    noisy, text = np.float32(noisy), np.float32(text)
    with torch.no_grad():
        sample = torch.from_numpy(noisy).permute(0, 3, 1, 2)
        expected = module(sample, 30, torch.from_numpy(text)).sample.permute(0, 2, 3, 1).numpy()
    conditions = model.empty_conditioning(1)._replace(
        text=(jnp.asarray(text),), text_mask=(jnp.ones((1, 5)),)
    )
    apply = jax.jit(model.apply)
    merged = files.add(params, given, 1.0)
    close(apply(merged, jnp.asarray(noisy)[:, None], jnp.full(1, 30.0), conditions)[:, 0], expected)

    module.save_lora_adapter(tmp_path / "saved", adapter_name="ours")
    (saved,) = (tmp_path / "saved").iterdir()
    assert len(load_file(saved)) == 2 * len(given)
    back, _ = files.read(saved, model, "emu_video")
    again = files.add(params, back, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)
