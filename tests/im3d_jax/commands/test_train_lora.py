"""What `im3d train` leaves of a LoRA: merged for generation, converted; and what is refused."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import load_file

from im3d_jax import backbones, checkpoint, generator, main
from im3d_jax.commands import train
from im3d_jax.lora import files
from im3d_jax.lora.adapters import Adapters
from im3d_jax.training_settings import LoraSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lora(random_weights, random_params, tmp_path_factory):
    """(a LoRA file of the small network as training leaves it, its factors)."""
    trains = Adapters(2, 4.0, "conv1|time_emb_proj|temporal")
    params = traverse_util.unflatten_dict(random_params, sep="/")
    trained, _ = trains.split(params, jax.random.key(0))
    rng = np.random.default_rng(4)
    trained = {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in trained.items()}
    path = tmp_path_factory.mktemp("lora") / "weights.safetensors"
    files.save(path, trained, trains, Path(random_weights), {}, np.float32)
    return path, trained


def test_a_lora_is_merged_for_generation(lora, shrunk, random_params, tmp_path):
    weights, trained = lora
    config = shrunk()
    config.weights = str(tmp_path / "weights.safetensors")
    params = traverse_util.unflatten_dict(random_params, sep="/")
    checkpoint.save_weights(Path(config.weights), params, {"words": list(config.text.kwargs.words)})
    config.lora = f"{weights}=0.5"
    flat = traverse_util.flatten_dict(generator.load(config).params, sep="/")
    changed = 0
    for path, value in random_params.items():
        if f"{path}.lora_A" in trained:
            a, b = (np.float64(trained[path + end]) for end in (".lora_A", ".lora_B"))
            value = value + 0.5 * 2.0 * np.tensordot(a, b, 1)  # alpha / rank is 2
            changed += 1
        np.testing.assert_allclose(flat[path], value, rtol=1e-5, atol=1e-6)
    assert changed == len(trained) / 2


def test_convert_merges_and_takes_off_again(lora, random_weights, shrunk, tmp_path, capsys):
    """From weights of im3d to such weights; and a LoRA by itself into diffusers' layout and back."""
    config = tmp_path / "small.py"
    kwargs = shrunk().backbone.kwargs.to_dict()
    config.write_text(
        "from configs import tiny\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        f"    config.backbone.kwargs = {kwargs!r}\n"
        "    return config\n"
    )
    lora, _ = lora

    def convert(source, target, *flags):
        paths = f"--from={source}", f"--to={tmp_path / target}"
        return main.run(["convert", f"--config={config}", *paths, *flags])

    assert convert(random_weights, "merged.safetensors", f"--merge-lora={lora}") == 0
    assert convert(tmp_path / "merged.safetensors", "back.safetensors", f"--unmerge-lora={lora}") == 0
    model = backbones.build("emu_video", kwargs)
    before, merged, back = (
        traverse_util.flatten_dict(backbones.load_weights(model, path)[0], sep="/")
        for path in (random_weights, tmp_path / "merged.safetensors", tmp_path / "back.safetensors")
    )
    assert any(not np.array_equal(before[path], merged[path]) for path in before)
    for path in before:
        np.testing.assert_allclose(back[path], before[path], atol=1e-6)

    assert convert(lora, "public.safetensors", "--layout=diffusers") == 0
    assert "whose kernels the layout has no place for" in capsys.readouterr().out  # temporal ones
    assert convert(tmp_path / "public.safetensors", "ours.safetensors") == 0
    found, _ = files.read(tmp_path / "ours.safetensors", model, "emu_video")
    direct, _ = files.read(lora, model, "emu_video")
    assert found and all("temporal" not in path for path in found)
    for path, each in found.items():
        expected = 2.0 * np.tensordot(direct[path].a, direct[path].b, 1)
        np.testing.assert_allclose(np.tensordot(each.a, each.b, 1), expected, rtol=1e-5, atol=1e-7)
    assert all(x.dtype == torch.float32 for x in load_file(tmp_path / "ours.safetensors").values())

    for flags, message in (
        ((f"--merge-lora={lora}", f"--unmerge-lora={lora}"), "give one"),
        ((f"--merge-lora={lora}", "--layout=diffusers"), "convert before or after"),
        (("--merge-lora=none.safetensors",), "no file none.safetensors"),
    ):
        assert convert(random_weights, "never.safetensors", *flags) == 2
        assert message in capsys.readouterr().err
    assert convert(lora, "never.safetensors", f"--merge-lora={lora}") == 2
    assert "are a LoRA alone" in capsys.readouterr().err
    assert convert(lora, "never.safetensors", "--layout=stability") == 2
    assert "LoRAs are written in the layouts im3d and diffusers" in capsys.readouterr().err
    assert not (tmp_path / "never.safetensors").exists()


def test_mistakes_are_one_line(shrunk, random_weights, tmp_path, user_error):
    def run(**lora):
        config = shrunk(init_from=random_weights)
        config.train.lora.update(lora)
        train.train(config, tmp_path)

    with user_error("targets: 'nothing' matches no kernel"):
        run(rank=2, targets="nothing")
    with user_error("rank is 500, more than the width of"):
        run(rank=500, targets="conv1")
    config = shrunk(init_from=random_weights, trainable="temporal")
    config.train.lora.rank = 2
    with user_error("rank is 2 and trainable is 'temporal', but a LoRA trains adapters alone"):
        train.train(config, tmp_path)
    flags = [
        "--config=configs/tiny_turntable.py",
        f"--workdir={tmp_path / 'w'}",
        "--config.lora=x.safetensors",
    ]
    with user_error("config.lora adapts weights to generate with, and training would pass over it"):
        train.main(flags)


@pytest.mark.parametrize(
    ("path", "is_target"),
    [
        ("mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel", True),
        ("mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/kernel", True),
        ("mid_block/attentions_0/temporal_transformer_blocks_0/ff_in/net_0/proj/kernel", True),
        ("blocks_0/ffn/net_2/kernel", True),
        ("transformer_in/blocks_0/ff_out/kernel", True),
        ("mid_block/resnets_0/conv1/kernel", False),
        ("mid_block/attentions_0/proj_in/kernel", False),
        ("time_embedding/linear_1/kernel", False),
    ],
)
def test_the_default_targets_are_attention_and_feed_forward_layers(path, is_target):
    assert bool(re.search(LoraSettings().targets, path)) == is_target
