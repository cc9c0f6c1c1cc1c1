"""The outputs of a method: its turntables, by what they were made from.

Each of these is read, also when a directory has several:

    assets/000000/turntable.mp4, report.json     what `im3d batch` writes
    turntable.mp4, report.json                   what `im3d generate` writes, also in folders one level below
    NAME.mp4                                     what any method has rendered, with NAME.txt as its prompt

Turntables of several methods belong together if their prompts are equal but for case and punctuation, where
an asset's prompt is that of its report.json, and any other's is its name. So `a_red_mug.mp4` belongs to the
asset of "A red mug".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_text

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TURNTABLES = ("turntable.mp4", "turntable.gif")
LONGEST_PROMPT = 1000
NUM_NAMED, LONGEST_NAMED = 5, 60


@dataclass(frozen=True)
class Turntable:
    """A video of a method. text: its prompt; picture: that it was made from, if there is one."""

    text: str
    video: Path
    picture: Path | None = None
    seed: int = 0


@dataclass
class Source:
    """A method. turntables: by their keys; left_out: sentences on what of its directory is not used."""

    name: str
    turntables: dict[str, Turntable] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def key_of(text: str) -> str:
    """What prompts have in common that differ in case, spaces and punctuation alone."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text


def read(name: str, directory: Path) -> Source:
    """Raises UserError if there is no turntable."""
    if not directory.is_dir():
        raise UserError(f"{name}: {directory} is no directory; give NAME=DIR with the outputs of a method")
    source, doubles, failed = Source(name), [], []
    for found in _found(directory):
        if isinstance(found, str):
            failed.append(found)
            continue
        key = key_of(found.text)
        other = source.turntables.get(key)
        if other is None or (found.seed, str(found.video)) < (other.seed, str(other.video)):
            source.turntables[key] = found
        if other is not None:
            doubles.append(found.text)
    if failed:
        source.left_out.append(f"{name} has {named(failed, 'folder')} without a whole asset")
    if doubles:
        source.left_out.append(
            f"{name} has {named(doubles, 'further turntable')} of prompts that it has already; "
            "the one of the least seed is used"
        )
    if not source.turntables:
        raise UserError(f"{name}: {directory} has neither assets of im3d nor videos such as NAME.mp4")
    return source


def named(names: Sequence[str], what: str) -> str:
    """Such as "3 prompts (a, b, c)"; of many, the first ones stand in the brackets."""
    short = [name if len(name) <= LONGEST_NAMED else f"{name[:LONGEST_NAMED]}..." for name in names]
    shown = ", ".join(short[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def _found(directory: Path) -> Iterator[Turntable | str]:
    """The turntables below a directory, and the names of folders that should have one."""
    assets = directory / "assets"
    folders = [directory]
    for parent in (directory, assets):
        if parent.is_dir():
            folders += sorted(each for each in parent.iterdir() if each.is_dir() and each.name[0] != ".")
    for folder in folders:
        video = next((folder / each for each in TURNTABLES if (folder / each).is_file()), None)
        report = _report(folder)
        if video is not None:
            yield _of_asset(folder, video, report)
        elif report is not None or (folder / "error.json").is_file():
            yield folder.name
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() in VIDEOS and path.is_file() and path.name not in TURNTABLES:
            beside = path.with_suffix(".txt")
            text = read_text(beside).strip() if beside.is_file() else path.stem.replace("_", " ")
            yield Turntable(_shortened(text or path.stem), path)


def _of_asset(folder: Path, video: Path, report: dict[str, Any] | None) -> Turntable:
    told = report or {}
    image, seed = told.get("image"), told.get("seed")
    given = Path(image) if isinstance(image, str) and image else None
    text = told.get("prompt") or (given.stem if given else "") or folder.resolve().name.replace("_", " ")
    if not isinstance(text, str):
        raise UserError(f"{folder / 'report.json'}: 'prompt' is {quoted(text)}; give text")
    picture = _picture(folder, "input") or (given if given and given.is_file() else None)
    return Turntable(_shortened(text), video, picture, seed if type(seed) is int else 0)


def _report(folder: Path) -> dict[str, Any] | None:
    """The report of an asset; None where there is none. One that cannot be read counts as none."""
    try:
        told = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _shortened(text: str) -> str:
    """As a single line that UTF-8 can hold."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST_PROMPT else line[:LONGEST_PROMPT] + "..."


def _picture(folder: Path, stem: str) -> Path | None:
    return next((path for each in PICTURES if (path := folder / f"{stem}{each}").is_file()), None)


def references(directory: Path) -> dict[str, Path]:
    """The pictures in a directory, by the keys of their names. Raises UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"--pictures {directory} is no directory; give one with NAME.png")
    found = {
        key_of(path.stem): path
        for path in sorted(directory.iterdir(), reverse=True)
        if path.suffix.lower() in PICTURES
    }
    if not found:
        raise UserError(f"--pictures {directory} has no pictures; give a directory with NAME.png")
    return found
