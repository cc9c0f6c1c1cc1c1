"""Text files as users bring them, read by one rule in every command.

A text file is UTF-8 with or without a byte-order mark, and its lines end as on Linux, Windows or old Macs.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recon_torch.errors import UserError, first_line, quoted

LINE_END = re.compile("\r\n?|\n")


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file without its byte-order mark, whose lines end in "\\n".

    Raises UserError where the file cannot be read or is no text, with the line that is at fault.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError for a NUL in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}; check the path") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.findall(error.object[: error.start].decode("latin-1"))) + 1
        raise UserError(f"{path}, line {line}: is not UTF-8; convert the file") from None
    text = LINE_END.sub("\n", text)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}, line {line}: has a NUL character; give a text file")
    return text


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, without spaces around them, and their numbers from 1.

    Raises UserError as `read_text` does.
    """
    # splitlines() would also split at characters that a line may hold.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises UserError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: str | os.PathLike, line: int = 1) -> Any:
    """Parses JSON that begins on this line of a file.

    Raises UserError, which names file and line, for what is no JSON or gives one key of an object twice.
    """
    place = str(path) if "\n" in text.strip() else f"{path}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        raise UserError(f"{place}: is not JSON ({error.msg}, column {error.colno})") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise UserError(f"{place}: is not JSON that can be read ({first_line(error)})") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose equal keys Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"an object has the key {quoted(twice)} twice; leave one of them")
    return found
