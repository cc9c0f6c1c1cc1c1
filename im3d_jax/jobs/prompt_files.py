"""Files of prompts for `im3d batch`: .txt, .json or .jsonl.

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

from recon_torch.errors import UserError

MAX_SEED = 2**31 - 1

BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Entry(NamedTuple):
    """One prompt of a file. Either the prompt or the image (a path) may be empty, but not both.

    seed and elevation_deg are None where the file does not give them.
    """

    prompt: str = ""
    image: str = ""
    seed: int | None = None
    elevation_deg: float | None = None


def read(path: Path) -> list[Entry]:
    """The entries of a file. Raises UserError, naming file and line, for the first that is wrong."""
    readers = {".txt": _prompts, ".json": _items, ".jsonl": _objects}
    if path.suffix not in readers:
        raise UserError(f"prompts {path}: its name must end in {', '.join(readers)}")
    entries = [_entry(value, path, line) for line, value in readers[path.suffix](_text(path), path)]
    if not entries:
        raise UserError(f"prompts {path}: the file is empty; write a prompt on each line")
    return entries


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {path} cannot be read: {error.strerror}; check the path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(
            path, content[: error.start].count(b"\n") + 1, "is not UTF-8; convert the file"
        ) from None


def _prompts(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # splitlines() would also split at characters that a prompt may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _objects(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _prompts(text, path):
        yield number, _parsed(line, path, number)


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    items = _parsed(text, path, 1)
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


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(path, first_line + error.lineno - 1, f"is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise _wrong(path, first_line, f"is not JSON that can be read ({error})") from None


def _entry(value: Any, path: Path, line: int) -> Entry:
    """The entry of a string or an object; its image's path is made relative to the working directory."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise _wrong(path, line, "is neither a prompt nor an object")
    if unknown := sorted(value.keys() - set(Entry._fields)):
        raise _wrong(path, line, f"has an unknown key {unknown[0]!r}; there is {', '.join(Entry._fields)}")
    entry = Entry(**{name: each for name, each in value.items() if each is not None})
    if problem := _problem(entry):
        raise _wrong(path, line, problem)
    if entry.image:
        entry = entry._replace(image=str(path.parent / entry.image))
        if not os.path.isfile(entry.image):
            raise _wrong(path, line, f"no image at {entry.image}; the path is relative to this file")
    return entry


def _problem(entry: Entry) -> str:
    """Says what is wrong with an entry; "" if nothing is."""
    for name in ("prompt", "image"):
        if not isinstance(getattr(entry, name), str):
            return f"{name!r} is no string"
    if not entry.prompt.strip() and not entry.image:
        return "has neither a prompt nor an image"
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
