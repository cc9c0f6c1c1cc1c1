"""`im3d fit`: Gaussians, a turntable video and a report from views with known cameras (Sec. 3.3 alone)."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from recon_torch.errors import CommandParser, UserError, choice
from recon_torch.files import make_directory
from recon_torch.fit import recovery
from recon_torch.fit.asset import REPORT, Asset, prepare, write
from recon_torch.fit.optimization import Fit
from recon_torch.settings import Engine, FitSettings, Representation
from recon_torch.views.check import check
from recon_torch.views.directory import Views, load_views
from recon_torch.views.masks import VIDEO_EDGE_PX, background_masks, isnet_masks
from recon_torch.views.video import load_video

EXAMPLES = """examples:
  im3d fit --views out/views --out fitted
  im3d fit --views captured --check                         # says what is wrong with each frame
  im3d fit --views captured --held-out 8 --out fitted       # keeps every 8th view for testing
  im3d fit --views train --held-out test --out fitted --lpips-weights vgg16-397923af.pth
  im3d fit --views photos --isnet-weights isnet-general-use.onnx --normalize --out fitted
  im3d fit --views captured/* --at-once 8 --out fitted      # many assets, each to fitted/NAME
  im3d fit --video turntable.mp4 --num-views 24 --elevation-deg 15 --out fitted

A directory of views has images and nerfstudio's transforms.json. The foreground of a frame is its mask_path,
or the alpha of its image, or what IS-Net finds, or else what differs from a plain background.
docs/reconstruction.md says more.
"""
LOG_EVERY_STEPS = 200
UP_AXES = {
    **{"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)},
    **{"-x": (-1.0, 0.0, 0.0), "-y": (0.0, -1.0, 0.0), "-z": (0.0, 0.0, -1.0)},
}


class Job(NamedTuple):
    """An asset, where its views come from and where its files go."""

    source: Path
    out: Path
    asset: Asset


def main(argv: list[str]) -> None:
    flags = parse(argv)
    if flags.check:
        check_all(flags.views)
        return
    try:
        fit_all(flags)
    except Exception as error:
        if not recovery.is_out_of_memory(error):
            raise
        advice = "fewer or smaller views (--size)" + (
            ", or a smaller --at-once" if len(flags.views) > 1 else ""
        )
        raise UserError(f"out of memory; give {advice}") from error


class Failures:
    """The errors of several assets, each printed when it happens and named again in the end."""

    def __init__(self, sources: list[Path]):
        self._sources = sources
        self._errors: dict[Path, UserError] = {}

    @contextlib.contextmanager
    def of(self, source: Path) -> Iterator[None]:
        """Catches a UserError of what is done for `source`."""
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


def check_all(sources: list[Path]) -> None:
    """Prints a line for each frame of each directory. Raises UserError if there are errors."""
    failures = Failures(sources)
    for source in sources:
        with failures.of(source):
            checked = check(source)
            print("\n".join(map(str, checked.frames + checked.general)))
            if checked.has_errors:
                raise UserError(
                    f"{source}: {checked.summary}; mend the others or take them out of transforms.json"
                )
            print(f"{source}: {checked.summary}")
    failures.end()


def fit_all(flags: argparse.Namespace) -> None:
    """Fits the assets, at most `--at-once` of them together."""
    sources = flags.views or [flags.video]
    outs, failures = outputs(sources, flags.out), Failures(sources)
    todo = [source for source in sources if not (flags.resume and (outs[source] / REPORT).exists())]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {len(sources)} are there already")
    for first in range(0, len(todo), flags.at_once):
        groups: dict[tuple[int, int], list[Job]] = {}  # by the size of views, one of which fits together
        for source in todo[first : first + flags.at_once]:
            with failures.of(source):
                job = load_job(flags, source, outs[source])
                groups.setdefault(job.asset.size_px, []).append(job)
        for jobs in groups.values():
            fit_together(flags, jobs, failures)
    failures.end()


def outputs(sources: list[Path], out: Path) -> dict[Path, Path]:
    """Where each asset goes: `out` itself, or if there are several, its part of the path below `out`."""
    if len(sources) == 1:
        return {sources[0]: out}
    whole = [source.resolve() for source in sources]
    if len(set(whole)) < len(whole):
        raise UserError("--views names a directory twice")
    common = os.path.commonpath([path.parent for path in whole])
    return {source: out / path.relative_to(common) for source, path in zip(sources, whole, strict=True)}


def load_job(flags: argparse.Namespace, source: Path, out: Path) -> Job:
    """Reads the views of an asset, prints notes about them, and gets their fit ready."""
    started = time.perf_counter()
    train, held_out, notes = read_views(flags, source)
    for note in notes:
        print(f"note: {source}: {note}", flush=True)
    make_directory(out)
    settings = FitSettings(
        num_steps=flags.steps,
        seed=flags.seed,
        engine=choice(Engine, flags.engine, "--engine"),
        representation=flags.representation,
        lpips_net=flags.lpips_net,
        lpips_weights=flags.lpips_weights,
    )
    up = np.array(UP_AXES[flags.up]) if flags.up else None
    asset = prepare(train, settings, held_out=held_out, normalize=flags.normalize, up=up)
    for note in asset.notes:
        print(f"note: {source}: {note}", flush=True)
    asset.notes[:0] = notes
    asset.seconds["load"] = time.perf_counter() - started
    return Job(source, out, asset)


def read_views(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None, list[str]]:
    """The training views, the held-out views, and what to note about both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, held_out = _split(flags, source)
    notes = [note for views in (train, held_out) if views is not None for note in views.notes]
    notes += [str(warning.message) for warning in caught if warning.category is UserWarning]
    return train, held_out, list(dict.fromkeys(notes))


def _split(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None]:
    edge_px = {} if flags.video is None else {"edge_px": VIDEO_EDGE_PX}
    segment = functools.partial(background_masks, **edge_px)
    if flags.isnet_weights is not None:
        segment = functools.partial(isnet_masks, weights_path=flags.isnet_weights)
    read = functools.partial(
        load_views, segment=segment, height=flags.size, allow_missing=flags.allow_missing
    )
    if flags.video is None:
        views = read(source)
    else:
        views = load_video(
            flags.video,
            segment,
            num_views=flags.num_views,
            elevation_rad=float(np.radians(flags.elevation_deg)),
            fov_deg=flags.fov_deg,
            clockwise=flags.clockwise,
            height=flags.size,
        )
    if flags.held_out is None:
        return views, None
    if flags.held_out.isdecimal():
        return views.hold_out(int(flags.held_out))
    return views, read(Path(flags.held_out))


def fit_together(flags: argparse.Namespace, jobs: list[Job], failures: Failures) -> None:
    """Fits assets whose views have one size, writes their files and prints how good they are."""
    started = time.perf_counter()
    given_up = _run_with_progress([job.asset.fit for job in jobs], flags.steps)
    fit_s = time.perf_counter() - started
    for job, error in zip(jobs, given_up, strict=True):
        with failures.of(job.source):
            if error is not None:
                raise error
            job.asset.seconds["fit"] = fit_s
            path, report = write(job.asset, job.out, len(jobs))
            for name in ("training", "held_out"):
                scores = report.get(name, {})
                if scores:
                    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
            judged = report["quality"]
            print("; ".join([f"quality: {judged['verdict']}", *judged["reasons"], *judged["hints"]]))
            print(f"{path} after {report['num_steps']} steps", flush=True)


def _run_with_progress(fits: list[Fit], num_steps: int) -> list[UserError | None]:
    """A bar with rate and ETA on a terminal, plain lines in a log. Returns why each fit was given up."""
    with tqdm(total=num_steps * len(fits), desc="fit", unit="step", disable=None) as bar:

        def on_step(fit: Fit, losses: dict[str, Tensor]) -> None:
            bar.update(sum(each.step for each in fits) - bar.n)  # steps come again after a setback
            if bar.disable and fit is fits[-1] and fit.step % LOG_EVERY_STEPS == 0:
                print(
                    f"step {fit.step}: loss {losses['loss']:.4f}, {fit.num_gaussians} Gaussians", flush=True
                )

        return recovery.run_together(fits, num_steps, on_step)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError for those that do not go together."""
    parser = CommandParser("fit", "Fits 3D Gaussians to views of an object whose cameras are known.")
    parser.epilog = EXAMPLES
    default = " (default %(default)s)"

    # fmt: off
    add = parser.add_argument_group("views").add_argument
    add("--views", type=Path, nargs="+", default=[], metavar="DIR",
        help="a directory with images and a transforms.json; each further one is another asset")
    add("--video", type=Path, metavar="FILE", help="a video of one turn of the object, in place of --views")
    add("--check", action="store_true", help="say what is wrong with each frame of --views, and fit nothing")
    add("--allow-missing", action="store_true", help="leave out frames whose image does not exist")
    add("--size", type=int, metavar="PX", help="reduce the views to this height")
    add("--held-out", metavar="DIR|N",
        help="views to test with: another directory, or every N-th of the views, which is then not fitted")
    add("--isnet-weights", type=Path, metavar="FILE", help="find foreground masks with IS-Net")

    add = parser.add_argument_group("video").add_argument
    add("--num-views", type=int, default=16, metavar="K", help="how many frames to fit" + default)
    add("--elevation-deg", type=float, metavar="E", help="how high the camera is above the equator")
    add("--fov-deg", type=float, default=33.8, help="vertical field of view" + default)
    add("--clockwise", action="store_true", help="seen from above, the camera goes clockwise")

    add = parser.add_argument_group("fit").add_argument
    add("--steps", type=int, default=FitSettings.num_steps, help="optimisation steps" + default)
    add("--seed", type=int, default=0, help="of all random numbers" + default)
    add("--at-once", type=int, default=4, metavar="N", help="how many assets are fitted together" + default)
    add("--representation", default=FitSettings.representation, choices=tuple(map(str, Representation)),
        help="Gaussians or a radiance field" + default)
    add("--engine", default=str(Engine.AUTO), help="rasteriser: auto, gsplat or cpu" + default)
    add("--lpips-net", default=FitSettings.lpips_net, help="vgg, alex or squeeze" + default)
    add("--lpips-weights", default=FitSettings.lpips_weights, metavar="FILE",
        help="the weights of that network as torchvision names them, or 'random'; by default those in "
        "torchvision's cache, and where it has none, a loss without LPIPS")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="where asset.ply, turntable.mp4, report.json ... are written")
    add("--resume", action="store_true", help="leave out assets that have a report.json")
    add("--normalize", action="store_true", help="find the object by its masks, and write it at unit size")
    add("--up", choices=UP_AXES, help="axis of the turntable; by default the one that is up in the pictures")
    # fmt: on
    flags = parser.parse_args(argv)
    _refuse_conflicts(flags)
    return flags


def _refuse_conflicts(flags: argparse.Namespace) -> None:
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
