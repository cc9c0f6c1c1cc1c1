"""Pictures by tiny random pipelines in the layouts of SD 1.5 and SDXL, and what is refused."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from im3d_jax.conditions import text_to_image
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

WIDTHS = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
UNET = dict(
    sample_size=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    **WIDTHS,
)


def parts(clip, names):
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    made = {
        "vae": AutoencoderKL(sample_size=32, **blocks, **WIDTHS),
        "scheduler": EulerDiscreteScheduler(steps_offset=1),
    }
    for name in names:
        model_class = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
        made[name] = model_class.from_pretrained(clip / name)
        tokenizer = name.replace("text_encoder", "tokenizer")
        made[tokenizer] = CLIPTokenizer.from_pretrained(clip / tokenizer)
    return made


def sd15(clip):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(cross_attention_dim=32, attention_head_dim=4, **UNET)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(unet=unet, **parts(clip, ["text_encoder"]), **rest)


def sdxl(clip):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        **UNET,
    )
    return StableDiffusionXLPipeline(unet=unet, **parts(clip, ["text_encoder", "text_encoder_2"]))


@pytest.fixture(scope="module", params=[sd15, sdxl])
def pipeline(request, clip, tmp_path_factory):
    """(the pipeline, its directory)."""
    torch.manual_seed(0)
    made = request.param(clip)
    path = tmp_path_factory.mktemp(request.param.__name__)
    made.save_pretrained(path)
    made.set_progress_bar_config(disable=True)
    return made, path


def test_pictures_are_those_of_the_pipeline(pipeline):
    made, path = pipeline
    steps = []
    drawn = text_to_image.draw(path, ["a cat", "b"], [3, 4], 2, "{} x", lambda: steps.append(1))
    assert len(drawn) == 2 and len(steps) == 4
    for picture, prompt, seed in zip(drawn, ["a cat x", "b x"], [3, 4], strict=True):
        noise = torch.Generator().manual_seed(seed)
        expected = made(prompt, num_inference_steps=2, generator=noise, output_type="np").images[0]
        assert picture.shape == (32, 32, 3) and picture.dtype == np.float32
        np.testing.assert_allclose(picture, expected, atol=1e-5)
        assert 0 <= picture.min() < picture.max() <= 1
    again, other = text_to_image.draw(path, ["a cat"] * 2, [3, 5], 2, "{} x")
    np.testing.assert_array_equal(again, drawn[0])
    assert np.abs(other - again).max() > 0.01


def test_the_pipeline_is_gone_before_anything_else_runs(pipeline, monkeypatch):
    _, path = pipeline
    alive = []
    original = text_to_image.load_pipeline

    def load(path):
        loaded = original(path)
        alive.extend(weakref.ref(each) for each in (loaded.unet, loaded.vae, loaded.text_encoder))
        return loaded

    monkeypatch.setattr(text_to_image, "load_pipeline", load)
    text_to_image.draw(path, ["a"], [0], 1)
    gc.collect()
    assert len(alive) == 3 and not any(each() for each in alive)


def test_an_fp16_variant_alone_is_read(pipeline, tmp_path):
    made, path = pipeline
    copy = shutil.copytree(path, tmp_path / "fp16")
    for file in list(copy.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    (expected,), (found,) = (text_to_image.draw(each, ["a"], [0], 1) for each in (path, copy))
    np.testing.assert_array_equal(found, expected)


def test_what_cannot_be_drawn_is_one_line(pipeline, tmp_path, monkeypatch):
    _, path = pipeline

    def changed(name, change):
        copy = shutil.copytree(path, tmp_path / name)
        change(copy)
        return copy

    def rewrite(**values):
        def change(copy):
            index = json.loads((copy / "model_index.json").read_text())
            (copy / "model_index.json").write_text(json.dumps(index | values))

        return change

    def pickle(copy):
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))

    def damage(copy):
        weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])

    def lacks(folder, name):
        def change(copy):
            (weights,) = (copy / folder).glob("*.safetensors")
            tensors = load_file(weights)
            del tensors[name]
            save_file(tensors, weights, metadata={"format": "pt"})

        return change

    def overflow(copy):
        (weights,) = (copy / "unet").glob("*.safetensors")
        save_file(load_file(weights) | {"conv_in.bias": torch.full((16,), torch.inf)}, weights)

    name = "text_model.final_layer_norm.bias"
    (weights,) = (path / "text_encoder").glob("*.safetensors")
    text_tensor = next(each for each in load_file(weights) if name.endswith(each))
    cases = [
        (changed("unet", lacks("unet", "conv_in.weight")), "unet, .* lacks conv_in.weight .1 such"),
        (changed("vae", lacks("vae", "decoder.conv_out.bias")), "vae, .* lacks decoder.conv_out.bias"),
        (changed("text", lacks("text_encoder", text_tensor)), "text_encoder, .* lacks .*final_layer_norm"),
        (changed("inf", overflow), "unet: conv_in.bias holds inf"),
        (tmp_path / "nowhere", "no model_index.json in"),
        (changed("pickled", pickle), "unet has pickled weights alone; convert them"),
        (changed("damaged", damage), "is cut off"),
        (changed("code", lambda copy: (copy / "unet" / "my.py").write_text("1/0")), "Python code"),
        (changed("custom", rewrite(_class_name=["pipeline", "Mine"])), "Python code"),
        (changed("future", rewrite(_class_name="FuturePipeline")), "no FuturePipeline"),
        (changed("other", rewrite(_class_name="StableVideoDiffusionPipeline")), "images of prompts alone"),
        (changed("edit", rewrite(_class_name="StableDiffusionImg2ImgPipeline")), "images of prompts alone"),
    ]
    for wrong, words in cases:
        with pytest.raises(UserError, match=words) as error:
            text_to_image.draw(wrong, ["a"], [0], 1)
        assert "\n" not in str(error.value) and str(wrong) in str(error.value)
    for images, blanked, words in (
        (np.full((1, 8, 8, 3), np.nan), [False], "is NaN"),
        (np.zeros((1, 8, 8, 3)), [True], "safety checker blanked 'a'"),
    ):
        output = type("Output", (), dict(images=images, nsfw_content_detected=blanked))
        monkeypatch.setattr(
            text_to_image, "load_pipeline", lambda path, output=output: lambda *_, **__: output
        )
        with pytest.raises(UserError, match=words):
            text_to_image.draw(path, ["a"], [0], 1)
