"""Rows of what `im3d generate` and `im3d batch` write: renders, and the views that they were fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax.evaluate.outputs import patterns
from im3d_jax.evaluate.outputs.layouts import Layout, Shows
from im3d_jax.study.sources import PICTURES
from recon_torch.errors import UserError
from recon_torch.text_files import read_json

REPORT, ERROR = "report.json", "error.json"
RENDERS, VIEWS = "images", "views_*"
FIRST = "views_0/images/000.png"
"""View 0 of the first round: what the backbone has drawn of a prompt, where it was given no picture."""


class AssetFiles(NamedTuple):
    """An asset on a disk. pictures: of the renders and of the views; problem: why it is none, or ""."""

    name: str
    prompt: str = ""
    pictures: dict[Shows, tuple[Path, ...]] = {}  # noqa: RUF012 - never written to
    picture: Path | None = None
    seed: int = 0
    config_digest: str = ""
    problem: str = ""


def folders(root: Path) -> list[Path]:
    """The folders that hold an asset or should: the root, those in it, and those in its folder assets."""
    every = [root]
    for parent in (root, root / "assets"):
        if parent.is_dir():
            inside = [each for each in parent.iterdir() if each.is_dir() and each.name[0] != "."]
            every += sorted(inside, key=lambda path: patterns.natural(path.name))
    return [each for each in every if (each / REPORT).is_file() or (each / ERROR).is_file()]


def is_there(root: Path) -> bool:
    """Whether a directory is of im3d. `im3d fit` writes a report as well, which has no config."""
    return any("config_digest" in (_report(folder) or {}) for folder in folders(root))


def read(root: Path) -> Iterator[AssetFiles]:
    """The assets below a directory; of one prompt that of the least seed comes first."""
    yield from sorted((_read(folder) for folder in folders(root)), key=lambda asset: asset.seed)


def layout_of(layout: Layout, shows: Shows) -> Layout:
    """The layout of one of the two things that assets show."""
    return dataclasses.replace(layout, shows=shows)


def _read(folder: Path) -> AssetFiles:
    name, told = folder.resolve().name.encode("utf-8", "replace").decode(), _report(folder)
    if told is None:
        return AssetFiles(name, problem="no report.json that can be read")
    if (folder / ERROR).is_file():
        return AssetFiles(name, problem=ERROR)
    image, seed, prompt = told.get("image"), told.get("seed"), told.get("prompt")
    rounds = [each for each in folder.glob(VIEWS) if (each / RENDERS).is_dir()]
    last = max(rounds, key=lambda path: patterns.natural(path.name), default=folder / "views")
    drawn = next((path for each in PICTURES if (path := folder / f"input{each}").is_file()), None)
    given = Path(image) if isinstance(image, str) and image else None
    return AssetFiles(
        name if prompt or given is None else given.stem,
        prompt if isinstance(prompt, str) else "",
        {Shows.RENDERS: _pictures(folder / RENDERS), Shows.VIEWS: _pictures(last / RENDERS)},
        next((path for path in (drawn, given, folder / FIRST) if path and path.is_file()), None),
        seed if type(seed) is int else 0,
        str(told.get("config_digest", "")),
    )


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = folder.glob("*.png") if folder.is_dir() else ()
    return tuple(sorted(found, key=lambda path: patterns.natural(path.name)))


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        told = read_json(folder / REPORT)
    except UserError:
        return None
    return told if isinstance(told, dict) else None
