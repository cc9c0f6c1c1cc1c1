"""DINO's features against transformers' own preparation and forward pass, and what is no DINO."""

import json
import shutil

import numpy as np
import pytest
import torch

from recon_torch import hosting
from recon_torch.elevation import estimator as elevation
from recon_torch.elevation.dino import DinoEncoder
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

hosting.declare()
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2)
MODELS = {
    "vit": ("ViT", dict(intermediate_size=32, image_size=32, patch_size=8)),
    "dinov2": ("Dinov2", dict(mlp_ratio=2, image_size=28, patch_size=14)),
    "dinov2_with_registers": ("Dinov2WithRegisters", dict(mlp_ratio=2, image_size=28, patch_size=14)),
    "dinov3_vit": ("DINOv3ViT", dict(intermediate_size=32, image_size=32, patch_size=16)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A small random model of each kind."""
    root = tmp_path_factory.mktemp("dino")
    for seed, (kind, (name, sizes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
        getattr(transformers, f"{name}Model")(config).save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(directories, kind, scale):
    """Frames have the model's size, or twice that, whose resizing the reference rounds to 8 bits."""
    name, sizes = MODELS[kind]
    side = sizes["image_size"]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (3, 3, scale * side, scale * side), dtype=torch.uint8, generator=generator)
    processor = transformers.ViTImageProcessor(
        size=dict(height=side, width=side),
        resample=2,  # bilinear
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, side, side)
    model = getattr(transformers, f"{name}Model").from_pretrained(directories / kind).eval()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
        found = DinoEncoder(directories / kind)(pictures / 255)
    error = (found - expected).abs().max() / expected.std(0).max()
    assert error < (0.08 if scale > 1 else 1e-5)


def test_large_models_see_224_px(tmp_path):
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, image_size=518, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    frames = torch.rand(1, 3, 224, 224)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (frames.numpy() - mean[:, None, None]) / std[:, None, None]
    expected = model(torch.from_numpy(pixels).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(DinoEncoder(tmp_path)(frames), expected, atol=1e-5, rtol=0)


def test_they_are_frozen_and_not_saved(directories, tmp_path):
    estimator = elevation.ElevationEstimator(directories / "dinov2").eval()
    frames = torch.rand(1, 4, 48, 48, 3, requires_grad=True)
    estimator(frames).sum().backward()
    assert all(parameter.grad is None for parameter in estimator.encoder.parameters())
    assert all(parameter.grad is not None for parameter in estimator.head.parameters())
    elevation.save(estimator, tmp_path / "head.safetensors")
    loaded = elevation.load(tmp_path / "head.safetensors", directories / "dinov2")
    torch.testing.assert_close(loaded(frames), estimator(frames))


def test_weights_know_whose_features_they_are_for(directories, tmp_path):
    """Also among models whose features have the same shape."""
    elevation.save(elevation.ElevationEstimator(directories / "dinov2"), tmp_path / "v2.safetensors")
    elevation.save(elevation.ElevationEstimator(), tmp_path / "tiny.safetensors")
    for weights, dino, told in [
        ("v2", None, "'dinov2-[0-9a-f]{8}', not of 'tiny'"),
        ("v2", directories / "vit", "'dinov2-[0-9a-f]{8}', not of 'vit-[0-9a-f]{8}'"),
        ("tiny", directories / "dinov2", "'tiny', not of 'dinov2-[0-9a-f]{8}'"),
    ]:
        with pytest.raises(UserError, match=f"fit another model: .* {told}; give config.elevation.dino"):
            elevation.load(tmp_path / f"{weights}.safetensors", dino)


def damage(directory, file, change):
    (directory / file).write_bytes(change((directory / file).read_bytes()))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "dino: no config.json in .*; give the directory of a saved model"),
        (lambda d: damage(d, "config.json", lambda content: b"{"), "config.json, line 1: is not JSON"),
        (
            lambda d: damage(d, "model.safetensors", lambda content: content[:99]),
            "dino: .*model.safetensors is cut off",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "no .safetensors weights in .*"),
    ],
)
def test_what_is_no_dino_is_one_line(directories, tmp_path, spoil, message):
    directory = shutil.copytree(directories / "dinov2", tmp_path / "dino")
    spoil(directory)
    with pytest.raises(UserError, match=message) as error:
        DinoEncoder(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_other_models_and_half_ones_are_refused(directories, tmp_path):
    directory = shutil.copytree(directories / "vit", tmp_path / "dino")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks layers\.2\..* \(16 such\); copy it again"):
        DinoEncoder(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is a bert, no DINO; known are vit, dinov2"):
        DinoEncoder(directory)
