"""Captions of meshes, as tables like Cap3D's hold them."""

from __future__ import annotations

import csv
from pathlib import Path

from recon_torch.errors import UserError


def read_captions(path: Path) -> dict[str, str]:
    """Captions by name, from a CSV file whose rows are name,caption. Raises UserError for anything else."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read captions from {path} ({error}); give a CSV of name,caption") from None
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong:
        raise UserError(f"{path}, row {wrong}: not name,caption; quote captions that have commas")
    return {name: caption.strip() for name, caption in rows}
