"""Files of prompts for `im3d batch` and `im3d embed`: .txt, .json or .jsonl.

    a red mushroom with a beige stem                               .txt: a prompt on each line
    {"prompt": "a blue car", "image": "car.png", "seed": 3}        .jsonl: an object or a string on each line
    ["a green duck", {"image": "duck.png", "elevation_deg": 20}]   .json: a list of them

An image's path is relative to the file. Blank lines are skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recon_torch.errors import UserError, quoted
from recon_torch.ranges import MAX_SEED
from recon_torch.text_files import parse_json, read_lines, read_text

BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Entry(NamedTuple):
    """One prompt of a file. Either the prompt or the image (a path) may be empty, but not both.

    seed and elevation_deg are None where the file does not give them.
    """

    prompt: str = ""
    image: str = ""
    seed: int | None = None
    elevation_deg: float | None = None


def read(path: Path, find_images: bool = True) -> list[Entry]:
    """The entries of a file. Raises UserError, naming file and line, for the first that is wrong.

    find_images: an image that does not exist is wrong.
    """
    readers = {".txt": _prompts, ".json": _items, ".jsonl": _objects}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompts {path}: its name must end in {', '.join(readers)}")
    entries = [_entry(value, path, line, find_images) for line, value in reader(path)]
    if not entries:
        raise UserError(f"prompts {path}: the file is empty; write a prompt on each line")
    return entries


def _prompts(path: Path) -> Iterator[tuple[int, Any]]:
    return read_lines(path)


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        yield number, parse_json(line, path, number)


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(path)
    items = parse_json(text, path)
    if not isinstance(items, list):
        raise _wrong(path, 1, "is no list; write [...] around the prompts, or name the file .jsonl")
    # The items are parsed a second time, one by one, because only this tells on which line each begins.
    position, line, decoder = text.index("[") + 1, 1 + text[: text.index("[")].count("\n"), json.JSONDecoder()
    for item in items:
        start = next(BETWEEN_ITEMS.finditer(text, position)).end()
        line += text.count("\n", position, start)
        yield line, item
        _, position = decoder.raw_decode(text, start)
        line += text.count("\n", start, position)


def _entry(value: Any, path: Path, line: int, find_images: bool) -> Entry:
    """The entry of a string or an object; its image's path is made relative to the working directory."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise _wrong(path, line, "is neither a prompt nor an object")
    if unknown := sorted(value.keys() - set(Entry._fields)):
        raise _wrong(
            path, line, f"has an unknown key {quoted(unknown[0])}; there is {', '.join(Entry._fields)}"
        )
    entry = Entry(**{name: each for name, each in value.items() if each is not None})
    if problem := _problem(entry):
        raise _wrong(path, line, problem)
    if entry.image:
        entry = entry._replace(image=str(path.parent / entry.image))
        if find_images and not os.path.isfile(entry.image):
            raise _wrong(path, line, f"no image at {entry.image[-200:]}; the path is relative to this file")
    return entry


def _problem(entry: Entry) -> str:
    """Says what is wrong with an entry; "" if nothing is."""
    for name in ("prompt", "image"):
        if not isinstance(getattr(entry, name), str):
            return f"{name!r} is no string"
    if not entry.prompt.strip() and not entry.image:
        return "has neither a prompt nor an image"
    if "\0" in entry.prompt + entry.image:
        return "has a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in entry.prompt + entry.image):
        return "has half of a character (a lone surrogate)"
    seed, elevation_deg = entry.seed, entry.elevation_deg
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        return f"'seed' must be a whole number from 0 to {MAX_SEED}"
    if elevation_deg is not None and (
        type(elevation_deg) not in (int, float) or not -90 < elevation_deg < 90
    ):
        return "'elevation_deg' must be a number between -90 and 90"
    return ""


def _wrong(path: Path, line: int, problem: str) -> UserError:
    return UserError(f"{path}, line {line}: {problem}")
