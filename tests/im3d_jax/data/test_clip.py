"""CLIP's scores, against the forward pass of the whole model in transformers."""

import json
import shutil

import numpy as np
import pytest
import torch

from im3d_jax.data.clip import Clip

pytestmark = pytest.mark.slow

PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8))
CAPTIONS = ["a cat", "cat cat a b", "b"]


def test_cosines_are_those_of_the_whole_model(whole_clip):
    from transformers import CLIPModel, CLIPProcessor

    clip = Clip(whole_clip)
    texts, cut_off = clip.embed_captions(CAPTIONS)
    cosines = clip.embed_pictures(PICTURES) @ texts.T
    model, processor = CLIPModel.from_pretrained(whole_clip), CLIPProcessor.from_pretrained(whole_clip)
    inputs = processor(text=CAPTIONS, images=PICTURES, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert not cut_off.any() and np.ptp(cosines) > 0.01
    alone = np.concatenate([clip.embed_pictures([picture]) for picture in PICTURES])
    np.testing.assert_allclose(alone @ texts.T, cosines, atol=1e-5)


def test_long_captions_are_cut_off_and_said_to_be(whole_clip):
    clip = Clip(whole_clip)
    long = " ".join("abcdefghijklmnopq")
    texts, cut_off = clip.embed_captions(["a", long, " ".join("abcdefghijklmn")])
    assert clip.max_tokens == 16 and cut_off.tolist() == [False, True, False]
    np.testing.assert_allclose(texts[1], texts[2], atol=1e-5)


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


MISTAKES = {
    "nothing": (shutil.rmtree, "--model: no config.json in"),
    "half": (
        lambda p: (p / "config.json").write_text('{"model_type": "t5"}'),
        "is a t5, not a CLIP with",
    ),
    "weights": (lambda p: (p / "model.safetensors").unlink(), r"no \.safetensors weights in"),
    "words": (lambda p: (p / "vocab.json").unlink(), "no tokeniser in"),
    "pictures": (lambda p: (p / "preprocessor_config.json").unlink(), "no preprocessor_config.json in"),
    "size": (
        lambda p: change(p / "preprocessor_config.json", crop_size={"height": 24, "width": 24}),
        "makes pictures of 24 x 24 px, and the network takes 16; copy it again",
    ),
    "no mean": (
        lambda p: change(p / "preprocessor_config.json", do_normalize=False),
        "do_normalize of preprocessor_config.json is off",
    ),
    "more words": (
        lambda p: change(p / "vocab.json", **{"zz</w>": 57}),
        "its tokeniser has 58 tokens, and the network 57",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_clip_is_refused(mistake, whole_clip, tmp_path, user_error):
    directory = shutil.copytree(whole_clip, tmp_path / "copy")
    spoil, message = MISTAKES[mistake]
    spoil(directory)
    with user_error(message):
        Clip(directory)
