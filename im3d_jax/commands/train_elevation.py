"""`im3d train-elevation`: trains the estimator of a video's elevation (Sec. 3.3). Reads downwards.

    im3d train-elevation --workdir=runs/elevation

Paper: trained on renders of the 100k assets. Here: on those of a data set, or on procedural objects, with
blur, noise, shifts and colour changes, because at test time it sees generated views, which are less sharp and
less consistent than renders.

The estimator is PyTorch's, so it has a loop of its own; data, progress, stops and rules of resumption are
those of `im3d train`. What is random of a step is a function of the seed and of its number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from im3d_jax import checkpoint, config_flags
from im3d_jax.data import Example, Source, pipeline
from im3d_jax.data.sources import ProceduralSource, open_source
from im3d_jax.training import hosts
from im3d_jax.training.watch import Watch, Work
from recon_torch.blur import convolve
from recon_torch.elevation import estimator as elevation
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory, replacing
from recon_torch.views.images import to_uint8

CHECKPOINT = "checkpoint.safetensors"
TEST_VIEWS = 16  # of a video, as generators make them
HISTOGRAM_DEG = (0, 1, 2, 3, 5, 10, 45)
MAY_CHANGE = ("num_test_objects", "loader", "checkpoint_every", "log_every", "tensorboard", "max_skipped")
"""Keys of the config that may change from one start of a run to the next."""


def main(argv: list[str]) -> None:
    parser = CommandParser("train-elevation", __doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the checkpoint, weights and metrics")
    flags, config = config_flags.parse(argv, parser, default="configs/elevation_tiny.py")
    make_directory(flags.workdir)
    estimator, is_done = train(config, flags.workdir)
    if not is_done:
        raise SystemExit(hosts.EXIT_REQUEUE)
    weights = flags.workdir / "elevation.safetensors"
    elevation.save(estimator, weights)
    print(f"wrote {weights}")
    for degraded in (False, True):
        errors_deg = errors_on_test_deg(estimator, config, degraded)
        print(("degraded " if degraded else "true ") + "views: " + describe(errors_deg))


def train(config: ConfigDict, workdir: Path) -> tuple[elevation.ElevationEstimator, bool]:
    """Minimises the absolute error with AdamW, going on where `workdir` stands.

    Returns the estimator and whether all steps are done.
    """
    learner = make_learner(config)
    step = restore(workdir, learner, settings_of(config))
    source = open_split(config, config.data.split, config.num_objects, config.num_views)
    examples = open_examples(config, source, config.batch_size, start=step, shuffle=True)
    is_stopped = step == config.num_steps
    with hosts.StopSignal() as stop, watch(config, workdir, step) as shown:
        while not is_stopped:
            asked = monotonic()
            videos = next(examples)
            wait_s = monotonic() - asked
            metrics = train_step(learner, config, videos, step)
            step += 1
            ids = [each["id"] for each in videos]
            shown.add(step, "elevation", metrics, ids, wait_s, len(examples.skipped))
            is_stopped = stop.at(step) or step == config.num_steps
            if is_stopped or step % config.checkpoint_every == 0:
                shown.write()
                save(workdir, step, learner, settings_of(config))
    examples.close()
    return learner.estimator.eval(), step == config.num_steps


class Learner(NamedTuple):
    """What changes in a step: the estimator, AdamW, and its rate and momentum over the run."""

    estimator: elevation.ElevationEstimator
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.OneCycleLR


def make_learner(config: ConfigDict) -> Learner:
    """At the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        estimator = elevation.ElevationEstimator(config.dino or None)
    trained = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.05
    )
    return Learner(estimator, optimizer, schedule)


def train_step(learner: Learner, config: ConfigDict, videos: Sequence[Example], step: int) -> dict:
    """One step, which leaves the weights alone if it is not finite. Returns metrics for `Watch.add`."""
    estimator, optimizer, schedule = learner
    generator = torch.Generator().manual_seed(seed_of(config.seed, step))
    frames = torch.from_numpy(np.stack([each["rgb"] for each in videos]))
    batch = degrade(draw_sets(frames, generator), generator, **config.augment)
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


def draw_sets(frames: Float[Tensor, "B K H W 3"], generator: torch.Generator) -> Float[Tensor, "B T H W 3"]:
    """T = 4 evenly spaced frames of each video's K, from a random first one."""
    stride = frames.shape[1] // elevation.NUM_FRAMES
    if not stride:
        raise UserError(f"config.num_views is {frames.shape[1]}; give at least {elevation.NUM_FRAMES}")
    offsets = torch.randint(stride, (len(frames), 1), generator=generator)
    chosen = offsets + stride * torch.arange(elevation.NUM_FRAMES)
    return frames[torch.arange(len(frames))[:, None], chosen]


def seed_of(seed: int, step: int) -> int:
    """A seed for what is random of one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


# ---- Augmentation ----


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
    # Not `gaussian_window`, which rounds otherwise: a seed is to train the same weights as before.
    window = torch.softmax(-(torch.arange(-3, 4) ** 2) / (2 * max(sigma_px, 0.1) ** 2), 0)
    planes = F.pad(video.permute(0, 3, 1, 2), (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
    planes = convolve(convolve(planes, window, 2), window, 3)
    return planes[:, 0].unflatten(0, (-1, 3)).permute(0, 2, 3, 1)


# ---- Data ----


class Kept:
    """The first `count` objects of a procedural source, rendered once: that takes longer than a step."""

    def __init__(self, source: ProceduralSource, count: int):
        self._source, self._count = source, count
        self._made: dict[int, Example] = {}

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> list[Example]:
        # All of a batch or none: every other number of objects would compile another program.
        if not self._made.keys() >= set(indices):
            made = self._source.batch(indices)
            frames = to_uint8(np.asarray(pipeline.stack_views(made)[0]))
            for index, each, rgb in zip(indices, made, frames, strict=True):
                self._made[index] = Example(id=each["id"], rgb=rgb, elevation_rad=each["elevation_rad"])
        kept = [self._made[index] for index in indices]
        return [each | {"rgb": np.float32(each["rgb"]) / 255} for each in kept]

    def __getitem__(self, index: int) -> Example:
        return self.batch([index])[0]


def open_split(config: ConfigDict, split: str, count: int, num_views: int) -> Source:
    """A split of the data set of `config.data`, or its first `count` procedural objects."""
    data = dict(path=config.data.path, split=split, first_object=0)
    source = open_source(**data, seed=config.seed, size=config.size, num_views=num_views)
    return Kept(source, count) if isinstance(source, ProceduralSource) else source


def open_examples(config: ConfigDict, source: Source, batch_size: int, **order) -> pipeline.Stream:
    """Batches, read ahead. order: `start` and `shuffle` of `pipeline.open_stream`."""
    shard = pipeline.Shard(0, 1)
    return pipeline.open_stream(
        source, seed=config.seed, batch_size=batch_size, shard=shard, **order, **config.loader
    )


# ---- What a run leaves ----


def watch(config: ConfigDict, workdir: Path, step: int) -> Watch:
    """What shows the run, which stands at `step`."""
    work = Work(config.batch_size, config.batch_size * elevation.NUM_FRAMES)
    return Watch(
        workdir,
        step=step,
        num_steps=config.num_steps,
        log_every=config.log_every,
        work={"elevation": work},
        max_skipped=config.max_skipped,
        tensorboard=config.tensorboard,
    )


def settings_of(config: ConfigDict) -> dict:
    """What a run depends on: it only goes on with the same."""
    return {key: value for key, value in config_flags.as_json(config).items() if key not in MAY_CHANGE}


def save(workdir: Path, step: int, learner: Learner, settings: dict) -> None:
    """Writes the checkpoint: weights, moments and, as JSON, the step and the settings it depends on."""
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


def restore(workdir: Path, learner: Learner, settings: dict) -> int:
    """Restores what `save` wrote, if it did. Returns the step.

    Raises UserError if it was saved with other settings, or is damaged.
    """
    path = workdir / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["im3d"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start anew") from None
    checkpoint.check_settings(workdir, meta["settings"], settings)
    state, weights = {}, {}
    for name, tensor in tensors.items():
        owner, rest = name.split(".", 1)
        if owner == "estimator":
            weights[rest] = tensor
        else:
            number, leaf = rest.split(".")
            state.setdefault(int(number), {})[leaf] = tensor
    learner.estimator.load_state_dict(weights, strict=False)  # a frozen encoder is not in it
    learner.optimizer.load_state_dict({"state": state, "param_groups": meta["param_groups"]})
    learner.schedule.load_state_dict({"last_epoch": meta["step"]})
    return meta["step"]


# ---- Result ----


def errors_on_test_deg(
    estimator: elevation.ElevationEstimator, config: ConfigDict, degraded: bool
) -> np.ndarray:
    """Absolute errors on 16-view videos of the test split, as rendered or degraded as in training."""
    source = open_split(config, config.data.test_split, config.num_test_objects, TEST_VIEWS)
    videos = open_examples(config, source, 1, start=0, shuffle=False)
    generator = torch.Generator().manual_seed(config.seed)
    errors_rad = []
    for _ in range(min(config.num_test_objects, len(source))):
        (video,) = next(videos)
        frames = torch.from_numpy(video["rgb"])
        if degraded:
            frames = degrade(frames[None], generator, **config.augment)[0]
        errors_rad.append(abs(elevation.estimate(estimator, frames) - video["elevation_rad"]))
    videos.close()
    return np.degrees(errors_rad)


def describe(errors_deg: np.ndarray) -> str:
    counts, edges = np.histogram(errors_deg, HISTOGRAM_DEG)
    bins = ", ".join(f"{a:g}-{b:g}: {n}" for a, b, n in zip(edges, edges[1:], counts, strict=False))
    return f"median error {np.median(errors_deg):.2f} deg, mean {errors_deg.mean():.2f}; histogram {bins}"
