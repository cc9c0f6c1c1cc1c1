"""What the estimator of elevation trains on: sets of frames, and how they are degraded."""

import pytest
import torch

from im3d_jax.config_kinds import AugmentSettings
from im3d_jax.training import elevation as training
from recon_torch.errors import UserError

CLEAN = dict(noise=0.0, blur_px=0.0, shift_px=0, colour=0.0)


def amounts(**changed):
    return AugmentSettings(**(CLEAN | changed))


def test_sets_are_frames_a_quarter_apart():
    frames = torch.arange(16.0).reshape(2, 8, 1, 1, 1).expand(-1, -1, -1, -1, 3)
    sets = {
        tuple(training.draw_sets(frames, torch.Generator().manual_seed(i))[..., 0].flatten().tolist())
        for i in range(20)
    }
    firsts, seconds = {each[:4] for each in sets}, {each[4:] for each in sets}
    assert firsts == {(0, 2, 4, 6), (1, 3, 5, 7)} and seconds == {(8, 10, 12, 14), (9, 11, 13, 15)}
    with pytest.raises(UserError, match="num_views is 3"):
        training.draw_sets(frames[:, :3], torch.Generator())


def test_degrade_by_nothing_only_permutes_channels():
    frames = torch.rand(3, 4, 8, 8, 3)
    result = training.degrade(frames, torch.Generator().manual_seed(0), amounts())
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
    noisy = training.degrade(grey, generator, amounts(noise=0.1))
    deviations = noisy.flatten(2).std(-1)
    assert 0.08 < deviations.max() < 0.11 and deviations.min() < 0.04
    torch.testing.assert_close(noisy.mean(), torch.tensor(0.5), atol=2e-3, rtol=0)
    tinted = training.degrade(grey, generator, amounts(colour=0.2))
    assert (tinted - 0.5).abs().max() <= 0.1 + 1e-6
    assert (tinted == tinted[:, :1, :1, :1]).all()  # one tint for a video

    dot = torch.ones(8, 4, 9, 9, 3)
    dot[:, :, 4, 4] = 0
    blurred = training.degrade(dot, generator, amounts(blur_px=1.0))
    torch.testing.assert_close((1 - blurred).sum((2, 3)), torch.ones(8, 4, 3), atol=1e-4, rtol=0)
    rows = torch.arange(9.0) - 4
    variance = ((1 - blurred[..., 0]).sum(3) * rows**2).sum(-1)
    assert 0.5 < variance.max() <= 1.0 and variance.min() < 0.5

    shifted = training.degrade(dot, generator, amounts(shift_px=1))
    places = {tuple((frame[..., 0] < 0.5).nonzero()[0].tolist()) for video in shifted for frame in video}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
