"""Files of prompts for `im3d batch` and `im3d embed`: .txt, .json or .jsonl.

    a red mushroom with a beige stem                               .txt: a prompt on each line
    {"prompt": "a blue car", "image": "car.png", "seed": 3}        .jsonl: an object or a string on each line
    ["a green duck", {"image": "duck.png", "elevation_deg": 20}]   .json: a list of them
    {"image": ["front.png", "back.png"], "azimuth_deg": [0, 180]}  several pictures of one object

An image's path is relative to the file. Blank lines are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax.objects import copies
from im3d_jax.objects.urls import Url, beside
from im3d_jax.sides import arranged
from recon_torch.errors import UserError, quoted
from recon_torch.ranges import MAX_SEED
from recon_torch.text_files import parse_json, read_lines, read_text

BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Entry(NamedTuple):
    """One prompt of a file. It has a prompt or images (paths), or both.

    seed and elevation_deg are None where the file does not give them. azimuths_deg: of the images, see
    `sides.arranged`.
    """

    prompt: str = ""
    images: tuple[str, ...] = ()
    seed: int | None = None
    elevation_deg: float | None = None
    azimuths_deg: tuple[float, ...] = ()


KEYS = {"prompt": "prompt", "image": "images", "seed": "seed"} | {
    "elevation_deg": "elevation_deg",
    "azimuth_deg": "azimuths_deg",
}
"""Of an object in a file, and the fields that they fill. The last may be lists."""


def read(path: Path | Url, find_images: bool = True) -> list[Entry]:
    """The entries of a file. Raises UserError, naming file and line, for the first that is wrong.

    path: or a URL, beside which its pictures lie then. find_images: an image that does not exist is wrong.
    """
    readers = {".txt": _prompts, ".json": _items, ".jsonl": _objects}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompts {path}: its name must end in {', '.join(readers)}")
    is_there = copies.Presence() if find_images else None
    with copies.local(path) as file:
        entries = [_entry(value, path, line, is_there) for line, value in reader(file)]
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


def _entry(value: Any, path: Path | Url, line: int, is_there: Callable[[str], bool] | None) -> Entry:
    """The entry of a string or an object; its image's path is made relative to the working directory.

    is_there: whether an image is there; None: that does not matter.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise _wrong(path, line, "is neither a prompt nor an object")
    if unknown := sorted(value.keys() - KEYS.keys()):
        raise _wrong(path, line, f"has an unknown key {quoted(unknown[0])}; there is {', '.join(KEYS)}")
    entry = Entry(**{KEYS[name]: _as_field(name, each) for name, each in value.items() if each is not None})
    if problem := _problem(entry):
        raise _wrong(path, line, problem)
    try:
        arranged(entry.images, entry.azimuths_deg)
    except UserError as error:
        raise _wrong(path, line, str(error)) from None
    try:
        entry = entry._replace(images=tuple(beside(path.parent, image) for image in entry.images))
    except UserError as error:
        raise _wrong(path, line, str(error)) from None
    for image in entry.images:
        if is_there and not is_there(image):
            raise _wrong(path, line, f"no image at {image[-200:]}; the path is relative to this file")
    return entry


def _as_field(name: str, value: Any) -> Any:
    """A value as the field of `Entry` has it: one picture or azimuth is a tuple of one, and "" is none."""
    if name not in ("image", "azimuth_deg"):
        return value
    return tuple(value) if isinstance(value, list) else () if value == "" else (value,)


def _problem(entry: Entry) -> str:
    """Says what is wrong with an entry; "" if nothing is."""
    if not isinstance(entry.prompt, str):
        return "'prompt' is no string"
    if not all(isinstance(image, str) and image for image in entry.images):
        return "'image' is no string, and no list of strings"
    if not entry.prompt.strip() and not entry.images:
        return "has neither a prompt nor an image"
    text = "".join([entry.prompt, *entry.images])
    if "\0" in text:
        return "has a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "has half of a character (a lone surrogate)"
    seed, elevation_deg = entry.seed, entry.elevation_deg
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        return f"'seed' must be a whole number from 0 to {MAX_SEED}"
    if elevation_deg is not None and (
        type(elevation_deg) not in (int, float) or not -90 < elevation_deg < 90
    ):
        return "'elevation_deg' must be a number between -90 and 90"
    return ""


def _wrong(path: Path | Url, line: int, problem: str) -> UserError:
    return UserError(f"{path}, line {line}: {problem}")
