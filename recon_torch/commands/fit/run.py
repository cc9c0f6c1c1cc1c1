"""What `im3d fit` does: it reads views, fits assets together, and prints how they turn out."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from recon_torch import outputs
from recon_torch.commands.fit import origins
from recon_torch.errors import UserError, choice
from recon_torch.fit import camera_moves, recovery
from recon_torch.fit.asset import FITTED, REPORT, Asset, prepare, run, write
from recon_torch.fit.optimization import Fit
from recon_torch.formats.files import load as load_gaussians
from recon_torch.page.live import EVERY_STEPS, LivePage
from recon_torch.scene.splats import Splats
from recon_torch.settings import (
    SMALLEST_SIDE_PX,
    UP_AXES,
    Engine,
    ExportSettings,
    FitSettings,
    LpipsNet,
)
from recon_torch.views.check import CHECKED_PX, Checked, check
from recon_torch.views.directory import Views, load_split, load_views
from recon_torch.views.masks import VIDEO_EDGE_PX, Segment, by_backdrop, by_isnet, check_isnet_file
from recon_torch.views.transforms import TRANSFORMS, parts_of, read_part
from recon_torch.views.video import load_video

LOG_EVERY_STEPS = 200


class Job(NamedTuple):
    """An asset, where its views come from and where its files go. origin: see `origins`."""

    source: Path
    out: Path
    asset: Asset
    origin: dict[str, Any]


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


def check_all(flags: argparse.Namespace) -> None:
    """Prints a line for each frame of each directory. Raises UserError if there are errors."""
    failures, segment = Failures(flags.views), _segment(flags)
    for source in flags.views:
        with failures.of(source):
            checked = check(source, flags.isnet_weights)
            if not checked.has_errors:
                _check_cameras(source, checked, segment)
            print("\n".join(map(str, checked.frames + checked.general)))
            if checked.has_errors:
                raise UserError(
                    f"{source}: {checked.summary}; mend the others or take them out of transforms.json"
                )
            print(f"{source}: {checked.summary}")
    failures.end()


def _check_cameras(source: Path, checked: Checked, segment: Segment) -> None:
    """Adds to what was found which cameras are off by some degrees, by a short fit to small views."""
    frames, _ = read_part(parts_of(source).train)
    height = min(CHECKED_PX, *(frame.height for frame in frames))
    with warnings.catch_warnings():  # what they say of masks is known by then
        warnings.simplefilter("ignore", UserWarning)
        views = load_views(source, segment, height=height)
    if len(views) <= camera_moves.FEWEST_VIEWS or min(height, views.cameras.width) < SMALLEST_SIDE_PX:
        return
    steps = camera_moves.CLEAN_STEPS
    small = FitSettings(num_steps=steps, w_lpips=0.0, lpips_net=LpipsNet.ALEX, lpips_weights="random")
    asset = prepare(views, small)
    recovery.run(asset.fit, steps)
    judged = camera_moves.judge(asset.fit)
    # Remarks, as pictures that contradict one another can look as if a camera were wrong.
    for move in judged.moves:
        said = f"{camera_moves.sentence(move)}; --refine-cameras moves it so"
        checked.frames[move.view].remarks.append(said)
    for view in judged.stray:
        checked.frames[view].remarks.append(camera_moves.STRAY)


def fit_all(flags: argparse.Namespace) -> None:
    """Fits the assets, at most `--at-once` of them together. Raises UserError if any of them fails."""
    try:
        _fit_all(flags)
    except Exception as error:
        if not recovery.is_out_of_memory(error):
            raise
        advice = "fewer or smaller views (--size)"
        if len(flags.views) > 1:
            advice += ", or a smaller --at-once"
        raise UserError(f"out of memory; give {advice}") from error


def _fit_all(flags: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        page = None
        if flags.viewer:
            source = flags.video or flags.views[0]
            page = stack.enter_context(LivePage(flags.viewer_host, flags.viewer_port, f"im3d fit {source}"))
            print(f"{page.address} shows the fit", flush=True)
        _fit_in_groups(flags, page)
        if flags.viewer_stay:
            print(f"{page.address} stays until Ctrl-C" if page else "", flush=True)
            threading.Event().wait()


def _fit_in_groups(flags: argparse.Namespace, page: LivePage | None) -> None:
    sources = flags.views or [flags.video]
    _segment(flags)  # refuses a file that is missing, also where no picture needs it
    outs, failures = directories(sources, flags.out), Failures(sources)
    todo = [source for source in sources if not (flags.resume and is_made(flags, source, outs[source]))]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {len(sources)} are there already")
    for source in todo:
        outputs.check(outs[source], FITTED, origins.files(flags, source), root=flags.out)
    for first in range(0, len(todo), flags.at_once):
        groups: dict[tuple, list[Job]] = {}  # by what those that are fitted together have in common
        with contextlib.ExitStack() as held:
            for source in todo[first : first + flags.at_once]:
                with failures.of(source):
                    held.enter_context(outputs.opened(outs[source], FITTED))
                    job = load_job(flags, source, outs[source])
                    groups.setdefault(job.asset.kind, []).append(job)
            for jobs in groups.values():
                fit_together(flags, jobs, failures, page)
    failures.end()


def is_made(flags: argparse.Namespace, source: Path, out: Path) -> bool:
    """Whether a whole asset is there that was fitted to these views with these settings; prints why not."""
    try:
        made_from = json.loads((out / REPORT).read_text())["origin"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError):
        made_from = {}
    different = origins.difference(made_from, origins.origin(flags, source))
    if different:
        print(f"note: {source}: is fitted again, as what is there was made from other {', '.join(different)}")
    return not different


def directories(sources: list[Path], out: Path) -> dict[Path, Path]:
    """Where each asset goes: `out` itself, or if there are several, its part of the path below `out`."""
    if len(sources) == 1:
        return {sources[0]: out}
    whole = [source.resolve() for source in sources]
    whole = [
        path.parent if path.name == TRANSFORMS else path.with_suffix("") if path.is_file() else path
        for path in whole
    ]
    if len(set(whole)) < len(whole):
        raise UserError("--views names a directory twice")
    common = os.path.commonpath([path.parent for path in whole])
    return {source: out / path.relative_to(common) for source, path in zip(sources, whole, strict=True)}


def load_job(flags: argparse.Namespace, source: Path, out: Path) -> Job:
    """Reads the views of an asset, prints notes about them, and gets their fit ready."""
    started = time.perf_counter()
    origin = origins.origin(flags, source)  # of the views as they are now
    train, held_out, notes = read_views(flags, source)
    start = None
    if flags.start is not None:
        start, start_notes, _ = load_gaussians(flags.start)
        notes += [f"{flags.start}: {note}" for note in start_notes]
    for note in notes:
        print(f"note: {source}: {note}", flush=True)
    settings = FitSettings(
        num_steps=flags.steps,
        seed=flags.seed,
        engine=choice(Engine, flags.engine, "--engine"),
        representation=flags.representation,
        lpips_net=flags.lpips_net,
        lpips_weights=flags.lpips_weights,
    )
    up = np.array(UP_AXES[flags.up]) if flags.up else None
    exported = ExportSettings(axes=flags.axes, formats=tuple(flags.formats), page=flags.page, mesh=flags.mesh)
    asset = prepare(
        train,
        settings,
        held_out=held_out,
        normalize=flags.normalize,
        up=up,
        exported=exported,
        start=start,
    )
    for note in asset.notes:
        print(f"note: {source}: {note}", flush=True)
    asset.notes[:0] = notes
    asset.seconds["load"] = time.perf_counter() - started
    return Job(source, out, asset, origin)


def read_views(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None, list[str]]:
    """The training views, the held-out views, and what to note about both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train, held_out = _split(flags, source)
    notes = [*train.notes]
    if held_out is not None:
        notes += [f"held-out views: {note}" for note in held_out.notes if note not in train.notes]
    notes += [str(warning.message) for warning in caught if warning.category is UserWarning]
    return train, held_out, list(dict.fromkeys(notes))


def _segment(flags: argparse.Namespace) -> Segment:
    """What finds the foreground of pictures that have no mask. Raises UserError if its file is missing."""
    if flags.isnet_weights is not None:
        check_isnet_file(flags.isnet_weights)
        return functools.partial(by_isnet, weights_path=flags.isnet_weights)
    return by_backdrop if flags.video is None else functools.partial(by_backdrop, edge_px=VIDEO_EDGE_PX)


def _split(flags: argparse.Namespace, source: Path) -> tuple[Views, Views | None]:
    segment = _segment(flags)
    how = {"height": flags.size, "allow_missing": flags.allow_missing}
    if flags.video is None:
        views, held_out = load_split(source, segment, **how)
    else:
        views, held_out = _load_video(flags, segment), None
    if flags.held_out is None:
        return views, held_out
    if flags.held_out.isdecimal():
        train, held_out = views.hold_out(int(flags.held_out))
        return train, held_out
    if parts_of(flags.held_out).test is not None:
        raise UserError(f"--held-out {flags.held_out} is split itself; give the path of one of its files")
    return views, load_views(flags.held_out, segment, **how)


def _load_video(flags: argparse.Namespace, segment: Segment) -> Views:
    return load_video(
        flags.video,
        segment,
        num_views=flags.num_views,
        elevation_rad=float(np.radians(flags.elevation_deg)),
        fov_deg=flags.fov_deg,
        clockwise=flags.clockwise,
        height=flags.size,
    )


def fit_together(
    flags: argparse.Namespace, jobs: list[Job], failures: Failures, page: LivePage | None = None
) -> None:
    """Fits assets whose views have one size, writes their files and prints how good they are."""
    started = time.perf_counter()
    given_up = _run_with_progress([job.asset for job in jobs], flags, page)
    fit_s = time.perf_counter() - started
    for job, error in zip(jobs, given_up, strict=True):
        with failures.of(job.source):
            if error is not None:
                raise error
            job.asset.seconds["fit"] = fit_s
            for note in job.asset.camera_notes:
                print(f"note: {job.source}: {note}", flush=True)
            known = len(job.asset.notes)
            path, report = write(job.asset, job.out, len(jobs), job.origin)
            for note in job.asset.notes[known:]:
                print(f"note: {job.source}: {note}", flush=True)
            for name in ("training", "held_out"):
                scores = report.get(name, {})
                if scores:
                    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
            if "mesh" in report:
                print(f"mesh: {report['mesh'].get('error') or ', '.join(report['mesh']['files'])}")
            judged = report["quality"]
            print("; ".join([f"quality: {judged['verdict']}", *judged["reasons"], *judged["hints"]]))
            print(f"{path} after {report['num_steps']} steps", flush=True)


def _run_with_progress(
    assets: list[Asset], flags: argparse.Namespace, page: LivePage | None
) -> list[UserError | None]:
    """A bar with rate and ETA on a terminal, plain lines in a log. Returns why each fit was given up."""
    watch = _watcher(assets[0], page) if page else None
    with tqdm(total=flags.steps * len(assets), desc="fit", unit="step", disable=None) as bar:

        def on_step(fit: Fit, losses: dict[str, Tensor]) -> None:
            # Steps come again after a setback, and with cameras that were moved.
            bar.update(sum(asset.fit.step for asset in assets) - bar.n)
            if watch is not None:
                watch(fit, losses)
            if bar.disable and fit is assets[-1].fit and fit.step % LOG_EVERY_STEPS == 0:
                count = f", {fit.num_gaussians} Gaussians" if fit.num_gaussians else ""
                print(f"step {fit.step}: loss {losses['loss']:.4f}{count}", flush=True)

        return run(assets, on_step, flags.refine_cameras)


def _watcher(asset: Asset, page: LivePage) -> Callable[[Fit, dict[str, Tensor]], None]:
    """Shows the cameras of an asset's fit, and returns what shows its steps."""
    shown = asset.fit
    page.show_cameras(shown.cameras, asset.train.images, asset.up)

    def watch(fit: Fit, losses: dict[str, Tensor]) -> None:
        nonlocal shown
        if fit is not shown:  # it has begun again with other cameras
            shown = fit
            page.show_cameras(fit.cameras, asset.train.images, asset.up)
        last = fit.settings.num_steps
        if (fit.step % EVERY_STEPS == 0 or fit.step in (1, last)) and isinstance(fit.scene, Splats):
            text = f"step {fit.step} of {last}, loss {losses['loss']:.4f}, {fit.num_gaussians} Gaussians"
            page.show(fit.scene.gaussians, text)

    return watch
