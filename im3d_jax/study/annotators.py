"""Who answers: annotators.csv, with a name and a secret token a line.

A study's owner may add lines while nobody serves the study; names stand beside the answers, tokens do not.
"""

from __future__ import annotations

import csv
import os
import re
import secrets
from pathlib import Path

from im3d_jax.study import ANNOTATORS
from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_text

COLUMNS = ["annotator", "token"]
TOKEN = re.compile(r"[A-Za-z0-9_-]{12,100}")
LONGEST_NAME = 100


def write(path: Path, count: int) -> None:
    """Draws tokens of 128 bits, which are not of the study's seed: whoever knows it must not know them."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        width = len(str(count))
        writer.writerows([f"a{n:0{width}d}", secrets.token_urlsafe(16)] for n in range(1, count + 1))


def read(directory: Path) -> dict[str, str]:
    """Names by tokens. Raises UserError, which names the line, for what is wrong."""
    path = directory / ANNOTATORS
    names: dict[str, str] = {}
    rows = list(csv.reader(read_text(path).split("\n")))
    if not rows or rows[0] != COLUMNS:
        raise UserError(f"{path}, line 1: is not {','.join(COLUMNS)}")
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        name, token = (*row, "", "")[:2]
        if len(row) != 2 or not 0 < len(name) <= LONGEST_NAME:
            raise UserError(f"{path}, line {number}: give a name and a token")
        if not TOKEN.fullmatch(token):  # the token itself stays off the screen
            raise UserError(
                f"{path}, line {number}: a token has 12 to 100 letters, digits, hyphens and underscores"
            )
        if token in names or name in names.values():
            raise UserError(f"{path}, line {number}: the name {quoted(name)} or its token stands there twice")
        names[token] = name
    if not names:
        raise UserError(f"{path} has no annotators; give a line with a name and a token")
    return names
