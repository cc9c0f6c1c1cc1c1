"""What a page shows of an asset, read from the asset's directory or from its file of Gaussians.

Only the Gaussians, or a mesh in their place, must be there. The rest is shown where it is there: cameras and
pictures of the views, the rounds, a mesh, the report. All of it may have been changed by a user, so nothing
of it is trusted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from recon_torch.asset_files import ASSET, MESH_REPORT, REPORT, gaussians_of
from recon_torch.errors import UserError
from recon_torch.formats import files
from recon_torch.formats.framing import UNIT, moved_into, place_of, world_of_report
from recon_torch.formats.ply import ply_bytes
from recon_torch.settings import UP_AXES, FileAxes
from recon_torch.text_files import read_json
from recon_torch.views import axes
from recon_torch.views.images import image_size, opened
from recon_torch.views.transforms import TRANSFORMS, read_cameras
from recon_torch.views.world import World

SHEET, MESH = "views.png", "mesh.glb"
THUMBNAIL_PX = 168
SHEET_GAP_PX = 2  # of `contact_sheet`
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # from cameras that look along +Z to those that look along -Z
FACTS = {  # of the report, by their keys, and what they are called
    "prompt": "prompt",
    "image": "picture",
    "seed": "seed",
    "num_gaussians": "Gaussians",
    "elevation_deg": "elevation in degrees",
    "network_calls": "calls of the network",
    "device": "device",
}
LONGEST_TEXT = 500


class View(NamedTuple):
    """A camera in the axes of the page, and its picture.

    Attributes:
        c2w: camera to world; the camera looks along -Z, and +Y is up in the picture.
        fov_deg: the vertical field of view.
        aspect: width by height.
        picture: the content of a PNG.
    """

    c2w: Float[np.ndarray, "4 4"]
    fov_deg: float
    aspect: float
    picture: bytes


class Rounds(NamedTuple):
    """A contact sheet whose last rows are the views and the renders of each round.

    Attributes:
        sheet: the content of a PNG.
        num_rows: of the sheet.
        labels: what is said of each round.
    """

    sheet: bytes
    num_rows: int
    labels: list[str]


class Mesh(NamedTuple):
    """A mesh, and where it lies in the page.

    Attributes:
        glb: the content of its file, which has the scale and the place of the asset's own world.
        scale, offset: a point p of the file is scale * p + offset in the page.
    """

    glb: bytes
    scale: float
    offset: Float[np.ndarray, "3"]


class Contents(NamedTuple):
    """What a page shows.

    Attributes:
        title: the prompt, or the name of the directory.
        verdict: of the quality gates; "" if there is none.
        facts: names and values of the report.
        notes: sentences: of the report, and on what is not shown.
        ply: the Gaussians at unit size, in the axes of glTF: +Y is up, and the front faces +Z; empty without.
    """

    title: str
    verdict: str
    facts: list[tuple[str, str]]
    notes: list[str]
    ply: bytes
    num_gaussians: int
    mesh: Mesh | None
    views: list[View]
    rounds: Rounds | None


def read(source: Path, name: str = "") -> Contents:
    """Reads an asset.

    Args:
        source: its directory, or a file of Gaussians of any format that is read.
        name: the title where there is no prompt; default: that of the directory.

    Raises:
        UserError: there are neither Gaussians nor a mesh, or they cannot be read.
    """
    is_mesh = source.is_dir() and is_asset(source) and not (source / ASSET).is_file()
    if source.is_dir() and not is_asset(source) and (source / MESH_REPORT).is_file():
        raise UserError(
            f"{source} has a mesh without its asset; `im3d mesh ASSET --out ASSET` writes it beside that, "
            "and `im3d view ASSET` shows both"
        )
    file = source / MESH if is_mesh else gaussians_of(source)
    loaded = None if is_mesh else files.load(file)
    world, up = _place_of_mesh(source) if loaded is None else place_of(file, loaded)
    upright = None if loaded is None else loaded.upright
    if upright is None:
        upright = axes.chosen(FileAxes.UPRIGHT, np.array(UP_AXES[up]))
    page_axes = axes.y_up(upright)
    turn = axes.matrix(page_axes)
    ply, count, told = b"", 0, list[str]()
    if loaded is not None:
        ply = ply_bytes(moved_into(loaded.gaussians, world), page_axes)
        count, told = len(loaded.gaussians.means), list(loaded.notes)
    shown = Contents(file.stem, "", [], told, ply, count, None, [], None)
    if not source.is_dir():
        return shown
    report, notes = _report(source)
    views, more = _views(source, world, turn)
    return shown._replace(
        title=_text(report.get("prompt")) or name or source.resolve().name,
        verdict=_text(_within(report, "quality", "verdict")),
        facts=list(_facts(report)),
        notes=[*told, *notes, *more],
        mesh=_mesh(source, world, turn),
        views=views,
        rounds=_rounds(source, report),
    )


def is_asset(folder: Path) -> bool:
    """Whether a directory has Gaussians, or a mesh in their place."""
    return (folder / ASSET).is_file() or ((folder / MESH).is_file() and (folder / REPORT).is_file())


def _place_of_mesh(folder: Path) -> tuple[World, str]:
    """Where a mesh lies, and which axis is up: what the fit has noted, or the world of `im3d generate`."""
    report, _ = _report(folder)
    return world_of_report(report, 0) or (UNIT, "z")


def _report(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The report, and sentences from it and on it."""
    if not (folder / REPORT).is_file():
        return {}, [f"there is no {REPORT}"]
    try:
        report = read_json(folder / REPORT)
    except UserError as error:
        return {}, [str(error)]
    if not isinstance(report, dict):
        return {}, [f"{REPORT} is no report"]
    quality = report.get("quality")
    said = [report.get("notes"), *(_within(quality, name) for name in ("reasons", "hints"))]
    return report, [_text(each) for sentences in said if isinstance(sentences, list) for each in sentences]


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, name in FACTS.items():
        if (text := _text(report.get(key))) and (key, text) != ("num_gaussians", "0"):
            yield name, text
    seconds = report.get("seconds")
    if isinstance(seconds, dict):
        yield "seconds", ", ".join(f"{_text(name)} {_number(each)}" for name, each in seconds.items())
    for name in ("training", "held_out"):
        if (decibels := _within(report, name, "psnr")) is not None:
            yield f"PSNR of {name.replace('_', '-')} views", f"{_number(decibels)} dB"


def _views(folder: Path, world: World, turn: Float[np.ndarray, "3 3"]) -> tuple[list[View], list[str]]:
    """The views that transforms.json names, as far as they can be read, and what stands against the rest."""
    if not (folder / TRANSFORMS).is_file():
        return [], []
    try:
        rigs, notes = read_cameras(folder)
        names = [str(frame["file_path"]) for frame in read_json(folder / TRANSFORMS)["frames"]]
        # Of a path, the last folder and the name are taken, so that it cannot lead out of the asset.
        pictures = [_thumbnail(folder.joinpath(*Path(name).parts[-2:])) for name in names]
    except (UserError, KeyError, TypeError) as error:
        return [], [f"the views are not shown: {error}"]
    to_page = np.eye(4)
    to_page[:3, :3] = turn
    cameras = [rig[[index]] for rig in map(world.cameras, rigs) for index in range(len(rig))]
    views = []
    for camera, picture in zip(cameras, pictures, strict=True):
        fov_deg = 2 * np.degrees(np.arctan(camera.height / (2 * camera.intrinsics_px[0, 1, 1])))
        c2w = to_page @ np.linalg.inv(camera.w2c[0].astype(np.float64)) @ OPENGL
        views.append(View(c2w, float(fov_deg), camera.width / camera.height, picture))
    return views, notes


def _thumbnail(path: Path) -> bytes:
    """A small PNG over white, made anew: nothing of the file but its pixels gets into the page."""
    with opened(path) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((4 * THUMBNAIL_PX, THUMBNAIL_PX))
    return _png(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG")
    return content.getvalue()


def _rounds(folder: Path, report: dict[str, Any]) -> Rounds | None:
    """The contact sheet, if it has as many rows as the report has rounds."""
    told = report.get("rounds")
    # Above the rounds of a generated asset is the input.
    rounds, above = (told, 1) if isinstance(told, list) and told else ([report.get("training")], 0)
    num_rows = above + 2 * len(rounds)
    try:
        _, height = image_size(folder / SHEET)
        if (height - SHEET_GAP_PX) % num_rows:
            return None
        with opened(folder / SHEET) as image:
            sheet = _png(image)
    except UserError:
        return None
    labels = [
        f"{index}: {_number(_within(each, 'psnr'))} dB to its views" for index, each in enumerate(rounds)
    ]
    return Rounds(sheet, num_rows, labels)


def _mesh(folder: Path, world: World, turn: Float[np.ndarray, "3 3"]) -> Mesh | None:
    path = folder / MESH
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(b"glTF"):
        return None
    return Mesh(content, world.scale, -world.scale * turn @ world.center)


# ---- Values that may be anything ----


def _within(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "?"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST_TEXT]
