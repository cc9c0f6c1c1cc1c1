"""Captions of meshes, as tables like Cap3D's hold them."""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from im3d_jax.data.blender import SUFFIXES
from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_text

DELIMITERS = ",;\t"  # a spreadsheet writes semicolons where the comma is for decimals


class _Row(NamedTuple):
    number: int
    cells: list[str]


def read_captions(path: Path) -> dict[str, str]:
    """Captions by name, from a CSV file whose rows are name,caption.

    The cells are parted by commas, semicolons or tabs. Blank rows are skipped. A name that is the path of a
    mesh file stands for this path without its suffix, too.

    Raises:
        UserError: the file cannot be read, has other rows, or has two captions for a name.
    """
    text = read_text(path)
    tables = [table for delimiter in DELIMITERS if (table := _table(text, delimiter)) is not None]
    if [] in tables:
        raise UserError(f"{path} has no captions; give rows of name,caption")
    # A caption may hold what parts the cells of another table, a name hardly does.
    fits = min(
        tables, key=lambda table: (_num_wrong(table), sum(len(row.cells[0]) for row in table)), default=[]
    )
    wrong = next((row.number for row in fits if len(row.cells) != 2), None)
    if len(tables) < len(DELIMITERS) and (wrong is not None or not fits):
        raise UserError(
            f"{path} has quotes that do not close, or captions of many pages; double inner quotes"
        )
    if wrong is not None:
        raise UserError(f"{path}, row {wrong}: not name,caption; quote captions that have commas")
    captions: dict[str, str] = {}
    for row in fits:
        for name in _names(row.cells[0]):
            if captions.setdefault(name, row.cells[1].strip()) != row.cells[1].strip():
                raise UserError(
                    f"{path}, row {row.number}: {quoted(name)} has another caption before; keep one"
                )
    return captions


def _table(text: str, delimiter: str) -> list[_Row] | None:
    """The rows that are not blank, with cells that are parted so; None if the quotes do not go with that."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)  # or a quote may swallow rows
    try:
        rows = [_Row(*each) for each in enumerate(reader, 1)]
    except csv.Error:
        return None
    return [row for row in rows if any(cell.strip() for cell in row.cells)]


def _num_wrong(table: list[_Row]) -> int:
    return sum(len(row.cells) != 2 for row in table)


def _names(cell: str) -> list[str]:
    """A name as objects have it, without "./" and backslashes, and without the suffix of a mesh file."""
    name = PurePosixPath(cell.strip().replace("\\", "/"))
    stem = [name.with_suffix("")] if name.suffix.lower() in SUFFIXES else []
    return [str(each) for each in [name, *stem]]
