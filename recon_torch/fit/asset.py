"""From views to an asset: the fit, what is measured on it, and its files (Sec. 3.3 alone).

asset = prepare(load_views("captured"), FitSettings())
run([asset])
path, report = write(asset, Path("fitted"))
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.fit import camera_moves, export, quality, recovery
from recon_torch.fit.camera_moves import Judged
from recon_torch.fit.optimization import Fit
from recon_torch.formats.framing import moved_into
from recon_torch.mesh import making
from recon_torch.mesh.beside import write_beside as write_mesh
from recon_torch.outputs import Kind
from recon_torch.page.html import write_beside
from recon_torch.raster.gaussians import Gaussians
from recon_torch.scene.splats import Splats
from recon_torch.settings import EXPORTED, MESH_PATHS, ExportSettings, FileAxes, FitSettings, MeshSettings
from recon_torch.text_files import read_json
from recon_torch.views import axes, defects, world
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import Views, write_views
from recon_torch.views.images import contact_sheet, write_image
from recon_torch.views.video import write_video

REPORT = "report.json"
PACKAGES = ("torch", "gsplat", "lpips", "numba", "numpy")  # whose versions a report has
FITTED = Kind(
    "fit",
    (
        r"asset\.(ply|safetensors|" + EXPORTED + ")",
        r"asset\.html",
        *MESH_PATHS,
        r"turntable\.(mp4|gif)",
        r"views\.png",
        r"transforms\.json",
        r"renders/\d{3,}\.png",
        r"report\.json",
    ),
)
"""The files of a fit. Whatever else lies in its directory belongs to somebody else."""

TURNTABLE_FRAMES, TURNTABLE_FPS = 96, 24
SHEET_VIEWS = 8
STARTED_WITHIN = 1.0  # of the origin of a fit's world, whose objects reach 0.5
LEAST_STARTED = 0.5  # the share of the opacity of a start that has to be there


@dataclasses.dataclass
class Asset:
    """One asset on its way from views to files.

    Attributes:
        train: the views that are fitted, in their own world.
        held_out: views of the same world that are not fitted, only compared.
        unit: where the fit's world lies in that of the views.
        normalize: whether files are in the fit's world instead of that of the views.
        up: the axis of the turntable, in either world.
        export: as which files the asset is written.
        start: what the fit begins with, in its own world; None: as its settings say.
        notes: what the report should say about the views.
        judged: what `run` has found out about the cameras. Those that it moved are in `train` and in `fit`.
        seconds: by stage, for the report.
    """

    train: Views
    held_out: Views | None
    unit: world.World
    fit: Fit
    normalize: bool
    up: Float[np.ndarray, "3"]
    export: ExportSettings
    start: Gaussians | None
    notes: list[str]
    judged: Judged = Judged()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> tuple[int, int, float | None]:
        """Width and height of the views, and the background of those without masks.

        Only assets that have these in common can be fitted together.
        """
        background = self.train.background if self.train.masks is None else None
        return self.train.cameras.width, self.train.cameras.height, background

    @property
    def camera_notes(self) -> list[str]:
        """What to say about cameras that `run` has moved, and about views that stand out."""
        return camera_moves.notes(self.judged, self.train.names)


def prepare(
    train: Views,
    settings: FitSettings,
    *,
    held_out: Views | None = None,
    normalize: bool = False,
    up: Float[np.ndarray, "3"] | None = None,
    exported: ExportSettings | None = None,
    start: Gaussians | None = None,
) -> Asset:
    """A fit that has its targets and awaits its first step.

    Args:
        train, held_out: the views to fit, and others that are only compared with the fit.
        normalize: find the object by its masks, and write it at unit size; else by the cameras alone.
        up: the axis of the turntable, and of an upright asset.ply; default: the axis of the world nearest to
            up in the pictures.
        exported: as which files the asset is written.
        start: Gaussians to begin with, in the world of the views; default: as the settings say.

    Raises:
        UserError: views or settings that cannot be fitted, and a start that is elsewhere than the object.
    """
    unit, notes = world.of_views(train.cameras, train.masks, normalize)
    notes = world.sparseness(train.cameras) + notes
    if train.masks is None:
        settings = dataclasses.replace(settings, background=train.background)
    if start is not None:
        start = moved_into(start, unit)
        _check_place(start)
    fit = new_fit(unit.cameras(train.cameras), settings, train, start)
    if train.masks is not None and not any(note.startswith(defects.BEGINNING) for note in train.notes):
        notes += defects.notes(np.concatenate([train.images, train.masks], -1))
    up = world.up_axis(fit.cameras) if up is None else up
    return Asset(train, held_out, unit, fit, normalize, up, exported or ExportSettings(), start, notes)


def run(
    assets: Sequence[Asset],
    on_step: Callable[[Fit, dict[str, Tensor]], None] | None = None,
    refine_cameras: bool = False,
) -> list[UserError | None]:
    """Fits assets that go together, under the guards of `recovery.run_together`.

    Args:
        on_step: see `optimization.run_together`.
        refine_cameras: move cameras that are off by some degrees (`camera_moves`). The fit of an asset that
            has any begins again with the moved ones; other fits are as they are without.

    Returns:
        Why each asset was given up; None for those that were not.
    """
    given_up: dict[int, UserError] = {}

    def advance(which: Iterable[int], until_step: int) -> None:
        left = [index for index in which if index not in given_up]
        errors = recovery.run_together([assets[index].fit for index in left], until_step, on_step)
        given_up.update({index: error for index, error in zip(left, errors, strict=True) if error})

    everything, num_steps = range(len(assets)), assets[0].fit.settings.num_steps
    if refine_cameras:
        judged_at = max(1, round(camera_moves.JUDGED_AT * num_steps))
        advance(everything, judged_at)
        moved = []
        for index in everything:
            try:
                if index not in given_up and _move_cameras(assets[index]):
                    moved.append(index)
            except UserError as error:
                given_up[index] = error
        advance(moved, judged_at)
    advance(everything, num_steps)
    return [given_up.get(index) for index in everything]


def _move_cameras(asset: Asset) -> bool:
    """Whether any camera of a fit under way is wrong; if so, it begins again with such cameras moved."""
    asset.judged = camera_moves.judge(asset.fit)
    if not asset.judged.moves:
        return False
    cameras, views = asset.judged.moved(asset.fit.cameras), [move.view for move in asset.judged.moves]
    w2c = asset.train.cameras.w2c.copy()
    w2c[views] = asset.unit.cameras_back(cameras[views]).w2c
    asset.train = dataclasses.replace(asset.train, cameras=dataclasses.replace(asset.train.cameras, w2c=w2c))
    asset.fit = new_fit(cameras, asset.fit.settings, asset.train, asset.start)
    return True


def new_fit(cameras: Cameras, settings: FitSettings, views: Views, start: Gaussians | None = None) -> Fit:
    """A fit in its own world that has its targets, and begins with `start` if that is given."""
    fit = Fit(cameras, settings)
    unsure = None if views.unsure is None else torch.from_numpy(views.unsure)
    fit.set_targets(*_targets(views), unsure=unsure)
    if start is not None:
        if not isinstance(fit.scene, Splats):
            raise UserError("only a fit of Gaussians can start from Gaussians")
        fit.scene.start_from(start)
    return fit


def _check_place(start: Gaussians) -> None:
    """Raises UserError for Gaussians that lie elsewhere than the object, in the world of a fit."""
    there = start.means.norm(dim=-1) < STARTED_WITHIN
    if float(start.opacities[there].sum()) < LEAST_STARTED * float(start.opacities.sum()):
        raise UserError(
            f"of what --start has, less than {LEAST_STARTED:.0%} is where the cameras look; "
            "is it in the world of the views, and at their scale?"
        )


def _targets(views: Views) -> tuple[Float[torch.Tensor, "K H W 3"], Float[torch.Tensor, "K H W 1"] | None]:
    return torch.from_numpy(views.images), None if views.masks is None else torch.from_numpy(views.masks)


def write(
    asset: Asset, out: Path, num_together: int = 1, origin: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Path, dict[str, Any]]:
    """Measures a fit that has ended, and writes its files and, as the last of them, its report.

    They take the place of those of an earlier fit.

    Args:
        out: the directory, which exists.
        num_together: how many assets were fitted together in the seconds of the fit.
        origin: what the fit was made from, for the report.

    Returns:
        The file of the object itself, and the report.

    Raises:
        UserError: something that is not ours lies where the files are to be, or they cannot be written.
    """
    with outputs.owned(out) as staging:
        path, report = _write(asset, staging, num_together, origin)
        if (staging / making.REPORT).is_file():  # of a scene that is a mesh
            report |= {"mesh": read_json(staging / making.REPORT)}
            write_json(staging / REPORT, report)
        if asset.export.mesh:
            report |= {"mesh": _write_mesh(asset, staging)}
            write_json(staging / REPORT, report)
        if asset.export.page:
            write_beside(staging, out.resolve().name)
        outputs.replace(staging, out, FITTED, REPORT)
    return out / path.name, report


def _write(
    asset: Asset, out: Path, num_together: int, origin: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    started, fit = time.perf_counter(), asset.fit
    agreement = {"training": fit.metrics()}
    if asset.held_out is not None:
        cameras = asset.unit.cameras(asset.held_out.cameras)
        agreement["held_out"] = fit.compare(cameras, *_targets(asset.held_out))
    path = _write_files(asset, out)
    around = world.turntable(fit.cameras, asset.up, quality.QUARTER_TURNS)
    judged = quality.inspect(fit, around, asset.up)
    asset.seconds["export"] = time.perf_counter() - started
    place = {"center": asset.unit.center, "scale": asset.unit.scale, "up": asset.up}
    report = agreement | {
        "origin": dict(origin),
        "seconds": asset.seconds,
        "assets_fitted_together": num_together,
        "num_steps": fit.step,
        "num_gaussians": fit.num_gaussians,
        "seed": fit.settings.seed,
        "versions": _versions(),
        "device": _device_name(fit.device),
        "notes": asset.notes + asset.camera_notes + fit.notes + fit.setbacks,
        "world": place | {"asset_is_normalized": asset.normalize},
        "cameras_moved": _moves(asset),
        "quality": judged,
    }
    write_json(out / REPORT, report)
    return path, report


def _write_files(asset: Asset, out: Path) -> Path:
    """In the views' own world or in the fit's. Returns the path of the object itself."""
    fit, train = asset.fit, asset.train
    file_axes = axes.chosen(asset.export.axes, asset.up)
    place = None if asset.normalize else asset.unit
    path = fit.scene.save(out / "asset.ply", place, file_axes, up=asset.up)
    asset.notes += export.export_beside(path, asset.export.formats, axes.chosen(FileAxes.UPRIGHT, asset.up))
    around = world.turntable(fit.cameras, asset.up, TURNTABLE_FRAMES)
    write_video(out / "turntable.mp4", _rgb(fit, around), TURNTABLE_FPS)

    renders = _rgb(fit, fit.cameras)
    cameras = fit.cameras if asset.normalize else train.cameras
    write_views(out, cameras, renders, "renders", **axes.entry(file_axes))

    shown = np.unique(np.linspace(0, len(train) - 1, SHEET_VIEWS).round().astype(int))
    rows = [train.images[shown], renders[shown]]
    write_image(out / "views.png", contact_sheet(rows, ["views", "renders"]))
    return path


def _write_mesh(asset: Asset, out: Path) -> dict[str, Any]:
    """From the views as they were fitted, in the world of the files. Returns what the report says."""
    cameras = asset.fit.cameras if asset.normalize else asset.train.cameras
    return write_mesh(out, MeshSettings(), dataclasses.replace(asset.train, cameras=cameras, notes=[]))


def _moves(asset: Asset) -> list[dict[str, Any]]:
    """What the report says of each camera that was moved, in the units of the world that files are in."""
    scale = 1.0 if asset.normalize else asset.unit.scale
    return [
        {
            "view": asset.train.names[move.view],
            "degrees": move.degrees,
            "distance": move.distance / scale,
            "psnr_foreground": [move.before_db, move.after_db],
        }
        for move in asset.judged.moves
    ]


def _rgb(fit: Fit, cameras: Cameras) -> Float[np.ndarray, "K H W 3"]:
    parts = [fit.render(cameras[index]).rgb.clamp(0, 1).cpu().numpy() for index in range(len(cameras))]
    return np.concatenate(parts)


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return versions | {"python": platform.python_version()}


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
