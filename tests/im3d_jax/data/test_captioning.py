"""Captions by tiny random networks: what they say, how likely they find it, and directories that are none."""

import shutil

import numpy as np
import pytest
import torch

from im3d_jax.data.captioning import Caption, Captioner, Combine, combine
from recon_torch import hosting

pytestmark = pytest.mark.slow

PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8))


def test_the_likeliest_caption_or_all_of_them():
    captions = [Caption("a mug", -1.0), Caption("", 0.0), Caption("a cup", -0.5), Caption("a mug", -2.0)]
    assert combine(captions, Combine.BEST) == Caption("a cup", -0.5)
    joined = combine(captions, Combine.JOINED)
    assert joined.text == "a mug; a cup" and joined.score == pytest.approx(-3.5 / 3)
    assert combine([Caption("", 0.0)], Combine.BEST).text == ""


@pytest.fixture
def caption_with_end(blip, tmp_path):
    """The BLIP with an end token that it finds likely enough to stop at."""
    directory = shutil.copytree(blip, tmp_path / "blip")
    from transformers import BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(directory)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[56] += 2.0
    model.save_pretrained(directory)
    return directory


def forced(directory, pixels, max_tokens):
    """(text, mean log-likelihood) of a greedy caption, token by token and without a cache."""
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seen = model.vision_model(pixels).last_hidden_state
    tokens, total = [55], []
    for _ in range(max_tokens):
        logits = model.text_decoder(torch.tensor([tokens]), encoder_hidden_states=seen).logits[0, -1]
        likelihood = logits.double().log_softmax(-1)
        tokens.append(int(likelihood.argmax()))
        total.append(float(likelihood.max()))
        if tokens[-1] == 56:
            break
    return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split()), np.mean(total)


@torch.no_grad()
def test_likelihoods_are_those_of_the_tokens(blip):
    from transformers import AutoImageProcessor

    captioner = Captioner(blip, max_tokens=6)
    made = captioner.caption(PICTURES)
    processor = AutoImageProcessor.from_pretrained(blip)
    for picture, caption in zip(PICTURES, made, strict=True):
        pixels = processor(picture, return_tensors="pt").pixel_values
        text, score = forced(blip, pixels, 6)
        assert caption.text == text != ""
        assert caption.score == pytest.approx(score, abs=1e-5)
    alone = [captioner.caption([picture])[0] for picture in PICTURES]
    assert [each.text for each in alone] == [each.text for each in made]
    beams = Captioner(blip, max_tokens=6, num_beams=3).caption(PICTURES)
    assert all(np.isfinite(each.score) for each in beams)


def test_the_end_of_a_caption_ends_its_likelihood(caption_with_end):
    captioner = Captioner(caption_with_end, max_tokens=8)
    tokens = torch.tensor([[1, 2, 56, 0, 0], [55, 3, 4, 5, 6]])
    scores = torch.randn(5, 2, 57, generator=torch.Generator().manual_seed(0))
    found = captioner._likelihood(tokens, list(scores))  # noqa: SLF001 - it has no other way in
    each = [[scores[t, b].double().log_softmax(-1)[tokens[b, t]] for t in range(5)] for b in range(2)]
    assert found.tolist() == pytest.approx([np.mean(each[0][:3]), np.mean(each[1])], abs=1e-5)


def test_a_git_captions_too(tmp_path, picture_parts):
    from transformers import GitConfig, GitForCausalLM

    vision, text, save = picture_parts
    save(tmp_path / "git", "blip")
    torch.manual_seed(1)
    model = GitForCausalLM(GitConfig(vision_config=vision, **text, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "git")
    made = Captioner(tmp_path / "git", max_tokens=5).caption(PICTURES)
    assert len(made) == 3 and all(np.isfinite(each.score) for each in made)


def test_words_that_are_to_be_continued_are_not_in_the_caption(blip):
    asked = Captioner(blip, max_tokens=5, prompt="cat a b").caption(PICTURES)
    plain = Captioner(blip, max_tokens=5).caption(PICTURES)
    assert [each.text for each in asked] != [each.text for each in plain]
    assert all(len(each.text.split()) <= 5 and not each.text.startswith("cat a b") for each in asked)


def test_a_vision_encoder_with_a_text_decoder_captions_too(tmp_path, picture_parts):
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    vision, _, save = picture_parts
    save(tmp_path / "pair", "blip")
    ids = dict(bos_token_id=55, eos_token_id=56)
    text = GPT2Config(vocab_size=57, n_embd=16, n_layer=1, n_head=2, n_positions=32, **ids)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**vision), text)
    config.decoder_start_token_id, config.pad_token_id = 55, 0
    torch.manual_seed(1)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 55, 0
    model.save_pretrained(tmp_path / "pair")
    made = Captioner(tmp_path / "pair", max_tokens=5).caption(PICTURES)
    assert len(made) == 3 and all(each.score < 0 for each in made)


CHAT = """{% for turn in messages %}USER: {% for part in turn['content'] %}
{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def test_a_model_that_chats_is_asked(tmp_path, picture_parts):
    import tokenizers
    import transformers

    vision, text, _ = picture_parts
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcdefghijkl", "Describe", "object"]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special
    )
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**size),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(tmp_path)
    text = text | dict(
        model_type="llama", vocab_size=len(words), num_key_value_heads=2, bos_token_id=1, eos_token_id=2
    )
    parts = dict(vision_config=vision | dict(model_type="clip_vision_model"), text_config=text)
    torch.manual_seed(1)
    config = transformers.LlavaConfig(**parts, image_token_index=4, vision_feature_layer=-1)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    asked = [Captioner(tmp_path, max_tokens=5, prompt=prompt).caption(PICTURES) for prompt in ("", "object")]
    assert all(len(each) == 3 and all(np.isfinite(one.score) for one in each) for each in asked)
    assert asked[0][0].score != asked[1][0].score


def pickle(path):
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


MISTAKES = {
    "nothing": (shutil.rmtree, "no config.json in"),
    "another model": (
        lambda path: (path / "config.json").write_text('{"model_type": "clip"}'),
        "is a clip, which makes no captions; give a BLIP",
    ),
    "pickled": (pickle, r"no \.safetensors weights in .* pickled ones are not read"),
    "damaged": (
        lambda path: (path / "model.safetensors").write_bytes(b"12345678"),
        "is text, which begins with",
    ),
    "no words": (lambda path: (path / "vocab.json").unlink(), "no tokeniser in"),
    "no pictures": (lambda path: (path / "preprocessor_config.json").unlink(), "no AutoImageProcessor loads"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_captioner_is_refused(mistake, blip, tmp_path, user_error):
    directory = shutil.copytree(blip, tmp_path / "copy")
    spoil, message = MISTAKES[mistake]
    spoil(directory)
    with user_error(message):
        Captioner(directory)


def test_the_digest_is_that_of_the_content(blip, tmp_path):
    copy = shutil.copytree(blip, tmp_path / "another")
    assert hosting.digest(copy) == hosting.digest(blip) == Captioner(blip).digest
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert hosting.digest(copy) != hosting.digest(blip)
