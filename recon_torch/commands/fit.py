"""`im3d fit`: posed views, or a turntable video -> Gaussians, a turntable, a report (Sec. 3.3 alone)."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from recon_torch.errors import CommandParser, UserError, choice
from recon_torch.files import make_directory, write_json
from recon_torch.fit import quality, recovery
from recon_torch.fit.optimization import Fit
from recon_torch.settings import Engine, FitSettings, Representation
from recon_torch.views import check, world
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import MaskFunction, Views, load_views
from recon_torch.views.images import contact_sheet, write_image
from recon_torch.views.masks import VIDEO_EDGE_PX, background_masks, isnet_masks
from recon_torch.views.transforms import write_transforms
from recon_torch.views.video import load_video, write_video

EXAMPLES = """examples:
  im3d fit --views out/views --out fitted
  im3d fit --views captured --check                       # says what is wrong with each frame
  im3d fit --views captured --held-out 8 --out fitted     # every 8th view is kept for testing
  im3d fit --views train --held-out test --out fitted --lpips-weights vgg16-397923af.pth
  im3d fit --views photos --isnet-weights isnet-general-use.onnx --normalize --out fitted
  im3d fit --views captured/* --at-once 8 --out fitted      # many assets, to fitted/NAME; see also --resume
  im3d fit --video turntable.mp4 --num-views 24 --elevation-deg 15 --out fitted

A directory of views has images and nerfstudio's transforms.json. Foreground: the mask_path of a frame, or the
image's alpha, or IS-Net, or else what differs from a plain background. docs/reconstruction.md says more.
"""
PACKAGES = ("torch", "gsplat", "lpips", "numba", "numpy")
TURNTABLE_FRAMES, TURNTABLE_FPS = 96, 24
SHEET_VIEWS = 8
LOG_EVERY_STEPS = 200
UP_AXES = {
    **{"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)},
    **{"-x": (-1.0, 0.0, 0.0), "-y": (0.0, -1.0, 0.0), "-z": (0.0, 0.0, -1.0)},
}
SMALLEST_RADIUS, LARGEST_RADIUS, MOST_OFFSET = 0.2, 0.65, 0.25  # of the masks' hull that need no --normalize


@dataclass
class Job:
    """One asset on its way from views to files."""

    source: Path
    out: Path
    train: Views
    held_out: Views | None
    unit: world.World
    fit: Fit
    notes: list[str]
    seconds: dict[str, float]


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    if flags.check:
        _check_all(flags.views)
        return
    try:
        _fit_all(flags)
    except Exception as error:
        if not recovery.is_out_of_memory(error):
            raise
        advice = "fewer or smaller views (--size)" + (
            ", or a smaller --at-once" if len(flags.views) > 1 else ""
        )
        raise UserError(f"out of memory; give {advice}") from error


class Failures:
    """What went wrong with which of several assets: said at once, and again in the end."""

    def __init__(self, sources: list[Path]):
        self._sources = sources
        self._errors: dict[Path, UserError] = {}

    @contextlib.contextmanager
    def of(self, source: Path) -> Iterator[None]:
        """Takes a UserError of what is done for `source`."""
        try:
            yield
        except UserError as error:
            self._errors[source] = error
            if len(self._sources) > 1:
                print(f"im3d: {source}: {error}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Raises UserError if there was any."""
        if self._errors and len(self._sources) == 1:
            raise self._errors[self._sources[0]]
        if self._errors:
            names = ", ".join(map(str, self._errors))
            raise UserError(f"{len(self._errors)} of {len(self._sources)} failed, see above: {names}")


def _check_all(sources: list[Path]) -> None:
    failures = Failures(sources)
    for source in sources:
        with failures.of(source):
            check.main(source)
    failures.end()


def _fit_all(flags: argparse.Namespace) -> None:
    sources = flags.views or [flags.video]
    outs, failures = _outs(sources, flags.out), Failures(sources)
    todo = [source for source in sources if not (flags.resume and (outs[source] / "report.json").exists())]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {len(sources)} are there already")
    for first in range(0, len(todo), flags.at_once):
        jobs = []
        for source in todo[first : first + flags.at_once]:
            with failures.of(source):
                jobs.append(_load_job(flags, source, outs[source]))
        for alike in _by_size(jobs):
            _fit_together(flags, alike, failures)
    failures.end()


def _outs(sources: list[Path], out: Path) -> dict[Path, Path]:
    """Where each asset goes: `out` itself, or if there are several, its part of the path below `out`."""
    if len(sources) == 1:
        return {sources[0]: out}
    whole = [source.resolve() for source in sources]
    if len(set(whole)) < len(whole):
        raise UserError("--views names a directory twice")
    common = os.path.commonpath([path.parent for path in whole])
    return {source: out / path.relative_to(common) for source, path in zip(sources, whole, strict=True)}


def _by_size(jobs: list[Job]) -> list[list[Job]]:
    """Only views of one size can be fitted together."""
    groups: dict[tuple[int, int], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.train.cameras.width, job.train.cameras.height), []).append(job)
    return list(groups.values())


def _load_job(flags: argparse.Namespace, source: Path, out: Path) -> Job:
    started = time.perf_counter()
    train, held_out, notes = _load(flags, source)
    make_directory(out)
    unit, world_notes = _world(train, flags.normalize)
    notes += world_notes
    for note in notes:
        print(f"note: {source}: {note}", flush=True)
    fit = Fit(
        unit.cameras(train.cameras),
        FitSettings(
            num_steps=flags.steps,
            seed=flags.seed,
            engine=choice(Engine, flags.engine, "--engine"),
            representation=flags.representation,
            lpips_net=flags.lpips_net,
            lpips_weights=flags.lpips_weights,
        ),
    )
    fit.set_targets(torch.from_numpy(train.images), torch.from_numpy(train.masks))
    seconds = {"load": time.perf_counter() - started}
    return Job(source, out, train, held_out, unit, fit, notes, seconds)


def _fit_together(flags: argparse.Namespace, jobs: list[Job], failures: Failures) -> None:
    started = time.perf_counter()
    given_up = _run_with_progress([job.fit for job in jobs], flags.steps)
    fit_s = time.perf_counter() - started
    for job, error in zip(jobs, given_up, strict=True):
        with failures.of(job.source):
            if error is not None:
                raise error
            job.seconds["fit"] = fit_s
            _write(flags, job, len(jobs))


def _write(flags: argparse.Namespace, job: Job, num_together: int) -> None:
    started, fit, unit = time.perf_counter(), job.fit, job.unit
    agreement = {"training": fit.metrics()}
    if job.held_out is not None:
        truth = (torch.from_numpy(array) for array in (job.held_out.images, job.held_out.masks))
        agreement["held_out"] = fit.compare(unit.cameras(job.held_out.cameras), *truth)
    up = np.array(UP_AXES[flags.up]) if flags.up else world.up_axis(fit.cameras)
    asset = _write_asset(job, up, flags.normalize)
    judged = quality.inspect(fit, world.turntable(fit.cameras, up, quality.QUARTER_TURNS), up)
    job.seconds["export"] = time.perf_counter() - started
    place = {"center": unit.center, "scale": unit.scale, "up": up, "asset_is_normalized": flags.normalize}
    report = _report(job, agreement, num_together) | {"world": place, "quality": judged}
    write_json(job.out / "report.json", report)
    for name, values in agreement.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print("; ".join([f"quality: {judged['verdict']}", *judged["reasons"], *judged["hints"]]))
    print(f"{asset} after {fit.step} steps", flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("fit", "Fit 3D Gaussians to views of one object.")
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add(
        "--views",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="images and transforms.json; several: assets",
    )
    add("--video", type=Path, metavar="FILE", help="or a video of one turn of the object")
    add("--out", type=Path, metavar="DIR", help="gets asset.ply, turntable.mp4, report.json ...")
    add("--at-once", type=int, default=4, metavar="N", help="assets fitted together (default %(default)s)")
    add("--resume", action="store_true", help="leave out assets whose report.json is there")
    add("--check", action="store_true", help="say what is wrong with each frame of --views, and end")
    add("--allow-missing", action="store_true", help="leave out frames whose image does not exist")
    add("--held-out", metavar="DIR|N", help="test views: another directory, or every N-th of the views")
    add("--size", type=int, metavar="PX", help="fit to the views reduced to this height")
    add("--normalize", action="store_true", help="find the object by its masks, and write it at unit size")
    add("--up", choices=UP_AXES, help="axis of the turntable (default: up in the pictures)")
    add(
        "--num-views",
        type=int,
        default=16,
        metavar="K",
        help="frames of --video to use (default %(default)s)",
    )
    add("--elevation-deg", type=float, metavar="E", help="of the camera of --video")
    add("--fov-deg", type=float, default=33.8, help="vertical, of --video (default %(default)s)")
    add("--clockwise", action="store_true", help="the camera of --video goes so, seen from above")
    add("--steps", type=int, default=FitSettings.num_steps, help="optimisation steps (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--isnet-weights", type=Path, metavar="FILE", help="cut out the foreground with IS-Net")
    add("--lpips-net", default=FitSettings.lpips_net, help="vgg, alex or squeeze (default %(default)s)")
    add(
        "--lpips-weights",
        default=FitSettings.lpips_weights,
        metavar="FILE",
        help="its backbone weights as torchvision names them, or 'random' (default: torchvision's cache; "
        "where that has none, the loss is without LPIPS)",
    )
    add("--representation", default=FitSettings.representation, choices=tuple(map(str, Representation)))
    add("--engine", default="auto", help="rasteriser: auto, gsplat or cpu (default %(default)s)")
    flags = parser.parse_args(argv)
    elevation_deg = flags.elevation_deg
    requirements = {
        "give either --views DIR or --video FILE": bool(flags.views) != (flags.video is not None),
        "--check needs --views DIR": not flags.check or bool(flags.views),
        "give --out DIR": flags.check or flags.out is not None,
        "--video needs --elevation-deg, between -90 and 90": flags.video is None
        or (elevation_deg is not None and -90 < elevation_deg < 90),
        f"--fov-deg {flags.fov_deg} must lie between 0 and 180": 0 < flags.fov_deg < 180,
        f"--steps {flags.steps} must be at least 1": flags.steps >= 1,
        f"--at-once {flags.at_once} must be at least 1": flags.at_once >= 1,
        "with several --views, --held-out is N": len(flags.views) < 2 or (flags.held_out or "2").isdecimal(),
        f"--seed {flags.seed} must be at least 0": flags.seed >= 0,
    }
    for message, holds in requirements.items():
        if not holds:
            raise UserError(message)
    return flags


def _load(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None, list[str]]:
    """The training views, the held-out views, and what to note about both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, held_out = _split(flags, source)
    notes = [note for views in (train, held_out) if views is not None for note in views.notes]
    notes += [str(warning.message) for warning in caught if warning.category is UserWarning]
    return train, held_out, list(dict.fromkeys(notes))


def _split(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None]:
    segment = background_masks
    if flags.video is not None:
        segment = functools.partial(background_masks, edge_px=VIDEO_EDGE_PX)
    if flags.isnet_weights is not None:
        segment = functools.partial(isnet_masks, weights_path=flags.isnet_weights)
    read = functools.partial(
        load_views, segment=segment, height=flags.size, allow_missing=flags.allow_missing
    )
    views = read(source) if flags.video is None else _read_video(flags, segment)
    if flags.held_out is None:
        return views, None
    if not flags.held_out.isdecimal():
        return views, read(Path(flags.held_out))
    every, index = int(flags.held_out), np.arange(len(views))
    if not 2 <= every <= len(views):
        raise UserError(f"--held-out {every} must be from 2 to the number of views, {len(views)}")
    last_of_each = index % every == every - 1
    return views.take(index[~last_of_each]), views.take(index[last_of_each])


def _read_video(flags: argparse.Namespace, segment: MaskFunction) -> Views:
    return load_video(
        flags.video,
        segment,
        num_views=flags.num_views,
        elevation_rad=float(np.radians(flags.elevation_deg)),
        fov_deg=flags.fov_deg,
        clockwise=flags.clockwise,
        height=flags.size,
    )


def _world(views: Views, normalize: bool) -> tuple[world.World, list[str]]:
    """The world to fit in, and what speaks against it."""
    if normalize:
        return world.of_masks(views.cameras, views.masks), []
    unit = world.of_cameras(views.cameras)
    points = world.hull_of_masks(unit.cameras(views.cameras), views.masks)
    if not len(points):
        return unit, [
            "no point is inside all masks; do the cameras and the images belong together (--check)?"
        ]
    center, radius = world.ball_around(points)
    offset = float(np.linalg.norm(center))
    if offset <= MOST_OFFSET and SMALLEST_RADIUS <= radius <= LARGEST_RADIUS:
        return unit, []
    return unit, [
        f"by the masks the object has radius {radius:.2f}, {offset:.2f} from where the cameras look; "
        "the fit expects 0.5 and 0: try --normalize"
    ]


def _run_with_progress(fits: list[Fit], num_steps: int) -> list[UserError | None]:
    """A bar with rate and ETA on a terminal, plain lines in a log. Returns why each was given up."""
    with tqdm(total=num_steps * len(fits), desc="fit", unit="step", disable=None) as bar:

        def on_step(fit: Fit, losses: dict) -> None:
            bar.update(sum(each.step for each in fits) - bar.n)  # steps come again after a setback
            if bar.disable and fit is fits[-1] and fit.step % LOG_EVERY_STEPS == 0:
                print(
                    f"step {fit.step}: loss {losses['loss']:.4f}, {fit.num_gaussians} Gaussians", flush=True
                )

        return recovery.run_together(fits, num_steps, on_step)


def _write_asset(job: Job, up: Float[np.ndarray, "3"], normalize: bool) -> Path:
    """In the views' own world, or, if `normalize`, in the fit's. Returns the path of the asset itself."""
    out, fit, train = job.out, job.fit, job.train
    asset = fit.scene.save(out / "asset.ply", None if normalize else job.unit)
    around = world.turntable(fit.cameras, up, TURNTABLE_FRAMES)
    write_video(out / "turntable.mp4", _rgb(fit, around), TURNTABLE_FPS)

    renders = _rgb(fit, fit.cameras)
    names = [f"renders/{index:03d}.png" for index in range(len(train))]
    for name, render in zip(names, renders, strict=True):
        write_image(out / name, render)
    write_transforms(out / "transforms.json", fit.cameras if normalize else train.cameras, names)

    shown = np.unique(np.linspace(0, len(train) - 1, SHEET_VIEWS).round().astype(int))
    rows = [train.images[shown], renders[shown]]
    write_image(out / "views.png", contact_sheet(rows, ["views", "renders"]))
    return asset


def _rgb(fit: Fit, cameras: Cameras) -> Float[np.ndarray, "K H W 3"]:
    parts = [fit.render(cameras[index]).rgb.clamp(0, 1).cpu().numpy() for index in range(len(cameras))]
    return np.concatenate(parts)


def _report(job: Job, agreement: dict, num_together: int) -> dict:
    fit = job.fit
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if fit.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return agreement | {
        "seconds": job.seconds,
        "assets_fitted_together": num_together,  # which took the seconds of the fit all of them
        "num_steps": fit.step,
        "num_gaussians": fit.num_gaussians,
        "seed": fit.settings.seed,
        "versions": versions | {"python": platform.python_version()},
        "device": device,
        "notes": job.notes + fit.notes + fit.setbacks,
    }
