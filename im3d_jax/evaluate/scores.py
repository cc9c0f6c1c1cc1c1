"""How well views agree with the true ones, and with their neighbours on the orbit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from recon_torch.losses import metrics
from recon_torch.losses.lpips import PerceptualDistance

MAX_PSNR_DB = 99.0
"""PSNR is capped here, so that equal pictures do not make means infinite."""

Pictures = tuple[Float[np.ndarray, "K H W 3"], Float[np.ndarray, "K H W 1"]]
"""(rgb over white, alpha) of the K views of one object, in [0, 1]."""

FirstViews = tuple[Float[np.ndarray, "B H W 3"], Float[np.ndarray, "B H W 1"]]
"""(rgb over white, alpha) of view 0 of B objects, in [0, 1]."""


class Score(NamedTuple):
    """Means over the views. PSNRs are in dB and at most 99; the foreground's is weighted by coverage."""

    psnr: float
    psnr_foreground: float
    silhouette_iou: float
    lpips: float


class Judge:
    """Scores pictures against the true views of one object, whose LPIPS features are computed once."""

    def __init__(self, truth: Pictures, perceptual: PerceptualDistance) -> None:
        self._rgb, self._alpha = (torch.from_numpy(np.asarray(x, np.float32)) for x in truth)
        self._perceptual = perceptual
        with torch.no_grad():
            self._features = perceptual.features(self._rgb)

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Score:
        rgb, alpha = (torch.from_numpy(np.array(x, np.float32)) for x in pictures)
        rgb = rgb.clamp(0, 1)
        each = (
            metrics.psnr(rgb, self._rgb).clamp_max(MAX_PSNR_DB),
            metrics.psnr(rgb, self._rgb, self._alpha).clamp_max(MAX_PSNR_DB),
            metrics.silhouette_iou(alpha, self._alpha),
            self._perceptual.distance(rgb, self._features),
        )
        return Score(*(float(values.nanmean()) for values in each))


@torch.no_grad()
def change_between_neighbours(rgb: Float[np.ndarray, "K H W 3"], perceptual: PerceptualDistance) -> float:
    """The mean LPIPS between each view and the next around the orbit: high where views flicker."""
    features = perceptual.features(torch.from_numpy(np.array(rgb, np.float32)))
    turned = [feature.roll(-1, 0) for feature in features]
    stages = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(features, turned, strict=True)]
    return float(sum(stages, start=torch.zeros(())).mean())


def mean(scores: Sequence[Mapping[str, float]]) -> Score:
    """The mean over objects of scores as results.json holds them."""
    return Score(*(float(np.mean([score[name] for score in scores])) for name in Score._fields))
