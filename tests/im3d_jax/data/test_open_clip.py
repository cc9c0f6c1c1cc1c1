"""CLIPs as open_clip stores them, against its architecture written down in plain torch."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from im3d_jax.data.clip import Clip
from tests.im3d_jax.conftest import perturb, write_clip_tokenizer

pytestmark = pytest.mark.slow

VISION = dict(image_size=16, layers=2, width=32, patch_size=8, head_width=8)
TEXT = dict(context_length=16, vocab_size=57, width=24, heads=3, layers=2)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask, act):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](act(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        width, side = VISION["width"], VISION["patch_size"]
        self.conv1 = nn.Conv2d(3, width, side, side, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((VISION["image_size"] // side) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, VISION["layers"], width // VISION["head_width"])
        self.proj = nn.Parameter(torch.zeros(width, 20))


class OpenClip(nn.Module):
    """As open_clip names its tensors."""

    def __init__(self):
        super().__init__()
        width = TEXT["width"]
        self.visual, self.transformer = Visual(), Transformer(width, TEXT["layers"], TEXT["heads"])
        self.token_embedding = nn.Embedding(TEXT["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(TEXT["context_length"], width))
        self.ln_final, self.text_projection = nn.LayerNorm(width), nn.Parameter(torch.zeros(width, 20))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels, act):
        v = self.visual
        patches = v.conv1(pixels).flatten(2).transpose(1, 2)
        first = v.class_embedding.expand(len(pixels), 1, -1)
        x = v.ln_pre(torch.cat([first, patches], 1) + v.positional_embedding)
        for block in v.transformer.resblocks:
            x = block(x, None, act)
        return nn.functional.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=-1)

    def encode_text(self, tokens, act):
        """tokens: padded with 0; the embedding is at the end token, which has the largest number."""
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((len(tokens[0]), len(tokens[0])), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask, act)
        ends = self.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)]
        return nn.functional.normalize(ends @ self.text_projection, dim=-1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(the model, its directory)."""
    torch.manual_seed(0)
    model, path = perturb(OpenClip()), tmp_path_factory.mktemp("open_clip") / "clip"
    write_clip_tokenizer(path)
    save_file(dict(model.state_dict()), path / "open_clip_model.safetensors")
    write_config(path)
    return model, path


def write_config(path, **changes):
    model = dict(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT) | changes
    config = dict(model_cfg=model, preprocess_cfg=dict(mean=MEAN, std=STD, interpolation="bicubic"))
    (path / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quick_gelu", (False, True))
def test_embeddings_are_those_of_the_architecture(quick_gelu, stored, tmp_path):
    model, path = stored[0], shutil.copytree(stored[1], tmp_path / "clip")
    write_config(path, quick_gelu=quick_gelu)
    clip = Clip(path)

    def act(x):
        return x * torch.sigmoid(1.702 * x) if quick_gelu else nn.functional.gelu(x)

    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 24, 3), np.uint8)
    prepare = transforms.Compose(
        [
            transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pixels = torch.stack([prepare(Image.fromarray(each)) for each in pictures])
    end, a, cat = 56, 27, 54  # of the tokeniser, after its start, 55
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[0, :4], tokens[1, :3] = torch.tensor([55, a, cat, end]), torch.tensor([55, cat, end])
    texts, _ = clip.embed_captions(["a cat", "cat"])
    with torch.no_grad():
        np.testing.assert_allclose(texts, model.encode_text(tokens, act), atol=1e-5)
        np.testing.assert_allclose(
            clip.embed_pictures(list(pictures)), model.encode_image(pixels, act), atol=2e-3
        )
    assert clip.max_tokens == 16 and clip.about()["embedding_size"] == 20
    assert clip.about()["preprocessing"]["image_mean"] == MEAN


MISTAKES = {
    "timm": (
        dict(vision_cfg=VISION | dict(timm_model_name="vit")),
        "vision_cfg.timm_model_name is of a network",
    ),
    "entry": (dict(custom_text=True), "model_cfg.custom_text is of a network that is not read"),
    "size": (dict(embed_dim=12), "is no CLIP of its open_clip_config.json"),
    "lacks": (dict(text_cfg=None), "has no section text_cfg"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_other_networks_are_refused_by_name(mistake, stored, tmp_path, user_error):
    path = shutil.copytree(stored[1], tmp_path / "clip")
    changes, message = MISTAKES[mistake]
    write_config(path, **changes)
    with user_error(message):
        Clip(path)


def test_missing_weights_and_tokenisers_are_said(stored, tmp_path, user_error):
    path = shutil.copytree(stored[1], tmp_path / "clip")
    (path / "vocab.json").unlink()
    with user_error("no tokeniser in"):
        Clip(path, "--clip")
    path = shutil.copytree(stored[1], tmp_path / "other")
    (path / "open_clip_model.safetensors").rename(path / "open_clip_pytorch_model.bin")
    with user_error("is pickled"):
        Clip(path)
