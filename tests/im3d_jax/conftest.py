"""Tiny random text encoders and their tokenisers, in the layout of public checkpoints."""

import json
import string

import pytest
import torch

from recon_torch import torchvision_operators

torchvision_operators.declare()  # before anything imports transformers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(directory, pad=EOS):
    """A CLIP tokeniser of single letters and the word "cat"; others read as the end token. Its vocabulary."""
    letters = list(string.ascii_lowercase)
    words = ["!", *letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", BOS, EOS]
    vocabulary = {word: index for index, word in enumerate(words)}
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=16, pad_token=pad)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def clip_text_config(**kwargs):
    from transformers import CLIPTextConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3)
    ids = dict(vocab_size=57, bos_token_id=55, eos_token_id=56, pad_token_id=56)
    return CLIPTextConfig(max_position_embeddings=16, projection_dim=24, **(sizes | ids | kwargs))


def perturb(model):
    """Moves every parameter, also norms at one and biases at zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A directory with a text encoder as in SD 1.5 and one as in SDXL, each with its tokeniser beside."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    root = tmp_path_factory.mktemp("clip")
    perturb(CLIPTextModel(clip_text_config())).save_pretrained(root / "text_encoder")
    perturb(CLIPTextModelWithProjection(clip_text_config())).save_pretrained(root / "text_encoder_2")
    write_clip_tokenizer(root / "tokenizer")
    write_clip_tokenizer(root / "tokenizer_2", pad="!")
    return root


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A directory with a whole T5, decoder included, and its tokeniser."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    root = tmp_path_factory.mktemp("t5")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581cat", -1.0)]
    words += [(letter, -3.0) for letter in string.ascii_lowercase]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(root)
    config = T5Config(vocab_size=31, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    perturb(T5ForConditionalGeneration(config)).save_pretrained(root)
    return root
