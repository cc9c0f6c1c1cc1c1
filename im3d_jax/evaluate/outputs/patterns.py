"""Files by patterns, such as "{name}/{view}.png" and "{prompt}@*/save/it{step}-test.mp4".

{name}      what the method calls the object; {prompt}: the prompt, with "_" or "-" for its spaces
{index}     its number in the list of prompts, from 0
{view}      a view's number; files that differ in it alone are the views of one row
{seed}      the least is taken; {step}: the greatest is
*           any text; of files that differ in it alone the last is taken, in natural order
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recon_torch.errors import UserError, quoted

NUMBERS, TEXTS = ("index", "view", "seed", "step"), ("name", "prompt")
IDENTITY = ("name", "prompt", "index")
PARTS = re.compile(r"(\*|\{[^}]*\})")


class Match(NamedTuple):
    """A file or folder that a pattern names.

    fields: what stands in place of the braces. run: the path below the root, the same for all views of a row.
    """

    path: Path
    fields: dict[str, str]
    run: str

    def number(self, field: str, default: int = 0) -> int:
        return int(self.fields.get(field, default))


def check(pattern: str) -> None:
    """Raises UserError for a pattern that is wrong."""
    fields = re.findall(r"\{([^}]*)\}", pattern)
    if unknown := [each for each in fields if each not in NUMBERS + TEXTS]:
        known = ", ".join(f"{{{each}}}" for each in TEXTS + NUMBERS)
        raise UserError(f"the path {quoted(pattern)} has {{{unknown[0]}}}; there is {known} and *")
    if len(set(fields)) < len(fields):
        raise UserError(f"the path {quoted(pattern)} has one field twice; put * in place of the second")
    if not set(fields) & set(IDENTITY):
        raise UserError(
            f"the path {quoted(pattern)} does not say whose row it is; give {{name}} or {{index}}"
        )
    if any(part in ("", ".", "..") for part in pattern.split("/")):
        raise UserError(f"the path {quoted(pattern)} is not below the root; give one such as {{name}}.png")


def matches(root: Path, pattern: str) -> Iterator[Match]:
    """What is there under a pattern, in natural order. Hidden files are nobody's outputs."""
    yield from _below(root, pattern.split("/"), {}, "")


def natural(path: Path | str) -> list[tuple[int, int, str]]:
    """Sorts "view10" after "view9"."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _below(folder: Path, parts: list[str], fields: dict[str, str], run: str) -> Iterator[Match]:
    part, *rest = parts
    expression = _expression(part)
    for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        found = None if path.name.startswith(".") else re.fullmatch(expression, path.name)
        if found is None:
            continue
        every, name = fields | found.groupdict(), path.name
        if "view" in found.groupdict():
            name = f"{name[: found.start('view')]}{{view}}{name[found.end('view') :]}"
        if not rest:
            yield Match(path, every, f"{run}{name}")
        elif path.is_dir():
            yield from _below(path, rest, every, f"{run}{name}/")


def _expression(part: str) -> str:
    made = ""
    for piece in PARTS.split(part):
        field = piece[1:-1] if piece.startswith("{") else ""
        if piece == "*":
            made += ".*"
        elif field:
            made += rf"(?P<{field}>{'[0-9]+' if field in NUMBERS else '.+'})"
        else:
            made += re.escape(piece)
    return made
