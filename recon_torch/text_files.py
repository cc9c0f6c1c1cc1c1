"""Text files as users bring them, read by one rule in every command.

A text file is UTF-8 with or without a byte-order mark, and its lines end as on Linux, Windows or old Macs.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recon_torch.errors import UserError, first_line, quoted

LINE_END = re.compile("\r\n?|\n")


class Kind(NamedTuple):
    """What a file is that is not what it should be.

    Attributes:
        pattern: what it begins with.
        name: what to call it. remedy: what its user can do.
    """

    pattern: bytes
    name: str
    remedy: str


DOWNLOAD = "download the file itself"

STAND_INS = (
    Kind(rb"version https://git-lfs", "a git-lfs pointer, which stands for the file", "run `git lfs pull`"),
    Kind(rb"/annex/objects/", "a git-annex pointer, which stands for the file", "run `git annex get`"),
    Kind(rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head)", "a web page, such as a login", DOWNLOAD),
)
"""What downloads leave in the place of any file."""


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file without its byte-order mark, whose lines end in "\\n".

    Raises UserError where the file cannot be read or is no text, with the line that is at fault.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError for a NUL in the path
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}; check the path") from None
    check_not_stand_in(path, content)
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


BEGINNING_BYTES = 256
"""So much of a file tells these."""


def check_not_stand_in(path: str | os.PathLike, content: bytes) -> None:
    """Raises UserError for a file that begins as what downloads leave in the place of any file."""
    for kind in STAND_INS:
        if re.match(kind.pattern, content):
            raise UserError(f"{path} is {kind.name}; {kind.remedy}")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, which a file's name in another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a JSON file, such as the config.json of a model.

    Raises UserError as `read_json` does, and for what is no object, or holds NaN or infinity.
    """
    found = parse_json(read_text(path), path, finite=True)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no object of settings but {quoted(found, 40)}; fetch it again")
    return found


def parse_json(text: str, path: str | os.PathLike, line: int = 1, finite: bool = False) -> Any:
    """Parses JSON that begins on this line of a file.

    Raises UserError, which names file and line, for what is no JSON or gives one key of an object twice, and
    if it is to be finite for the NaN and infinity that Python reads and JSON does not have.
    """
    number = _finite if finite else None
    place = str(path) if "\n" in text.strip() else f"{path}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_without_doubles, parse_float=number, parse_constant=number)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        raise UserError(f"{place}: is not JSON ({error.msg}, column {error.colno})") from None
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise UserError(f"{place}: is not JSON that can be read ({first_line(error)})") from None


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise UserError(f"holds {quoted(number)}, which is no number of JSON; fetch it again")
    return float(number)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose equal keys Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"an object has the key {quoted(twice)} twice; leave one of them")
    return found
