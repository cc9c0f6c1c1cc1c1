"""Names and types of public checkpoints: what their writers put around them, and what is no model."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from im3d_jax import public_tensors
from im3d_jax.public_tensors import AUTOENCODER, DENOISER, choose
from recon_torch.errors import UserError

OWN = ["conv_in.weight", "down_blocks.0.resnets.1.norm1.bias"]


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        "unet.{}",
        "diffusion_model.{}",
        "model.diffusion_model.{}",
        "model.{}",
        "model.unet.{}",
        "module.unet._orig_mod.{}",
        "unet.module.{}",
    ],
)
def test_wrapped_names_are_the_models(wrap, capsys):
    names = [wrap.format(name) for name in OWN]
    assert choose(names, DENOISER, "w") == dict(zip(names, OWN, strict=True))
    assert not capsys.readouterr().err


def test_wrappers_within_names():
    wrapped = "down_blocks.0._orig_mod.resnets.1._checkpoint_wrapped_module.norm1.bias"
    assert choose([wrapped], DENOISER, "w") == {wrapped: OWN[1]}
    kept = "down_blocks.0.module.weight"  # a layer may be called so
    assert choose([kept], DENOISER, "w") == {kept: kept}


SCHEDULE = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "log_sigmas"]
SCHEDULE += ["posterior_mean_coef1", "logvar", "denoiser.sigmas", "model_ema.decay", "model_ema.num_updates"]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (SCHEDULE, f"left out {len(SCHEDULE)} buffers that are no weights, such as alphas_cumprod"),
        (["module.betas"], "1 buffers that are no weights, such as module.betas"),
        (["v_pred", "edm_vpred.sigma_max"], "2 buffers"),
        (["model_ema.diffusion_modelconv_inweight"], "1 averaged .EMA. tensors"),
        ([f"ema.{name}" for name in OWN], "2 averaged .EMA. tensors, such as ema.conv_in.weight"),
        ([f"{name}.ema" for name in OWN], "2 averaged .EMA. tensors"),
        ([f"ema_model.module.{name}" for name in OWN], "2 averaged"),
        (
            ["first_stage_model.encoder.w", "conditioner.embedders.0.w"],
            "2 tensors of other models",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_is_left_out_is_said(others, words, prefix, capsys):
    names = [prefix + name for name in OWN]
    assert choose([*names, *others], DENOISER, "w") == dict(zip(names, OWN, strict=True))
    error = capsys.readouterr().err
    assert error.startswith("im3d: w: ") and error.count("\n") == 1
    assert words.replace(".EMA.", "(EMA)") in error


@pytest.mark.parametrize(
    "wrap", ["ema.{}", "{}.ema", "{}_ema", "model_ema.{}", "ema.module.{}", "unet.{}.ema"]
)
def test_averaged_weights_alone_are_the_models(wrap, capsys):
    names = [wrap.format(name) for name in OWN]
    assert choose([*names, "decay"], DENOISER, "w") == dict(zip(names, OWN, strict=True))
    error = capsys.readouterr().err
    assert "1 buffers" in error and "averaged (EMA) weights alone, which are taken" in error


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("{}", lambda name: f"ema.{name}"),
        ("{}", lambda name: f"{name}.ema"),
        ("module.{}", lambda name: f"ema_model.module.{name}"),
        # As Stable Diffusion's trainer names them.
        (
            "model.diffusion_model.{}",
            lambda name: "model_ema." + f"diffusion_model.{name}".replace(".", ""),
        ),
    ],
)
def test_averaged_twins_are_taken_where_asked_for(plain, average, capsys):
    names = [plain.format(name) for name in OWN]
    averages = {average(name): name for name in OWN}
    chosen = choose([*names, *averages], DENOISER, "w", averaged=True)
    assert chosen == averages
    assert capsys.readouterr().err == "im3d: w holds averaged (EMA) weights, which are taken\n"
    last = list(averages)[:1]  # the other one did not train
    chosen = choose([*names, *last, "model_ema.decay"], DENOISER, "w", averaged=True)
    assert chosen == {last[0]: OWN[0], names[1]: OWN[1]}
    assert f"{names[1]} (1 such) has no averaged twin" in capsys.readouterr().err
    assert choose([*names, *averages], DENOISER, "w") == dict(zip(names, OWN, strict=True))
    assert "; --ema takes them instead" in capsys.readouterr().err


def test_a_file_without_averages_is_refused_where_they_are_asked_for():
    with pytest.raises(UserError, match="w holds no averaged .EMA. weights; leave --ema out"):
        choose(OWN, DENOISER, "w", averaged=True)


def test_each_model_of_a_file_is_found(capsys):
    names = {"unet.conv_in.weight": "conv_in.weight", "vae.encoder.conv_in.weight": "encoder.conv_in.weight"}
    for prefixes, own in zip((DENOISER, AUTOENCODER), names.items(), strict=True):
        assert choose(names, prefixes, "w") == dict([own])
        assert "1 tensors of other models" in capsys.readouterr().err


def test_what_is_not_understood_stays_for_the_model_to_refuse():
    names = ["model.diffusion_model.conv_in.weight", "surprise.weight"]
    assert choose(names, DENOISER, "w")["surprise.weight"] == "surprise.weight"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight", "x.alpha"], "w holds a LoRA .* merge it into its model"),
        (["unet.down.lora_A.weight"], "a LoRA"),
        (["conv_in.weight", "to_q.lora_A.default.weight", "to_q.base_layer.weight"], "a LoRA .1 tensors"),
        (["down_blocks.0.to_q_lora.down.weight"], "a LoRA"),
        (["down_blocks.0.processor.to_q_lora.up.weight"], "a LoRA"),
        (["transformer.to_q.lora_linear_layer.up.weight"], "a LoRA"),
        (["lycoris_x.hada_w1_a", "lycoris_x.alpha"], "LyCORIS"),
        (["x.lokr_w1"], "LyCORIS"),
        (["diffusion_model.x.diff", "diffusion_model.x.diff_b"], "LyCORIS"),
        (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "a ControlNet"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["x.qweight", "x.qzeros", "x.scales"], "quantised"),
        (["x.weight", "x.weight.absmax", "x.weight.quant_state.bitsandbytes__nf4"], "quantised"),
        (["conv_in/kernel"], "weights of im3d already"),
        (["first_stage_model.decoder.w"], "no tensors of the model"),
        (["betas"], "no tensors of the model"),
        (["unet.conv_in.weight", "model.diffusion_model.conv_in.weight"], "conv_in.weight as .* and as "),
    ],
)
def test_what_is_no_model_is_named(names, words):
    with pytest.raises(UserError, match=words):
        choose(names, DENOISER, "w")


# ---- Values ----

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def write(path, **tensors):
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, path)
    return path


def note(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


WEIGHT = torch.tensor([[1.5, -2.0, 0.25], [0.0, 448.0, 3.5]])


@pytest.mark.parametrize(
    "scales",
    [
        {"a__scale_weight": torch.tensor([0.5]), "scaled_fp8": torch.empty(2, dtype=E4M3)},
        {"a__scale_weight": torch.tensor(0.5), "a__scale_input": torch.tensor(3.0)},
        {"a__weight_scale": torch.tensor(0.5), "a__input_scale": torch.tensor(3.0)},
        {"a__weight_scale": torch.tensor(0.5), "a__comfy_quant": note(format="float8_e4m3fn")},
        {"a__weight_scale": torch.tensor([0.5, 2.0])},
        {"a__weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)},
        {"a__weight_scale_inv": torch.tensor(0.5)},
    ],
)
def test_scaled_weights_are_multiplied(tmp_path, scales):
    bias = torch.tensor([1.0, -1.0], dtype=torch.float16)
    path = write(tmp_path / "w", a__weight=WEIGHT.to(E4M3), a__bias=bias, **scales)
    scale = next(value for name, value in scales.items() if "scale_weight" in name or "weight_scale" in name)
    found = public_tensors.read(path)
    assert found.keys() == {"a.weight", "a.bias"}
    expected = WEIGHT.numpy() * scale.float().numpy().reshape(-1, 1)
    np.testing.assert_array_equal(found["a.weight"], expected)
    np.testing.assert_array_equal(found["a.bias"], [1, -1])


def test_prefixes_of_scaled_weights_and_8_bits_stored_as_bytes(tmp_path):
    bytes_ = WEIGHT.to(E5M2).view(torch.uint8)
    scales = {"unet.a.weight_scale": torch.tensor(2.0), "unet.a.comfy_quant": note(format="float8_e5m2")}
    save_file(
        {"unet.a.weight": bytes_, "unet.scaled_fp8": torch.empty(0, dtype=E5M2), **scales}, tmp_path / "w"
    )
    found = public_tensors.read(tmp_path / "w")
    assert found.keys() == {"a.weight"}
    np.testing.assert_array_equal(found["a.weight"], [[3, -4, 0.5], [0, 2 * 448, 7]])


def test_8_bits_without_scales_are_taken_as_they_are(tmp_path):
    found = public_tensors.read(write(tmp_path / "w", a__weight=WEIGHT.to(E4M3)))
    np.testing.assert_array_equal(found["a.weight"], WEIGHT)
    conv, scaled = WEIGHT[:, :, None, None].to(E4M3), WEIGHT.to(E4M3)
    tensors = dict(conv__weight=conv, a__weight=scaled, a__scale_weight=torch.tensor(2.0))
    found = public_tensors.read(write(tmp_path / "w", **tensors))
    np.testing.assert_array_equal(found["conv.weight"][..., 0, 0], WEIGHT)
    np.testing.assert_array_equal(found["a.weight"], 2 * WEIGHT)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"a__weight": WEIGHT.to(E4M3), "b__scale_weight": torch.ones(1)},
            "scale for b.weight, which",
        ),
        (
            {"a__weight": WEIGHT.to(E4M3), "b__weight": WEIGHT.to(E4M3), "a__scale_weight": torch.ones(1)},
            "lacks the scale of b.weight",
        ),
        ({"a__weight": WEIGHT.to(E4M3), "a__weight_scale": torch.ones(2, 3)}, r"shape \(2, 3\) for a.weight"),
        ({"a__weight": WEIGHT.to(E4M3), "a__weight_scale": torch.ones(3)}, "scales of blocks are not read"),
        ({"a__weight": WEIGHT.to(torch.int8), "a__weight_scale": torch.ones(1)}, "a.weight is int8"),
        ({"a__weight": WEIGHT.to(torch.int8)}, "a.weight is int8; weights that are quantised"),
        ({"a__weight": WEIGHT.to(torch.complex64)}, "a.weight is complex64"),
        ({"a__weight": 1e38 * WEIGHT.double()}, r"a.weight holds 4.48e\+40, which is too large"),
        (
            {"a__weight": WEIGHT.to(E4M3), "a__comfy_quant": note(format="nvfp4")},
            "a.comfy_quant names no format",
        ),
        (
            {"a__weight": WEIGHT.to(E4M3), "a__comfy_quant": torch.zeros(3, dtype=torch.uint8)},
            "names no format",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tensors, words):
    with pytest.raises(UserError, match=words) as error:
        public_tensors.read(write(tmp_path / "w", **tensors))
    assert str(tmp_path / "w") in str(error.value)


def test_directories_shards_and_half_precision(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.randn(3, 2, generator=generator).bfloat16() for i in range(5)}
    shards = [f"a-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: state[name] for name in ("w0", "w1")}, tmp_path / shards[0])
    save_file({name: state[name] for name in ("w2", "w3", "w4")}, tmp_path / shards[1])
    mapping = {"w0": shards[0], "w1": shards[0], "w2": shards[1], "w3": shards[1], "w4": shards[1]}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    tensors = public_tensors.read(tmp_path)
    assert tensors.keys() == state.keys()
    for name, value in tensors.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[name].float())
