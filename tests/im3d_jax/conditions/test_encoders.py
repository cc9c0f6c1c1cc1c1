"""Text and image encoders against transformers and diffusers with the same tiny random weights."""

import json
import shutil
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from im3d_jax.conditions import encoders
from im3d_jax.conditions.encoders import ImageEncoder, PretrainedText
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

EMPTY = 56  # the end token, which also pads


def clip_ids(words, length, pad=EMPTY):
    """Token ids of words of one letter or "cat", written out by hand."""
    ids = [55, *(54 if word == "cat" else 27 + string.ascii_lowercase.index(word) for word in words), 56]
    return torch.tensor([ids + [pad] * (length - len(ids))])


@pytest.mark.parametrize(
    "name, layer, pad", [("text_encoder", -1, EMPTY), ("text_encoder_2", -2, 0), ("text_encoder_2", -1, 0)]
)
def test_clip_tokens_are_those_of_transformers(clip, name, layer, pad):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model_class = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
    model = model_class.from_pretrained(clip / name)
    text = PretrainedText([dict(kind="clip", path=str(clip / name), max_length=16, layer=layer)])
    (found,), (mask,) = text.encode(["a cat", "", "B cat x"])
    assert found.dtype == mask.dtype == np.float32 and mask.shape == (3, 16) and mask.all()
    for row, words in zip(found, (["a", "cat"], [], ["b", "cat", "x"]), strict=True):
        with torch.no_grad():
            output = model(clip_ids(words, 16, pad), output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        np.testing.assert_allclose(row, expected[0], rtol=1e-5, atol=1e-5)
    assert text.shapes == ((16, 32),) == (found.shape[1:],)


def test_public_layouts_of_clip_are_read(clip, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    def encode(path):
        settings = dict(kind="clip", path=str(path), tokenizer=str(clip / "tokenizer"), max_length=16)
        return PretrainedText([settings]).encode(["a cat"])[0][0]

    older = shutil.copytree(clip / "text_encoder", tmp_path / "older")  # as the files of SD 1.5 have it
    tensors = load_file(older / "model.safetensors")
    prefixed = {f"text_model.{key}": value for key, value in tensors.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(prefixed, older / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(encode(older), encode(clip / "text_encoder"))

    config = json.loads((clip / "text_encoder" / "config.json").read_text())
    vision = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    whole = CLIPModel(CLIPConfig(text_config=config, vision_config=vision | dict(patch_size=112)))
    whole.load_state_dict(prefixed, strict=False)
    whole.save_pretrained(tmp_path / "whole")
    np.testing.assert_array_equal(encode(tmp_path / "whole"), encode(clip / "text_encoder"))


def test_t5_ignores_its_padding(t5):
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(t5).eval()
    text = PretrainedText([dict(kind="t5", path=str(t5), max_length=9)])
    (found,), (mask,) = text.encode(["a cat", ""])
    assert mask.tolist() == [[1] * 4 + [0] * 5, [1] + [0] * 8]
    for row, ids in zip(found, ([3, 5, 4, 1], [1]), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(row[: len(ids)], expected, rtol=1e-5, atol=1e-5)
    unmasked = PretrainedText([dict(kind="t5", path=str(t5), max_length=9, mask_padding=False)])
    (attended,), (everything,) = unmasked.encode(["a cat"])
    assert everything.all() and np.abs(attended[0, :4] - found[0, :4]).max() > 1e-3


@pytest.fixture(scope="module")
def umt5(t5, tmp_path_factory):
    """A directory with a whole UMT5 and the tokeniser of the T5."""
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    root = tmp_path_factory.mktemp("umt5")
    for file in t5.glob("tokenizer*"):
        (root / file.name).write_bytes(file.read_bytes())
    config = UMT5Config(vocab_size=31, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    torch.manual_seed(0)
    model = UMT5ForConditionalGeneration(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(root)
    return root


def test_umt5_has_zeros_for_its_padding(umt5):
    """As diffusers' pipelines of Wan give them: each prompt as if it had no padding, and zeros up to 512."""
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(umt5).eval()
    text = PretrainedText([dict(kind="umt5", path=str(umt5), max_length=512)])
    assert text.shapes == ((512, 24),)
    (found,), (mask,) = text.encode(["a cat", ""])
    assert mask.sum(1).tolist() == [4, 1]
    for row, ids in zip(found, ([3, 5, 4, 1], [1]), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0]
        assert expected.std() > 0.1
        np.testing.assert_allclose(row[: len(ids)], expected, rtol=1e-5, atol=1e-5)
        assert not row[len(ids) :].any()


def test_umt5_as_wans_pipeline_encodes(umt5):
    from diffusers import WanPipeline
    from transformers import T5Tokenizer, UMT5EncoderModel

    pipeline = WanPipeline.__new__(WanPipeline)  # its other parts play no role here
    parts = dict(
        tokenizer=T5Tokenizer.from_pretrained(umt5), text_encoder=UMT5EncoderModel.from_pretrained(umt5)
    )
    for name, part in parts.items():
        object.__setattr__(pipeline, name, part)
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(  # noqa: SLF001 - the public method wants a transformer
            ["a cat", "x"], max_sequence_length=512, device="cpu", dtype=torch.float32
        )
    (found,), _ = PretrainedText([dict(kind="umt5", path=str(umt5), max_length=512)]).encode(["a cat", "x"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_two_encoders_in_order_each_prompt_once(clip, t5, monkeypatch):
    text = PretrainedText([
        dict(kind="clip", path=str(clip / "text_encoder"), max_length=16),
        dict(kind="t5", path=str(t5), max_length=9),
    ])  # fmt: skip
    seen = []
    original = encoders.TokenEncoder.encode
    monkeypatch.setattr(
        encoders.TokenEncoder, "encode", lambda self, new: seen.append(list(new)) or original(self, new)
    )
    first, _ = text.encode(["a cat", "", "a cat"])
    assert [each.shape for each in first] == [(3, 16, 32), (3, 9, 24)]
    np.testing.assert_array_equal(first[0][0], first[0][2])
    again, masks = text.encode(["", "x", "a cat"])
    assert seen == [["a cat", ""]] * 2 + [["x"]] * 2
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(after[0], before[1])
        np.testing.assert_array_equal(after[2], before[0])
    assert masks[1][2].tolist() == [1] * 4 + [0] * 5


def test_only_the_last_prompts_stay_in_memory(clip, monkeypatch):
    monkeypatch.setattr(encoders, "CACHED_PROMPTS", 2)
    text = PretrainedText([dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)])
    (found,), _ = text.encode(["a", "b", "c", "d"])
    assert len(found) == 4 and text.cached == ["c", "d"]
    (again,), _ = text.encode(["d", "a"])
    np.testing.assert_allclose(again, found[[3, 0]], rtol=1e-5, atol=1e-6)


def test_models_are_frozen_load_late_and_can_be_freed(clip):
    import gc
    import weakref

    text = PretrainedText([dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)])
    (encoder,) = text.encoders
    assert "model" not in vars(encoder)
    (found,), _ = text.encode(["a"])
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    model = weakref.ref(encoder.model)
    text.close()
    gc.collect()
    assert model() is None
    np.testing.assert_array_equal(text.encode(["a"])[0][0], found)
    assert np.isfinite(text.encode(["b"])[0][0]).all()


def test_what_does_not_fit_is_named(clip, t5):
    text = PretrainedText([
        dict(kind="clip", path=str(clip / "text_encoder"), max_length=6),
        dict(kind="t5", path=str(t5), max_length=4),
    ])  # fmt: skip
    assert text.warnings("a cat") == [] and text.warnings("") == []
    assert text.warnings("a cat b c") == ["the t5 encoder reads 4 tokens and leaves out 'b c'"]
    long = text.warnings("a cat b c  X cat")
    assert "clip encoder reads 6 tokens" in long[0] and long[0].endswith("leaves out 'X cat'")
    assert text.words == ()
    (found, _), _ = text.encode(["a cat b c x cat", "a cat b c"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_words_without_tokens_are_named(clip, t5):
    """The tokenisers know the letters a to z and "cat"."""
    of_t5 = PretrainedText([dict(kind="t5", path=str(t5), max_length=40)])
    assert of_t5.warnings("a cat 7 \u732b cat") == ["the t5 encoder has no tokens for the words '7 \u732b'"]
    assert of_t5.understands("\u732b cat") and not of_t5.understands("\u732b 7")
    of_clip = PretrainedText([dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)])
    assert of_clip.warnings("a cat \u732b") == ["the clip encoder has no tokens for the words '\u732b'"]
    assert of_clip.warnings("b cat, x!") == [] and not of_clip.understands("\u043a\u043e\u0442")


def test_the_digest_follows_the_content_and_not_the_place(clip, tmp_path):
    moved = shutil.copytree(clip, tmp_path / "moved")

    def digest(root, **kwargs):
        settings = dict(kind=encoders.EncoderKind.CLIP, path=str(root / "text_encoder"), max_length=16)
        return encoders.TokenEncoder(**(settings | kwargs)).digest

    assert digest(clip) == digest(moved)
    assert len({digest(clip), digest(clip, layer=-2), digest(clip, max_length=15)}) == 3
    weights = moved / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["final_layer_norm.bias"] += 1
    save_file(tensors, weights)
    assert digest(clip) != digest(moved)


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=224, patch_size=32, projection_dim=20, **sizes)
    ).eval()
    path = tmp_path_factory.mktemp("vision") / "image_encoder"
    model.save_pretrained(path)
    return model, str(path)


@pytest.mark.parametrize("size", [64, 224, 576], ids=["enlarged", "same", "reduced"])
def test_images_are_seen_as_svd_sees_them(image_encoder, size):
    from diffusers import StableVideoDiffusionPipeline as Pipeline
    from diffusers.video_processor import VideoProcessor
    from PIL import Image
    from transformers import CLIPImageProcessor

    model, path = image_encoder
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    pixels[:, : size // 2] //= 3
    found = ImageEncoder(path).encode(pixels.astype(np.float32) / 255)

    class Parts:  # of the pipeline, as far as its method asks for them
        image_encoder = model
        feature_extractor = CLIPImageProcessor()
        video_processor = VideoProcessor()

    for token, picture in zip(found, pixels, strict=True):
        with torch.no_grad():
            # Neither this nor the resize has a public name in diffusers.
            encode = Pipeline._encode_image  # noqa: SLF001
            expected = encode(Parts, [Image.fromarray(picture)], "cpu", 1, False)[0]
        assert token.shape == (1, 20)
        np.testing.assert_allclose(token, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(300, 500), (225, 100)])
def test_resize_is_that_of_svd(shape):
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd

    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = svd._resize_with_antialiasing(images, (224, 224))  # noqa: SLF001
    torch.testing.assert_close(encoders.resize_antialiased(images, 224), expected, rtol=1e-5, atol=1e-5)


def test_image_encoder_can_be_freed(image_encoder):
    encoder = ImageEncoder(image_encoder[1])
    before = encoder.encode(np.full((1, 32, 32, 3), 0.4, np.float32))
    encoder.close()
    assert "model" not in vars(encoder)
    np.testing.assert_array_equal(encoder.encode(np.full((1, 32, 32, 3), 0.4, np.float32)), before)


def test_mistakes_are_one_line(clip, t5, tmp_path, user_error):
    good = dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)
    lonely = shutil.copytree(clip / "text_encoder", tmp_path / "lonely" / "encoder")
    pickled = shutil.copytree(clip / "text_encoder", tmp_path / "pickled" / "text_encoder")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    damaged = shutil.copytree(clip, tmp_path / "damaged") / "text_encoder"
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-100])
    lacking = shutil.copytree(clip, tmp_path / "lacking") / "text_encoder"
    tensors = load_file(lacking / "model.safetensors")
    del tensors["final_layer_norm.bias"]
    save_file(tensors, lacking / "model.safetensors")
    shutil.copytree(clip / "tokenizer", pickled.parent / "tokenizer")
    cases = [
        (dict(kind="bert"), "config.text.kwargs.encoders.kind is 'bert'; give one of clip, t5, umt5"),
        (dict(path=str(tmp_path / "none")), "no config.json in"),
        (dict(max_length=77), "max_length 77, but .* has 16 positions"),
        (dict(length=3), "takes no length"),
        (dict(path=str(lonely)), "no tokeniser in"),
        (dict(path=str(lonely), tokenizer=str(tmp_path)), "no tokeniser in"),
        (dict(path=str(pickled)), "no .safetensors weights .*pickled"),
        (dict(path=str(damaged)), "is cut off"),
        (dict(path=str(lacking)), "lacks"),
        (dict(path=str(t5)), "T5|tokeniser|lacks"),
    ]
    for wrong, words in cases:
        with user_error(words):
            PretrainedText([good | wrong]).encode([""])
    with pytest.raises(UserError, match="has no path"):
        PretrainedText([dict(kind="clip")])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        ImageEncoder(str(tmp_path))
