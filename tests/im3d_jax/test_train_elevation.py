"""Training of the elevation estimator: data, augmentation, one shrunk run, and the shipped result."""

import numpy as np
import pytest
import torch

from im3d_jax import config_flags, train_elevation
from im3d_jax.data import procedural
from recon_torch import elevation


@pytest.fixture
def config():
    return config_flags.load("configs/elevation_tiny.py")


AMOUNTS = dict(noise=0.0, blur_px=0.0, shift_px=0, colour=0.0)


def test_rendered_frames_are_the_objects_at_their_elevations(config):
    frames, elevations_rad = train_elevation.render_split("train", 8, config)
    assert frames.shape == (8, 4, 64, 64, 3) and frames.dtype == torch.uint8
    first = 20_000
    assert elevations_rad.tolist() == pytest.approx(
        [procedural.elevation_rad(0, first + i) for i in range(8)]
    )
    same, _ = train_elevation.render_split("train", 8, config)
    assert torch.equal(frames, same)


def test_degrade_by_nothing_only_permutes_channels():
    frames = torch.rand(3, 4, 8, 8, 3)
    result = train_elevation.degrade(frames, torch.Generator().manual_seed(0), **AMOUNTS)
    torch.testing.assert_close(result.sort(-1).values, frames.sort(-1).values)
    per_video = [
        {
            tuple(int((video[..., c] - frames[b, ..., d]).abs().amax() < 1e-6) for d in range(3))
            for c in range(3)
        }
        for b, video in enumerate(result)
    ]
    assert all(found == {(1, 0, 0), (0, 1, 0), (0, 0, 1)} for found in per_video)


def test_degrade_amounts():
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((8, 4, 32, 32, 3), 0.5)
    noisy = train_elevation.degrade(grey, generator, **(AMOUNTS | dict(noise=0.1)))
    deviations = noisy.flatten(2).std(-1)
    assert 0.08 < deviations.max() < 0.11 and deviations.min() < 0.04
    torch.testing.assert_close(noisy.mean(), torch.tensor(0.5), atol=2e-3, rtol=0)
    tinted = train_elevation.degrade(grey, generator, **(AMOUNTS | dict(colour=0.2)))
    assert (tinted - 0.5).abs().max() <= 0.1 + 1e-6
    assert (tinted == tinted[:, :1, :1, :1]).all()  # one tint for a video

    dot = torch.ones(8, 4, 9, 9, 3)
    dot[:, :, 4, 4] = 0
    blurred = train_elevation.degrade(dot, generator, **(AMOUNTS | dict(blur_px=1.0)))
    torch.testing.assert_close((1 - blurred).sum((2, 3)), torch.ones(8, 4, 3), atol=1e-4, rtol=0)
    rows = torch.arange(9.0) - 4
    variance = ((1 - blurred[..., 0]).sum(3) * rows**2).sum(-1)
    assert 0.5 < variance.max() <= 1.0 and variance.min() < 0.5

    shifted = train_elevation.degrade(dot, generator, **(AMOUNTS | dict(shift_px=1)))
    places = {tuple((frame[..., 0] < 0.5).nonzero()[0].tolist()) for video in shifted for frame in video}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_command_takes_steps_and_writes_weights(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    shrink = {"num_objects": 8, "num_test_objects": 16, "num_steps": 3, "batch_size": 4}
    flags = [f"--config.{key}={value}" for key, value in shrink.items()]
    train_elevation.main(["--out", str(out), *flags])
    first = elevation.load(out).state_dict()
    train_elevation.main(["--out", str(out), *flags])
    again = elevation.load(out).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)  # same seed, same weights
    assert capsys.readouterr().out.count("median error") == 4


def test_training_fits_a_few_videos(config):
    frames, elevations_rad = train_elevation.render_split("train", 8, config)
    config.update(num_steps=80, batch_size=8)
    config.augment.update(AMOUNTS)
    estimator = train_elevation.train(frames, elevations_rad, config)
    error_deg = np.degrees((estimator(frames / 255) - elevations_rad).abs().mean().item())
    assert error_deg < 4  # the middle of the range is 10 degrees off on average


def test_shipped_weights_on_test_objects(config):
    config.num_test_objects = 16
    errors_deg = train_elevation.errors_on_test_deg(elevation.load(), config, degraded=False)
    assert np.median(errors_deg) < 3
