"""Estimates the elevation of a turntable video, which the fit needs for its cameras (Sec. 3.3).

Each video of the paper has one elevation, drawn from U[0, pi/4], which its generator is not told. It is
estimated from the views: the features of 4 evenly spaced frames are averaged, and an MLP with two layers
turns the mean into radians.

Paper: DINO features. Here: those of a small convolutional encoder, which is trained with the MLP and shipped,
because the tiny generator's views of 64 px are far from what DINO was trained on. DINO is used where its
weights are given.
Paper: 4 frames. Here: the mean over all K / 4 sets of 4 evenly spaced frames, which costs little.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from recon_torch import weights_files
from recon_torch.elevation.dino import DinoEncoder
from recon_torch.errors import UserError
from recon_torch.files import replacing

NUM_FRAMES = 4
MAX_ELEVATION_RAD = math.pi / 4
TINY_WEIGHTS = Path(__file__).parents[1] / "weights" / "elevation_tiny.safetensors"
HIDDEN = 128
ENCODER = "encoder"  # the key in a file's metadata that names the encoder whose features its weights take


class TinyEncoder(nn.Module):
    """Turns frames of any size, resized to 64 px, into features that keep the coarse layout of the image."""

    SIZE_PX = 64
    CHANNELS = (24, 48, 64, 96)
    identity = "tiny"
    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in self.CHANNELS:
            layers += [
                nn.Conv2d(before, channels, 3, stride=2, padding=1),
                nn.GroupNorm(8, channels),
                nn.SiLU(),
            ]
            before = channels
        self.convolutions = nn.Sequential(*layers)
        side = self.SIZE_PX // 2 ** len(self.CHANNELS)
        self.project = nn.Linear(before * side**2, self.num_features)

    def forward(self, frames: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B features"]:
        if frames.shape[-2:] != (self.SIZE_PX, self.SIZE_PX):
            frames = F.interpolate(frames, (self.SIZE_PX, self.SIZE_PX), mode="bilinear", antialias=True)
        return F.silu(self.project(self.convolutions(2 * frames - 1).flatten(1)))


class ElevationEstimator(nn.Module):
    """The mean of the features of some frames, and an MLP with two layers that turns it into radians."""

    def __init__(self, dino: str | Path | None = None) -> None:
        super().__init__()
        self.encoder = TinyEncoder() if dino is None else DinoEncoder(dino)
        self.head = nn.Sequential(
            nn.Linear(self.encoder.num_features, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, frames: Float[Tensor, "B T H W 3"]) -> Float[Tensor, " B"]:
        """Elevations in radians from any T frames of each video, in [0, 1]."""
        batch, time = frames.shape[:2]
        features = self.encoder(frames.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (batch, time))
        # The output is relative to the middle of the range, where an untrained head therefore starts.
        return MAX_ELEVATION_RAD / 2 * (1 + self.head(features.mean(1))[:, 0])

    def trained_state(self) -> dict[str, Tensor]:
        """The weights to save: all of them, but for those of a frozen encoder."""
        frozen = isinstance(self.encoder, DinoEncoder)
        return {k: v for k, v in self.state_dict().items() if not (frozen and k.startswith("encoder."))}


@runtime_checkable
class Estimator(Protocol):
    """What tells the elevation of videos from some of their frames, as `ElevationEstimator` does."""

    def __call__(self, frames: Float[Tensor, "B T H W 3"]) -> Float[Tensor, " B"]:
        """Elevations in radians, of any T frames in [0, 1] of each video."""


@torch.no_grad()
def estimate(estimator: Estimator, views: Float[Tensor, "K H W 3"]) -> float:
    """The elevation, in [0, pi/4] radians, of a video of K evenly spaced views in [0, 1].

    Raises UserError for fewer than 4 views.
    """
    stride = len(views) // NUM_FRAMES
    if stride == 0:
        raise UserError(f"{len(views)} views are too few to estimate the elevation from; give it, or 4 views")
    sets = torch.stack([views[offset : offset + NUM_FRAMES * stride : stride] for offset in range(stride)])
    return float(estimator(sets).mean().clamp(0, MAX_ELEVATION_RAD))


def save(estimator: ElevationEstimator, path: str | Path) -> None:
    """Writes the trained weights as safetensors."""
    with replacing(path) as temporary:
        save_file(estimator.trained_state(), temporary, metadata={ENCODER: estimator.encoder.identity})


def load(path: str | Path = TINY_WEIGHTS, dino: str | Path | None = None) -> ElevationEstimator:
    """Loads an estimator; by default the one that is shipped.

    Args:
        dino: the directory of the DINO model that it was trained with, if it was.

    Raises:
        UserError: the file is missing, is not safetensors, was trained with another encoder, or holds values
            that are not finite.
    """
    estimator = ElevationEstimator(dino)
    if not Path(path).is_file():
        raise UserError(f"no elevation weights at {path}; make them with `im3d train-elevation`")
    with weights_files.opened(path) as file:
        made_with = (file.metadata() or {}).get(ENCODER, TinyEncoder.identity)
        weights = {
            name: weights_files.to_float32(file.get_tensor(name), name, f"elevation weights {path}")
            for name in file.keys()  # noqa: SIM118 - not a dict
        }
    expected = {name: tensor.shape for name, tensor in estimator.trained_state().items()}
    fit = {name: tensor.shape for name, tensor in weights.items()} == expected
    if not fit or made_with != estimator.encoder.identity:
        raise UserError(
            f"elevation weights {path} fit another model: they take features of {made_with!r}, not of"
            f" {estimator.encoder.identity!r}; give config.elevation.dino with which they were trained"
        )
    estimator.load_state_dict(weights, strict=False)
    return estimator.eval()
