"""Scores against NumPy in float64."""

import numpy as np
import pytest
import torch

from im3d_jax.evaluate import scores

RNG = np.random.default_rng(0)
VIEWS, SIZE = 3, 32


def pictures():
    return RNG.random((VIEWS, SIZE, SIZE, 3)).astype(np.float32), RNG.random((VIEWS, SIZE, SIZE, 1)).astype(
        "f4"
    )


def test_the_truth_itself_scores_best(perceptual):
    truth = pictures()
    score = scores.Judge(truth, perceptual)(truth)
    best = scores.Score(psnr=99.0, psnr_foreground=99.0, silhouette_iou=1.0, lpips=0.0)
    assert score._replace(lpips=0.0) == best
    assert 0 <= score.lpips < 1e-12  # sums of rounded features differ by their order


def test_scores_are_the_textbook_formulas(perceptual):
    (true_rgb, true_alpha), (rgb, alpha) = pictures(), pictures()
    score = scores.Judge((true_rgb, true_alpha), perceptual)((rgb, alpha))

    squared = ((rgb.astype(float) - true_rgb) ** 2).mean(-1, keepdims=True)
    foreground = [np.average(s, weights=w) for s, w in zip(squared, true_alpha.astype(float), strict=True)]
    inside, expected = alpha >= 0.5, true_alpha >= 0.5
    iou = (inside & expected).sum((1, 2, 3)) / (inside | expected).sum((1, 2, 3))
    assert score.psnr == pytest.approx(-10 * np.log10(squared.mean((1, 2, 3))).mean(), rel=1e-5)
    assert score.psnr_foreground == pytest.approx(-10 * np.log10(foreground).mean(), rel=1e-5)
    assert score.silhouette_iou == pytest.approx(iou.mean(), rel=1e-5)
    stages = zip(*(perceptual.features(torch.from_numpy(x)) for x in (rgb, true_rgb)), strict=True)
    lpips = sum(((ours - true).double() ** 2).sum(1).mean() for ours, true in stages)
    assert score.lpips == pytest.approx(lpips.item(), rel=1e-4)


def test_colours_are_clipped_before_they_are_scored(perceptual):
    rgb, alpha = np.ones((VIEWS, SIZE, SIZE, 3), np.float32), np.ones((VIEWS, SIZE, SIZE, 1), np.float32)
    assert scores.Judge((rgb, alpha), perceptual)((rgb * 1.5, alpha)).psnr == 99.0


def test_change_between_neighbours_goes_around_the_orbit(perceptual):
    rgb, _ = pictures()
    pairs = [(0, 1), (1, 2), (2, 0)]
    expected = [
        perceptual.distance(
            torch.from_numpy(rgb[[a]]), perceptual.features(torch.from_numpy(rgb[[b]]))
        ).item()
        for a, b in pairs
    ]
    assert scores.change_between_neighbours(rgb, perceptual) == pytest.approx(np.mean(expected), rel=1e-4)
    assert scores.change_between_neighbours(rgb[[0, 0, 0]], perceptual) == 0


def test_mean_is_over_objects():
    rows = [scores.Score(10.0, 5.0, 0.5, 0.1)._asdict(), scores.Score(20.0, 15.0, 1.0, 0.3)._asdict()]
    assert scores.mean(rows) == pytest.approx((15, 10, 0.75, 0.2))
