"""`im3d convert`: diffusers' files into weights that the generator loads, and back for diffusers to load."""

import re

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from im3d_jax import backbones, checkpoint, main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_init")]


@pytest.fixture(scope="module")
def directory(diffusers_svd, tmp_path_factory):
    """A config for the small SVD, and diffusers' network of its size with random weights."""
    directory = tmp_path_factory.mktemp("convert")
    diffusers_svd().save_pretrained(directory / "unet")
    (directory / "small.py").write_text(
        "from configs import svd_xt\n"
        "from im3d_jax.backbones import svd\n"
        "def get_config():\n"
        "    config = svd_xt.get_config()\n"
        "    config.backbone.kwargs = svd.SMALL\n"
        "    return config\n"
    )
    return directory


def command(directory, source, target, *flags, config="small.py"):
    """Exit code of `im3d convert` with paths relative to the directory."""
    paths = f"--from={directory / source}", f"--to={directory / target}"
    return main.run(["convert", f"--config={directory / config}", *paths, *flags])


def test_there_and_back_is_what_diffusers_saved(directory, capsys):
    assert command(directory, "unet", "ours.safetensors") == 0
    original = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")
    count = sum(tensor.numel() for tensor in original.values())
    assert f"{count:,} parameters, float32" in capsys.readouterr().out
    assert command(directory, "ours.safetensors", "back.safetensors", "--layout=diffusers") == 0
    back = load_file(directory / "back.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert command(directory, "ours.safetensors", "stability.safetensors", "--layout=stability") == 0
    assert command(directory, "stability.safetensors", "again.safetensors") == 0
    assert (directory / "again.safetensors").stat().st_size > 0
    with (
        safe_open(directory / "ours.safetensors", "np") as ours,
        safe_open(directory / "again.safetensors", "np") as again,
    ):
        assert ours.keys() == again.keys()
        assert all(np.array_equal(ours.get_tensor(name), again.get_tensor(name)) for name in ours.keys())  # noqa: SIM118


def test_half_precision_is_half_the_size_and_loads(directory):
    assert command(directory, "unet", "half.safetensors", "--dtype=bfloat16") == 0
    model = backbones.build("svd", backbones.small_kwargs("svd"))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params, metadata = checkpoint.load_weights(directory / "half.safetensors", shapes)
    assert metadata == {"words": [], "source": "unet"}
    whole = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    rounded = whole.bfloat16().float().permute(2, 3, 1, 0)
    np.testing.assert_array_equal(params["conv_in"]["kernel"], rounded)


@pytest.fixture(scope="module")
def bad_files(directory):
    """Checkpoints with something wrong each."""
    whole = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({**whole, "conv_in.weight": torch.zeros(32, 9, 3, 3)}, directory / "shape.safetensors")
    save_file({"model.layers.0.weight": torch.zeros(2)}, directory / "family.safetensors")
    cut = (directory / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:-1000]
    (directory / "cut.safetensors").write_bytes(cut)
    save_file({**whole, "conv_in.bias": torch.full((32,), 1e5)}, directory / "large.safetensors")
    (directory / "pipeline/unet").mkdir(parents=True)
    (directory / "pipeline/unet/diffusion_pytorch_model.safetensors").touch()
    (directory / "pipeline/model_index.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    "source, flags, message",
    [
        ("shape.safetensors", (), "conv_in.weight is (32, 9, 3, 3)"),
        ("family.safetensors", (), "is it of another family or size?"),
        ("cut.safetensors", (), "is cut off"),
        ("pipeline", (), "whole pipeline; give the directory of one of its models, such as"),
        ("large.safetensors", ("--dtype=float16",), "conv_in/bias holds 100000, which float16 does not hold"),
        ("large.safetensors", ("--dtype=float16", "--layout=diffusers"), "are a public checkpoint"),
        ("nothing", (), "no .safetensors weights at"),
        ("unet", ("--layout=diffusers",), "no weights at"),
        ("unet", ("--config.backbone.name=torch_hosted",), "takes no argument"),
        ("unet", ("--config.backbone.name=no_such",), "config.backbone.name: no 'no_such'"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(bad_files, source, flags, message, capsys):
    assert command(bad_files, source, "never.safetensors", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (bad_files / "never.safetensors").exists()


@pytest.mark.parametrize("name", ["svd", "emu_video", "unet3d"])
def test_what_does_not_fit_is_said_before_parameters_are_drawn(name, directory, monkeypatch, capsys):
    """Drawing them compiles for minutes where a model is large."""
    monkeypatch.setattr(backbones, "init", lambda *_: pytest.fail("draws parameters"))
    (directory / "other.py").write_text(
        "from configs import svd_xt\n"
        "from im3d_jax import backbones\n"
        "def get_config():\n"
        "    config = svd_xt.get_config()\n"
        f"    config.backbone = dict(name={name!r}, kwargs=backbones.small_kwargs({name!r}))\n"
        f"    if {name!r} == 'svd': config.backbone.kwargs['cross_attention_dim'] = 48\n"
        "    return config\n"
    )
    assert command(directory, "unet", "none.safetensors", config="other.py") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(directory / "unet") in error
    assert not (directory / "none.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("svd", dict(cross_attention_dim=48), r"attn2\.to_k\.weight is \(32, 24\)"),
        ("svd", dict(latent_shape=(4, 4, 8)), r"conv_in\.weight is \(32, 8, 3, 3\)"),
        ("emu_video", dict(text_dims=(16, 32)), r"attn2\.to_k\.weight is"),
        ("emu_video", dict(model_channels=64), r"is .*; the config makes"),
        ("unet3d", dict(cross_attention_dim=64), r"is .*; the config makes"),
        ("unet3d", dict(layers_per_block=2), r"lacks down_blocks\.0\.\w+\.1\."),
    ],
)
def test_a_config_of_other_sizes_is_refused_by_the_first_tensor(
    name, changes, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(backbones, "init", lambda *_: pytest.fail("draws parameters"))
    sizes = backbones.small_kwargs(name)
    model = backbones.build(name, sizes)
    tensors = model.to_pretrained(backbones.blank_params(model))
    arrays = {key: torch.from_numpy(each.copy()) for key, each in tensors.items()}
    save_file(arrays, tmp_path / "w.safetensors")
    (tmp_path / "other.py").write_text(
        "from configs import svd_xt\n"
        "def get_config():\n"
        "    config = svd_xt.get_config()\n"
        f"    config.backbone = dict(name={name!r}, kwargs={sizes | changes!r})\n"
        "    return config\n"
    )
    assert command(tmp_path, "w.safetensors", "none.safetensors", config="other.py") == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1 and str(tmp_path / "w.safetensors") in error


def test_averaged_weights_are_taken_where_asked_for(directory, capsys):
    whole = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")
    name = "down_blocks.0.resnets.0.spatial_res_block.conv1.bias"
    averaged = {"model_ema." + name.replace(".", ""): whole[name] + 1}
    save_file(whole | averaged, directory / "both.safetensors")
    for flags, added in (((), 0), (("--ema",), 1)):
        assert command(directory, "both.safetensors", "one.safetensors", *flags) == 0
        error = capsys.readouterr().err
        assert error.count("averaged (EMA)") == 1 and error.count("no averaged twin") == added
        found = load_file(directory / "one.safetensors")
        ours = "down_blocks_0/resnets_0/spatial_res_block/conv1/bias"
        assert torch.equal(found[ours], whole[name] + added)
    assert command(directory, "unet", "none.safetensors", "--ema") == 2
    assert "holds no averaged (EMA) weights" in capsys.readouterr().err
    assert command(directory, "one.safetensors", "none.safetensors", "--ema", "--layout=diffusers") == 2
    assert "--ema chooses" in capsys.readouterr().err


def test_only_what_was_converted_before_is_replaced(directory, capsys):
    assert (
        command(directory, "unet", "twice.safetensors")
        == command(directory, "unet", "twice.safetensors")
        == 0
    )
    save_file({"a": torch.zeros(2)}, directory / "mine.safetensors")
    before = (directory / "mine.safetensors").read_bytes()
    assert command(directory, "unet", "mine.safetensors") == 2
    assert "mine.safetensors is not of an earlier run" in capsys.readouterr().err
    assert (directory / "mine.safetensors").read_bytes() == before
    assert command(directory, "twice.safetensors", "twice.safetensors", "--layout=diffusers") == 2
    assert "twice.safetensors is what it is to read" in capsys.readouterr().err


def test_the_target_is_a_safetensors_file(directory, capsys):
    assert command(directory, "unet", "weights.bin") == 2
    assert "must end in .safetensors" in capsys.readouterr().err
