"""LoRA files of ours and public ones: written, read, merged, and refused where they do not belong."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import save_file

from im3d_jax import backbones, checkpoint
from im3d_jax.backbones import svd
from im3d_jax.lora import files, public
from im3d_jax.lora.adapters import Adapter, Adapters

SIZES = dict(latent_shape=(4, 4, 4), block_out_channels=(32,), num_attention_heads=(2,))
SIZES |= dict(layers_per_block=0, attention_levels=(0,))
MODEL = backbones.build("svd", svd.SMALL | SIZES)
SHAPES = traverse_util.flatten_dict(jax.eval_shape(MODEL.init, jax.random.key(0)), sep="/")
PLACE = "mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block/resnets_0/spatial_res_block/conv1/kernel"
OVER_FRAMES = "mid_block/resnets_0/temporal_res_block/conv1/kernel"


def adapter(path, rank=3, scale=0.5, seed=0):
    *rest, width = SHAPES[path].shape
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((*rest, rank)), rng.standard_normal((rank, width))
    return Adapter(a.astype(np.float32), b.astype(np.float32), scale)


def product(found):
    """What an adapter adds, in float64."""
    return found.scale * np.tensordot(np.float64(found.a), np.float64(found.b), 1)


def read(path):
    return files.read(path, MODEL, "svd")[0]


@pytest.fixture
def base(tmp_path):
    """A file of weights, and its parameters."""
    rng = np.random.default_rng(1)
    flat = {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in SHAPES.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    checkpoint.save_weights(tmp_path / "base.safetensors", params, {})
    return tmp_path / "base.safetensors", params


# ---- Ours ----


@pytest.fixture
def ours(base, tmp_path):
    trains = Adapters(3, 1.5, "attn1/to_q")
    (path, params), key = base, jax.random.key(0)
    trained, _ = trains.split(params, key)
    rng = np.random.default_rng(2)
    trained = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in trained.items()}
    files.save(tmp_path / "lora.safetensors", trained, trains, path, {"step": 7}, np.float32)
    return tmp_path / "lora.safetensors", trains, trained


def test_what_is_written_is_read_and_says_what_it_adapts(ours, base):
    path, trains, trained = ours
    found, metadata = files.read(path, MODEL, "svd")
    assert all(each.scale == 0.5 for each in found.values()) and PLACE in found
    for kernel, each in found.items():
        np.testing.assert_array_equal(each.a, trained[kernel + ".lora_A"])
        np.testing.assert_array_equal(each.b, trained[kernel + ".lora_B"])
    fingerprint = checkpoint.fingerprint(base[0])
    told = dict(
        rank=3, alpha=1.5, targets="attn1/to_q", base="base.safetensors", base_fingerprint=fingerprint
    )
    assert metadata == {"step": 7, "lora": told}


def test_files_are_merged_by_their_strength_and_taken_off_again(ours, base, capsys):
    path, trains, trained = ours
    file, params = base
    settings = dict(model=MODEL, name="svd", base=file)
    both = f"{path}, {path}=-0.25"
    merged = files.with_loras(both, params, **settings)
    flat, before = (traverse_util.flatten_dict(each, sep="/") for each in (merged, params))
    joined = traverse_util.flatten_dict(trains.join(before, trained), sep="/")
    for name, value in flat.items():
        expected = before[name] + 0.75 * (np.float64(joined[name]) - before[name])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    back = files.with_loras(both, merged, **settings, sign=-1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), back, params)
    assert files.with_loras("", params, **settings) is params
    assert capsys.readouterr().err == ""


def test_a_lora_of_other_weights_is_told_by_a_line(ours, base, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    checkpoint.save_weights(other, jax.tree.map(lambda x: x + 1, base[1]), {})
    files.with_loras(str(ours[0]), base[1], model=MODEL, name="svd", base=other)
    error = capsys.readouterr().err
    assert f"{ours[0]} was trained on other weights, base.safetensors, than config.weights {other}" in error


def test_a_lora_is_no_weights(ours, user_error):
    with user_error("are a LoRA alone; name it in config.lora"):
        backbones.load_weights(MODEL, ours[0])


# ---- Public layouts ----

NAMES = {
    "diffusers": (f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight"),
    "PEFT": (f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"),
    "PEFT, in the module": (f"{MODULE}.lora_A.default.weight", f"{MODULE}.lora_B.default.weight"),
    "kohya": tuple(f"lora_unet_{MODULE.replace('.', '_')}.lora_{way}.weight" for way in ("down", "up")),
    "diffusers before PEFT": (
        f"unet.{MODULE.replace('.to_q', '.processor.to_q_lora')}.down.weight",
        f"unet.{MODULE.replace('.to_q', '.processor.to_q_lora')}.up.weight",
    ),
    "the vendor's names": (
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", NAMES)
def test_public_names_are_understood(layout, tmp_path):
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    save_file(dict(zip(NAMES[layout], (a, b), strict=True)), tmp_path / "l.safetensors")
    found = read(tmp_path / "l.safetensors")
    assert [*found] == [PLACE]
    np.testing.assert_allclose(product(found[PLACE]), (b.double() @ a.double()).T, rtol=1e-6)


def flat_names(alpha):
    module = "lora_unet_" + MODULE.replace(".", "_")
    return {f"{module}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(
    "tensors, metadata, scale",
    [
        ({}, {}, 1.0),
        (flat_names(2.0), {}, 0.5),
        ({}, {"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({}, {"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({}, {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.25),
        ({}, {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 1}, 2.0),
    ],
)
def test_the_scale_is_alpha_over_rank(tensors, metadata, scale, tmp_path):
    """Where nothing tells alpha, diffusers and PEFT take it for the rank."""
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    names = NAMES["kohya" if tensors else "diffusers"]
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors | dict(zip(names, (a, b), strict=True)), tmp_path / "l.safetensors", metadata=told)
    assert read(tmp_path / "l.safetensors")[PLACE].scale == scale


def test_pefts_directory_has_its_alpha_beside(tmp_path):
    save_file(dict(zip(NAMES["PEFT"], (torch.randn(4, 32), torch.randn(32, 4)), strict=True)), tmp_path / "adapter_model.safetensors")  # fmt: skip # noqa: E501
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    assert read(tmp_path)[PLACE].scale == 0.5


@pytest.mark.parametrize("kernel", [PLACE, CONVOLUTION, OVER_FRAMES])
def test_there_and_back_adds_the_same(kernel, tmp_path):
    given = {kernel: adapter(kernel)}
    tensors, settings, left = public.write(given, MODEL, "svd")
    assert left == 0
    arrays = {name: torch.from_numpy(x) for name, x in tensors.items()}
    save_file(arrays, tmp_path / "l.safetensors", metadata={public.METADATA: settings})
    found = read(tmp_path / "l.safetensors")
    assert [*found] == [kernel] and found[kernel].scale == 1.0
    np.testing.assert_allclose(product(found[kernel]), product(given[kernel]), rtol=1e-6, atol=1e-6)


def test_a_linear_layer_stands_for_a_convolution_of_one_pixel(tmp_path):
    """kohya's files have 4 axes where a network has a 1x1 convolution, and others 2."""
    shapes = [(4, 32, 1, 1), (32, 4, 1, 1)]
    a, b = (torch.randn(shape) for shape in shapes)
    save_file(dict(zip(NAMES["kohya"], (a, b), strict=True)), tmp_path / "l.safetensors")
    expected = (b[..., 0, 0].double() @ a[..., 0, 0].double()).T
    np.testing.assert_allclose(product(read(tmp_path / "l.safetensors")[PLACE]), expected, rtol=1e-6)


def test_what_is_of_a_text_encoder_is_left_out_by_name(tmp_path, capsys):
    tensors = dict(zip(NAMES["diffusers"], (torch.randn(4, 32), torch.randn(32, 4)), strict=True))
    tensors |= {"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
    save_file(tensors, tmp_path / "l.safetensors")
    assert [*read(tmp_path / "l.safetensors")] == [PLACE]
    assert "left out 1 tensors of text encoders, such as text_encoder.layers" in capsys.readouterr().err


# ---- What is refused ----


def pair(module=MODULE, a=(4, 32), b=(32, 4)):
    return {f"unet.{module}.lora_A.weight": torch.ones(a), f"unet.{module}.lora_B.weight": torch.ones(b)}


BAD = {
    "another network": (pair("blocks.0.attn1.to_q"), {}, "adapts .*blocks.0.attn1.to_q, which svd lacks"),
    "other widths": (pair(a=(4, 48)), {}, r"of \(48, 32\) by rank 4 x 4, .* makes it \(32, 32\)"),
    "factors apart": (pair(a=(2, 32)), {}, r"are \(2, 32\) and \(32, 4\), which do not go together"),
    "no B": ({f"unet.{MODULE}.lora_A.weight": torch.ones(4, 32)}, {}, r"lacks the factor up \(B\) of"),
    "a norm": (pair("conv_norm_out"), {}, "adapts unet.conv_norm_out, which svd lacks"),
    "a change of biases": (pair() | {f"{MODULE}.diff_b": torch.ones(32)}, {}, "diff_b, which is no factor"),
    "DoRA": (pair() | {f"{MODULE}.dora_scale": torch.ones(32)}, {}, "dora_scale, which is no factor"),
    "DoRA in PEFT": (pair(), {"use_dora": True}, "PEFT's setting use_dora, which is not read"),
    "twice": (pair() | {k[len("unet.") :]: v for k, v in pair().items()}, {}, "adapts mid_block.* twice"),
    "an alpha of nothing": (pair(), {"alpha_pattern": {"x.y": 2}}, "gives an alpha to 'x.y'"),
    "an alpha that is none": (pair(), {"lora_alpha": "8"}, "the alpha '8', which is no number"),
    "whole weights": ({"conv_in.weight": torch.ones(2)}, {}, "holds no adapters|no factor"),
    "ours of other paths": (
        {"a/kernel.lora_A": torch.ones(4, 2), "a/kernel.lora_B": torch.ones(2, 4)}, {},
        "adapts a/kernel .1 such., which svd lacks",
    ),
    "ours with one factor": ({f"{PLACE}.lora_B": torch.ones(4, 32)}, {}, "has .*lora_B and lacks .*lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_belong_is_one_line(case, tmp_path, user_error):
    tensors, metadata, message = BAD[case]
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors, tmp_path / "l.safetensors", metadata=told)
    with user_error(message):
        read(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing.safetensors", "no file nothing.safetensors; give PATH or PATH=STRENGTH"),
        (
            "a.safetensors=strong",
            "'a.safetensors=strong' does not end in =STRENGTH, a number from -100 to 100",
        ),
        ("a.safetensors=nan", "does not end in =STRENGTH"),
        ("a.safetensors=1e9", "does not end in =STRENGTH"),
    ],
)
def test_names_of_files_that_are_none_are_one_line(text, message, user_error):
    with user_error(message):
        files.parse(text)


def test_a_hosted_model_takes_no_lora(tmp_path, user_error):
    hosted = type("Hosted", (svd.Model,), {"init": lambda self, key: {}})
    save_file(pair(), tmp_path / "l.safetensors")
    with user_error("the weights of torch_hosted are no JAX arrays"):
        files.read(tmp_path / "l.safetensors", hosted(**svd.SMALL), "torch_hosted")


def test_a_layout_with_a_place_for_none_is_one_line(user_error):
    model = backbones.build("emu_video", backbones.small_kwargs("emu_video"))
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    kernel = next(path for path in shapes if "temporal" in path and path.endswith("/kernel"))
    given = {
        kernel: Adapter(
            np.ones((*shapes[kernel].shape[:-1], 2), np.float32), np.ones((2, 2), np.float32), 1.0
        )
    }
    with user_error("has a place for none of the adapters"):
        public.write(given, model, "emu_video")


def test_what_is_written_says_what_loaders_ask_for(tmp_path):
    tensors, settings, _ = public.write({PLACE: adapter(PLACE)}, MODEL, "svd")
    told = json.loads(settings)
    assert (told["unet.r"], told["unet.lora_alpha"], told["unet.target_modules"]) == (3, 3, [MODULE])
    assert {name: x.shape for name, x in tensors.items()} == {
        f"unet.{MODULE}.lora_A.weight": (3, 32),
        f"unet.{MODULE}.lora_B.weight": (32, 3),
    }
