"""The elevation estimator: what it computes and what it reads."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon_torch.elevation import estimator
from recon_torch.errors import UserError


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return estimator.ElevationEstimator().eval().requires_grad_(False)


def test_the_estimator_is_an_mlp_of_the_mean_feature(untrained):
    frames = torch.rand(2, 4, 64, 64, 3)
    features = torch.stack([untrained.encoder(frames[:, t].permute(0, 3, 1, 2)) for t in range(4)]).mean(0)
    first, _, last = untrained.head
    hidden = features @ first.weight.T + first.bias
    output = (hidden * torch.sigmoid(hidden)) @ last.weight.T + last.bias
    torch.testing.assert_close(untrained(frames), math.pi / 8 * (1 + output[:, 0]))


def test_estimate_averages_the_sets_of_four_frames(untrained):
    views = torch.rand(12, 64, 64, 3)
    sets = [untrained(views[None, offset::3]) for offset in range(3)]
    assert estimator.estimate(untrained, views) == pytest.approx(float(sum(sets)) / 3, abs=1e-6)
    assert estimator.estimate(untrained, views[:6]) == pytest.approx(
        float(untrained(views[None, :4])), abs=1e-6
    )
    with pytest.raises(UserError, match="3 views are too few"):
        estimator.estimate(untrained, views[:3])


def test_estimate_stays_in_range(untrained):
    views = torch.rand(4, 64, 64, 3)
    for bias, expected in ((-9.0, 0.0), (9.0, math.pi / 4)):
        torch.nn.init.constant_(untrained.head[2].bias, bias)
        assert estimator.estimate(untrained, views) == pytest.approx(expected)


def test_larger_frames_are_resized_to_64_px(untrained):
    def waves(size):
        """A smooth picture, sampled at its pixel centres."""
        ticks = (torch.arange(size) + 0.5) / size * 2 * torch.pi
        return (0.5 + 0.5 * torch.stack([ticks.sin()[None] * ticks.cos()[:, None]] * 3))[None]

    features = [untrained.encoder(waves(size)) for size in (48, 64, 128)]
    assert features[1].std() > 0.05
    for other in (features[0], features[2]):
        torch.testing.assert_close(other, features[1], atol=5e-3, rtol=0)


def test_weights_round_trip_and_bad_files(untrained, tmp_path):
    estimator.save(untrained, tmp_path / "x.safetensors")
    loaded = estimator.load(tmp_path / "x.safetensors")
    views = torch.rand(4, 64, 64, 3)
    assert estimator.estimate(loaded, views) == estimator.estimate(untrained, views)
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    untrained.head = torch.nn.Sequential(torch.nn.Linear(96, 1))
    estimator.save(untrained, tmp_path / "other.safetensors")
    for name, message in {
        "none": "no elevation weights at",
        "cut": "cut off",
        "other": "fit another model",
    }.items():
        with pytest.raises(UserError, match=message):
            estimator.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), math.nan), "holds NaN or infinity"),
        (lambda tensor: tensor.index_fill(0, torch.tensor([0]), -math.inf), "holds NaN or infinity"),
        (lambda tensor: tensor.double() * 1e300, "which is too large for float32"),
        (lambda tensor: tensor * 1j, "is complex64"),
        (lambda tensor: tensor.long(), "is int64"),
    ],
)
def test_weights_that_are_not_finite_numbers_are_refused(spoil, words, untrained, tmp_path, user_error):
    path = tmp_path / "x.safetensors"
    estimator.save(untrained, path)
    weights = load_file(path)
    weights["head.2.bias"] = spoil(weights["head.2.bias"] + 1)
    save_file(weights, path)
    with user_error(f"elevation weights {path}: head.2.bias .*{words}"):
        estimator.load(path)
