"""The elevation estimator: what it computes and what it reads."""

import math

import numpy as np
import pytest
import torch

from recon_torch import elevation, torchvision_operators
from recon_torch.errors import UserError


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return elevation.ElevationEstimator().eval().requires_grad_(False)


def test_is_an_mlp_of_the_mean_feature(untrained):
    frames = torch.rand(2, 4, 64, 64, 3)
    features = torch.stack([untrained.encoder(frames[:, t].permute(0, 3, 1, 2)) for t in range(4)]).mean(0)
    first, _, last = untrained.head
    hidden = features @ first.weight.T + first.bias
    output = (hidden * torch.sigmoid(hidden)) @ last.weight.T + last.bias
    torch.testing.assert_close(untrained(frames), math.pi / 8 * (1 + output[:, 0]))


def test_estimate_averages_the_sets_of_four_frames(untrained):
    views = torch.rand(12, 64, 64, 3)
    sets = [untrained(views[None, offset::3]) for offset in range(3)]
    assert elevation.estimate(untrained, views) == pytest.approx(float(sum(sets)) / 3, abs=1e-6)
    assert elevation.estimate(untrained, views[:6]) == pytest.approx(
        float(untrained(views[None, :4])), abs=1e-6
    )
    with pytest.raises(UserError, match="3 views are too few"):
        elevation.estimate(untrained, views[:3])


def test_estimate_stays_in_range(untrained):
    views = torch.rand(4, 64, 64, 3)
    for bias, expected in ((-9.0, 0.0), (9.0, math.pi / 4)):
        torch.nn.init.constant_(untrained.head[2].bias, bias)
        assert elevation.estimate(untrained, views) == pytest.approx(expected)


def test_larger_frames_are_seen_at_64_px(untrained):
    def waves(size):
        """A smooth picture, sampled at its pixel centres."""
        ticks = (torch.arange(size) + 0.5) / size * 2 * torch.pi
        return (0.5 + 0.5 * torch.stack([ticks.sin()[None] * ticks.cos()[:, None]] * 3))[None]

    features = [untrained.encoder(waves(size)) for size in (48, 64, 128)]
    assert features[1].std() > 0.05
    for other in (features[0], features[2]):
        torch.testing.assert_close(other, features[1], atol=5e-3, rtol=0)


def test_weights_round_trip_and_bad_files(untrained, tmp_path):
    elevation.save(untrained, tmp_path / "x.safetensors")
    loaded = elevation.load(tmp_path / "x.safetensors")
    views = torch.rand(4, 64, 64, 3)
    assert elevation.estimate(loaded, views) == elevation.estimate(untrained, views)
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    untrained.head = torch.nn.Sequential(torch.nn.Linear(96, 1))
    elevation.save(untrained, tmp_path / "other.safetensors")
    for name, message in [("none", "cannot read"), ("cut", "cannot read"), ("other", "fit another model")]:
        with pytest.raises(UserError, match=message):
            elevation.load(tmp_path / f"{name}.safetensors")


@pytest.fixture
def dino_directory(tmp_path):
    torchvision_operators.declare()
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def test_dino_features_are_frozen_and_not_saved(dino_directory, tmp_path):
    estimator = elevation.ElevationEstimator(dino_directory).eval()
    frames = torch.rand(1, 4, 48, 48, 3, requires_grad=True)  # not the model's own size
    estimator(frames).sum().backward()
    assert all(parameter.grad is None for parameter in estimator.encoder.parameters())
    assert all(parameter.grad is not None for parameter in estimator.head.parameters())
    assert all(name.startswith("head.") for name in estimator.trained_state())
    elevation.save(estimator, tmp_path / "head.safetensors")
    loaded = elevation.load(tmp_path / "head.safetensors", dino_directory)
    torch.testing.assert_close(loaded(frames), estimator(frames))
    with pytest.raises(UserError, match="fit another model"):
        elevation.load(tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="no DINO model"):
        elevation.load(tmp_path / "head.safetensors", tmp_path)


def test_dino_feature_is_the_class_token_of_normalised_pixels(dino_directory):
    import transformers

    frames = torch.rand(2, 3, 32, 32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (frames.numpy() - mean[:, None, None]) / std[:, None, None]
    model = transformers.ViTModel.from_pretrained(dino_directory, add_pooling_layer=False).eval()
    expected = model(torch.from_numpy(pixels).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(elevation.DinoEncoder(dino_directory)(frames), expected)
