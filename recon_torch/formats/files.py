"""Files of Gaussians in any format that is read or written, in the world of this project.

Formats beside the .ply of ours do not say which of their axes is up. They are written for viewers, which take
-Y as up in files of splats, and are taken so; .glb and USD say that +Y is up.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from recon_torch.asset_files import ASSET
from recon_torch.errors import UserError
from recon_torch.files import check_regular, replacing
from recon_torch.formats import conversion, glb, kinds, ply, usd
from recon_torch.formats.kinds import Kind
from recon_torch.formats.ply import Loaded
from recon_torch.raster.gaussians import Gaussians, turned
from recon_torch.settings import FileAxes, Format
from recon_torch.text_files import check_not_stand_in, read_json
from recon_torch.views import axes
from recon_torch.views.axes import Axes
from recon_torch.views.transforms import TRANSFORMS

ASSUMED = (
    "taken as viewers show it, with its -Y up; `im3d render` and `im3d export` take its axes as they are "
    "with --axes world"
)

STATED_BESIDE = (
    "another program wrote it, as its header does not say which way its axes point: they are taken as "
    f"{TRANSFORMS} says"
)


def save(gaussians: Gaussians, path: str | os.PathLike, kind: Format, upright: Axes = axes.UPRIGHT) -> None:
    """Writes Gaussians in a format beside .ply.

    upright: see `views.axes.chosen`.

    Raises UserError where a library is missing, or the file cannot be written.
    """
    with replacing(path) as temporary:
        _write(gaussians, temporary, kind, upright)


def _write(gaussians: Gaussians, path: Path, kind: Format, upright: Axes) -> None:
    if kind in conversion.FORMATS:
        conversion.save(gaussians, path, kind, upright)
        return
    gaussians = turned(gaussians, axes.matrix(axes.y_up(upright)))
    if kind == Format.GLB:
        path.write_bytes(glb.glb_bytes(gaussians))
    else:
        usd.save(gaussians, path, kind)


def load(path: str | os.PathLike, choice: FileAxes | None = None) -> Loaded:
    """Reads Gaussians from any format, into a world with +Z up, or that of the file's cameras.

    choice: whether a file that does not say which of its axes is up is upright in viewers, or in the axes of
        the world already. By default a plain .ply is the latter, unless it is an asset.ply and the
        transforms.json beside it has its axes; any other is the former. Notes say so.

    Raises UserError for what is missing, damaged, or in a format that is not read.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        return _turned_back(ply.load_ply(path), path, choice)
    if kind.format is None:
        raise UserError(f"{path} is {kind.name}, which is not read; {kinds.ADVICE}")
    (gaussians, notes, _), file_axes = _read(path, kind.format)
    if kind.format in conversion.FORMATS and choice is None:
        notes = [*notes, ASSUMED]
    if choice == FileAxes.WORLD:
        return Loaded(gaussians, notes)
    return Loaded(turned(gaussians, axes.matrix(file_axes).T), notes, axes.UPRIGHT)


def _turned_back(loaded: Loaded, path: Path, choice: FileAxes | None) -> Loaded:
    """A .ply in the world of its cameras, also where its header does not say how it was turned."""
    if loaded.upright is not None or choice == FileAxes.WORLD:
        return loaded
    if choice == FileAxes.UPRIGHT:
        file_axes, told = axes.UPRIGHT, []
    else:
        beside = stated_axes(path.with_name(TRANSFORMS)) if path.name == ASSET else None
        file_axes, told = beside or axes.WORLD, [STATED_BESIDE]
    if file_axes == axes.WORLD:
        return loaded
    gaussians = turned(loaded.gaussians, axes.matrix(file_axes).T)
    return Loaded(gaussians, [*loaded.notes, *told], file_axes)


def stated_axes(transforms: Path) -> Axes | None:
    """The axes that a transforms.json states of the asset.ply beside it; None where it states none."""
    with contextlib.suppress(UserError):  # who reads its cameras says what is wrong with it
        content = read_json(transforms) if transforms.is_file() else None
        stated = content.get(axes.ENTRY) if isinstance(content, dict) else None
        return axes.parse(stated) if isinstance(stated, str) else None
    return None


def load_back(path: Path, kind: Format, upright: Axes) -> Gaussians:
    """What `save` has written with the same arguments, in the world that it came from."""
    (gaussians, _, _), _ = _read(path, kind)
    file_axes = upright if kind in conversion.FORMATS else axes.y_up(upright)
    return turned(gaussians, axes.matrix(file_axes).T)


def _read(path: Path, kind: Format) -> tuple[Loaded, Axes]:
    """(what a file holds in its own axes, what these are in a world with +Z up)."""
    try:
        if kind in conversion.FORMATS:
            return conversion.load(path, kind), axes.UPRIGHT
        if kind == Format.GLB:
            return glb.load(path), axes.y_up(axes.UPRIGHT)
        loaded, is_z_up = usd.load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return loaded, axes.WORLD if is_z_up else axes.y_up(axes.UPRIGHT)


def kind_of(path: Path) -> Kind | None:
    """What a file is that is there; None for what may be a .ply. Raises UserError if it cannot be read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(ply.MAX_PLY_HEADER_BYTES)
        check_not_stand_in(path, head)
        return kinds.kind_of(path, head)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
