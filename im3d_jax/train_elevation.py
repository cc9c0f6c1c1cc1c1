"""`im3d train-elevation`: trains the estimator of a video's elevation on procedural objects (Sec. 3.3).

Paper: trained on renders of the 100k assets. Here: on procedural objects, with blur, noise, shifts and colour
changes, because at test time it sees generated views, which are less sharp and less consistent than renders.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from im3d_jax import config_flags
from im3d_jax.data import objects, procedural
from recon_torch import elevation
from recon_torch.errors import CommandParser

RENDER_BATCH = 256
HISTOGRAM_DEG = (0, 1, 2, 3, 5, 10, 45)


def main(argv: list[str]) -> None:
    parser = CommandParser("train-elevation", "Trains the estimator of a video's elevation.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors to write")
    flags, config = config_flags.parse(argv, parser, default="configs/elevation_tiny.py")
    start = time.perf_counter()
    frames, elevations_rad = render_split("train", config.num_objects, config)
    print(f"rendered {len(frames)} videos in {time.perf_counter() - start:.0f} s", flush=True)
    estimator = train(frames, elevations_rad, config)
    elevation.save(estimator, flags.out)
    print(f"trained in {time.perf_counter() - start:.0f} s; wrote {flags.out}")
    for degraded in (False, True):
        errors_deg = errors_on_test_deg(estimator, config, degraded)
        print(("degraded " if degraded else "true ") + "views: " + describe(errors_deg))


def render_split(
    split: str, count: int, config: ConfigDict, num_views: int = elevation.NUM_FRAMES
) -> tuple[UInt8[Tensor, "B T H W 3"], Float[Tensor, " B"]]:
    """Evenly spaced views of the split's first objects, from a random first azimuth, and their elevations."""
    first = objects.SPLITS[split][0]
    rng = np.random.default_rng([config.seed, first])
    frames, elevations_rad = [], []
    for start in tqdm(range(0, count, RENDER_BATCH), desc=f"render {split}", disable=None):
        indices = range(first + start, first + min(start + RENDER_BATCH, count))
        phase = rng.uniform(0, 2 * np.pi / num_views)
        azimuths_rad = phase + 2 * np.pi * np.arange(num_views) / num_views
        video = procedural.turntables(config.seed, indices, size=config.size, azimuths_rad=azimuths_rad)
        frames.append(torch.from_numpy(np.rint(np.asarray(video.views.rgb) * 255).astype(np.uint8)))
        elevations_rad.append(torch.from_numpy(np.asarray(video.elevation_rad, np.float32)))
    return torch.cat(frames), torch.cat(elevations_rad)


def train(
    frames: UInt8[Tensor, "B T H W 3"], elevations_rad: Float[Tensor, " B"], config: ConfigDict
) -> elevation.ElevationEstimator:
    """Minimises the absolute error with AdamW; the seed fixes weights, batches and augmentations."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        estimator = elevation.ElevationEstimator(config.dino or None)
    trained = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.05
    )
    recent = []
    for step in tqdm(range(config.num_steps), desc="train", disable=None):
        chosen = torch.randint(len(frames), (config.batch_size,), generator=generator)
        batch = degrade(frames[chosen].float() / 255, generator, **config.augment)
        error = (estimator(batch) - elevations_rad[chosen]).abs().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        recent.append(float(error.detach()))
        if (step + 1) % 200 == 0:
            tqdm.write(f"step {step + 1}: mean error {np.degrees(np.mean(recent)):.2f} deg")
            recent.clear()
    return estimator.eval()


def degrade(
    frames: Float[Tensor, "B T H W 3"],
    generator: torch.Generator,
    *,
    noise: float,
    blur_px: float,
    shift_px: int,
    colour: float,
) -> Float[Tensor, "B T H W 3"]:
    """Frames as a generator might make them. Each amount is the largest; each video or frame draws its own.

    Args:
        noise, blur_px: standard deviations, of a Gaussian each. shift_px: of each frame by itself.
        colour: relative strength of each channel; the three channels also change places.
    """
    batch, time = frames.shape[:2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    order = uniform(batch, 3).argsort(-1)[:, None, None, None].expand_as(frames)
    frames = 1 - (1 - frames.gather(-1, order)) * (1 + colour * (2 * uniform(batch, 1, 1, 1, 3) - 1))
    frames = torch.stack([_blur(video, float(blur_px * uniform(1))) for video in frames])
    for axis in (2, 3):
        shifts = torch.randint(-shift_px, shift_px + 1, (batch, time), generator=generator)
        size = frames.shape[axis]
        index = (torch.arange(size) - shifts[..., None]) % size
        index = index[:, :, :, None, None] if axis == 2 else index[:, :, None, :, None]
        frames = frames.gather(axis, index.expand_as(frames))
    grain = torch.randn(frames.shape, generator=generator)
    return (frames + noise * uniform(batch, time, 1, 1, 1) * grain).clamp(0, 1)


def _blur(video: Float[Tensor, "T H W 3"], sigma_px: float) -> Float[Tensor, "T H W 3"]:
    offsets = torch.arange(-3, 4)
    kernel = torch.softmax(-(offsets**2) / (2 * max(sigma_px, 0.1) ** 2), 0)
    planes = F.pad(video.permute(0, 3, 1, 2), (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, :, None]), kernel[None, None, None, :])
    return planes[:, 0].unflatten(0, (-1, 3)).permute(0, 2, 3, 1)


def errors_on_test_deg(
    estimator: elevation.ElevationEstimator, config: ConfigDict, degraded: bool
) -> np.ndarray:
    """Absolute errors on 16-view videos of test objects, as rendered or degraded as in training."""
    frames, elevations_rad = render_split("test", config.num_test_objects, config, num_views=16)
    generator = torch.Generator().manual_seed(config.seed)
    estimates = []
    for video in frames.float() / 255:
        if degraded:
            video = degrade(video[None], generator, **config.augment)[0]
        estimates.append(elevation.estimate(estimator, video))
    return np.degrees(np.abs(np.asarray(estimates) - elevations_rad.numpy()))


def describe(errors_deg: np.ndarray) -> str:
    counts, edges = np.histogram(errors_deg, HISTOGRAM_DEG)
    bins = ", ".join(f"{a:g}-{b:g}: {n}" for a, b, n in zip(edges, edges[1:], counts, strict=False))
    return f"median error {np.median(errors_deg):.2f} deg, mean {errors_deg.mean():.2f}; histogram {bins}"
