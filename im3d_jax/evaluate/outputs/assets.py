"""Rows of what `im3d generate` and `im3d batch` write: renders, and the views that they were fitted to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax.evaluate.outputs import patterns
from im3d_jax.evaluate.outputs.layouts import Layout, Shows
from im3d_jax.evaluate.outputs.names import PICTURES
from recon_torch.errors import UserError
from recon_torch.text_files import read_json

REPORT, ERROR = "report.json", "error.json"
TURNTABLES = ("turntable.mp4", "turntable.gif")
RENDERS, VIEWS = "images", "views_*"
FIRST = "views_0/images/000.png"
"""View 0 of the first round: what the backbone has drawn of a prompt, where it was given no picture."""


class Cost(NamedTuple):
    """What one asset took. network_calls: of the 2D network; both are 0 where they are not known."""

    network_calls: float = 0
    minutes: float = 0


class AssetFiles(NamedTuple):
    """An asset on a disk.

    Attributes:
        pictures: of the renders and of the views.
        picture: what it was made from: `given`, or view 0 of the first round.
        given: by a user, or by a text-to-image pipeline.
        problem: why it is none, or "".
    """

    name: str
    prompt: str = ""
    pictures: dict[Shows, tuple[Path, ...]] = {}  # noqa: RUF012 - never written to
    picture: Path | None = None
    given: Path | None = None
    turntable: Path | None = None
    seed: int = 0
    config_digest: str = ""
    cost: Cost = Cost()
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
    named = Path(image) if isinstance(image, str) and image else None
    given = next((path for path in (drawn, named) if path and path.is_file()), None)
    first = folder / FIRST
    return AssetFiles(
        name if prompt or named is None else named.stem,
        prompt if isinstance(prompt, str) else "",
        {Shows.RENDERS: _pictures(folder / RENDERS), Shows.VIEWS: _pictures(last / RENDERS)},
        given or (first if first.is_file() else None),
        given,
        next((path for each in TURNTABLES if (path := folder / each).is_file()), None),
        seed if type(seed) is int else 0,
        str(told.get("config_digest", "")),
        _cost(told),
    )


def _cost(told: dict[str, Any]) -> Cost:
    seconds, calls = told.get("seconds"), told.get("network_calls")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    return Cost(
        calls if type(calls) is int and calls > 0 else 0,
        total / 60 if isinstance(total, (int, float)) and 0 < total < math.inf else 0,
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
