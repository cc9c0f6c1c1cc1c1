"""The parts of training the elevation estimator (Sec. 3.3): data, augmentation, step, checkpoint, errors.

The estimator is PyTorch's, so it does not use `training.state` and `training.step`. What is random of a step
is a function of the run's seed and of the step's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from im3d_jax import checkpoint
from im3d_jax.config_kinds import AugmentSettings
from im3d_jax.data import Example, input_pipeline
from im3d_jax.data.sources import ProceduralSource
from recon_torch import outputs, seeds, weights_files
from recon_torch.blur import convolve
from recon_torch.elevation import estimator as elevation
from recon_torch.errors import UserError, first_line
from recon_torch.files import replacing
from recon_torch.outputs import Kind
from recon_torch.views.images import to_uint8

CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "elevation.safetensors"

RUN = Kind(
    "train-elevation",
    (r"checkpoint\.safetensors", r"metrics\.jsonl", r"elevation\.safetensors", "tensorboard/"),
    grows=True,
)
"""What a run writes into its --workdir."""

# ---- Data ----


class Kept:
    """The first `count` objects of a procedural source.

    Each is rendered once, because rendering takes longer than a step.
    """

    def __init__(self, source: ProceduralSource, count: int):
        self._source, self._count = source, count
        self._made: dict[int, Example] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> list[Example]:
        # All of a batch are rendered or none: every other number of objects would compile another program.
        if not self._made.keys() >= set(indices):
            made = self._source.batch(indices)
            frames = to_uint8(np.asarray(input_pipeline.stack_views(made)[0]))
            for index, each, rgb in zip(indices, made, frames, strict=True):
                self._made[index] = Example(id=each["id"], rgb=rgb, elevation_rad=each["elevation_rad"])
        kept = [self._made[index] for index in indices]
        return [{**each, "rgb": np.asarray(each["rgb"], np.float32) / 255} for each in kept]


def draw_sets(frames: Float[Tensor, "B K H W 3"], generator: torch.Generator) -> Float[Tensor, "B 4 H W 3"]:
    """4 evenly spaced frames of each video's K, from a random first one.

    Raises UserError for fewer than 4 frames.
    """
    stride = frames.shape[1] // elevation.NUM_FRAMES
    if not stride:
        raise UserError(f"config.num_views is {frames.shape[1]}; give at least {elevation.NUM_FRAMES}")
    offsets = torch.randint(stride, (len(frames), 1), generator=generator)
    chosen = offsets + stride * torch.arange(elevation.NUM_FRAMES)
    return frames[torch.arange(len(frames))[:, None], chosen]


# ---- Augmentation ----


def degrade(
    frames: Float[Tensor, "B T H W 3"], generator: torch.Generator, amounts: AugmentSettings
) -> Float[Tensor, "B T H W 3"]:
    """Frames as a generator might make them: less sharp and less consistent than renders.

    The three channels of a video also change places.
    """
    batch, time = frames.shape[:2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    order = uniform(batch, 3).argsort(-1)[:, None, None, None].expand_as(frames)
    tint = 1 + amounts.colour * (2 * uniform(batch, 1, 1, 1, 3) - 1)
    frames = 1 - (1 - frames.gather(-1, order)) * tint
    frames = torch.stack([_blur(video, float(amounts.blur_px * uniform(1))) for video in frames])
    for axis in (2, 3):
        shifts = torch.randint(-amounts.shift_px, amounts.shift_px + 1, (batch, time), generator=generator)
        size = frames.shape[axis]
        index = (torch.arange(size) - shifts[..., None]) % size
        index = index[:, :, :, None, None] if axis == 2 else index[:, :, None, :, None]
        frames = frames.gather(axis, index.expand_as(frames))
    grain = torch.randn(frames.shape, generator=generator)
    return (frames + amounts.noise * uniform(batch, time, 1, 1, 1) * grain).clamp(0, 1)


def _blur(video: Float[Tensor, "T H W 3"], sigma_px: float) -> Float[Tensor, "T H W 3"]:
    # Not `gaussian_window`, which rounds otherwise: a seed is to train the same weights as before.
    window = torch.softmax(-(torch.arange(-3, 4) ** 2) / (2 * max(sigma_px, 0.1) ** 2), 0)
    planes = F.pad(video.permute(0, 3, 1, 2), (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
    planes = convolve(convolve(planes, window, 2), window, 3)
    return planes[:, 0].unflatten(0, (-1, 3)).permute(0, 2, 3, 1)


# ---- Steps ----


class Learner(NamedTuple):
    """What changes in a step: the estimator, AdamW, and its rate and momentum over the run."""

    estimator: elevation.ElevationEstimator
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.OneCycleLR


def make_learner(
    seed: int, dino: str | None, num_steps: int, learning_rate: float, weight_decay: float
) -> Learner:
    """The learner at the first step of a run.

    Args:
        seed: of the initial weights.
        dino: directory of a DINO model instead of the small encoder.
        learning_rate: its peak.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimator = elevation.ElevationEstimator(dino)
    trained = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.05
    )
    return Learner(estimator, optimizer, schedule)


def train_step(
    learner: Learner, videos: Sequence[Example], amounts: AugmentSettings, seed: int, step: int
) -> dict[str, float | bool]:
    """Does one step, which leaves the weights alone if it is not finite. Returns metrics for `Watch.add`."""
    estimator, optimizer, schedule = learner
    generator = torch.Generator().manual_seed(seeds.fold_in(seed, step))
    frames = torch.from_numpy(np.stack([each["rgb"] for each in videos]))
    batch = degrade(draw_sets(frames, generator), generator, amounts)
    elevations_rad = torch.tensor([each["elevation_rad"] for each in videos], dtype=torch.float32)
    error = (estimator(batch) - elevations_rad).abs().mean()
    optimizer.zero_grad()
    error.backward()
    (group,) = optimizer.param_groups
    grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in group["params"]])
    is_finite = bool(error.isfinite() and grad_norm.isfinite())
    loss, rate = float(error.detach()), group["lr"]
    if is_finite:
        optimizer.step()
    schedule.step()
    metrics = {"loss": loss, "error_deg": np.degrees(loss), "grad_norm": float(grad_norm)}
    return metrics | {"learning_rate": rate, "is_finite": is_finite}


# ---- Checkpoint ----


def opened(workdir: Path) -> AbstractContextManager[Path]:
    """Holds the --workdir of a run, see `outputs.opened`. A run is also known by its checkpoint."""
    path = workdir / CHECKPOINT
    if path.is_file() and not path.is_symlink():
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            if "im3d" in (file.metadata() or {}):
                outputs.claim(workdir, RUN)
    return outputs.opened(workdir, RUN)


def save(workdir: Path, step: int, learner: Learner, settings: dict[str, Any]) -> None:
    """Writes the checkpoint: weights, moments and, as JSON, the step and the settings that it depends on."""
    state = learner.optimizer.state_dict()
    moments = {
        f"optimizer.{number}.{name}": tensor
        for number, each in state["state"].items()
        for name, tensor in each.items()
    }
    weights = {f"estimator.{name}": tensor for name, tensor in learner.estimator.trained_state().items()}
    meta = {"step": step, "settings": settings, "param_groups": state["param_groups"]}
    with replacing(workdir / CHECKPOINT) as temporary:
        save_file(weights | moments, temporary, metadata={"im3d": json.dumps(meta)})


def restore(workdir: Path, learner: Learner, settings: dict[str, Any]) -> int:
    """Restores what `save` wrote, and returns its step; 0 if there is no checkpoint.

    Raises UserError if it was saved with other settings, or is damaged.
    """
    path = workdir / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with weights_files.opened(path) as file:
            meta = json.loads((file.metadata() or {})["im3d"])
            step, saved, groups = int(meta["step"]), dict(meta["settings"]), meta["param_groups"]
            tensors = {
                name: weights_files.to_float32(file.get_tensor(name), name, path)
                for name in file.keys()  # noqa: SIM118 - not a dict
            }
    except UserError as error:
        raise UserError(f"{error}; or remove it to start anew") from None
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error, 80)}); remove it to start anew") from None
    checkpoint.check_settings(workdir, saved, settings)
    try:
        weights, moments = _divided(tensors, learner)
        learner.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error, 80)}); remove it to start anew") from None
    learner.estimator.load_state_dict(weights, strict=False)  # a frozen encoder is not in it
    learner.schedule.load_state_dict({"last_epoch": step})
    return step


def _divided(
    tensors: dict[str, Tensor], learner: Learner
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """(weights by name, moments by the number of their parameter). Raises ValueError if they do not fit."""
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, rest = name.split(".", 1)
        if owner == "estimator":
            weights[rest] = tensor
        else:
            number, leaf = rest.split(".")
            moments.setdefault(int(number), {})[leaf] = tensor
    expected = {name: tensor.shape for name, tensor in learner.estimator.trained_state().items()}
    (group,) = learner.optimizer.param_groups
    shapes = {number: parameter.shape for number, parameter in enumerate(group["params"])}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ValueError("its weights are of another estimator")
    for leaf in ("exp_avg", "exp_avg_sq"):  # which there are none of before the first step
        if moments and {number: each[leaf].shape for number, each in moments.items()} != shapes:
            raise ValueError("its moments are of another estimator")
    return weights, moments


# ---- Errors ----


def errors_deg(
    estimator: elevation.ElevationEstimator,
    videos: Iterable[Example],
    amounts: AugmentSettings | None,
    seed: int,
) -> Float[np.ndarray, " N"]:
    """The absolute error on each of N videos, degraded by random amounts if `amounts` is given."""
    generator = torch.Generator().manual_seed(seed)
    errors_rad = []
    for video in videos:
        frames = torch.from_numpy(video["rgb"])
        if amounts:
            frames = degrade(frames[None], generator, amounts)[0]
        errors_rad.append(abs(elevation.estimate(estimator, frames) - video["elevation_rad"]))
    return np.degrees(errors_rad)
