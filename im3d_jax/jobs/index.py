"""The table of a batch: index.parquet, one row an asset, so that 100,000 assets are not 100,000 file reads.

    index = Index(out)
    index.refresh()             # the table, and from the disk what has changed since it was written
    index.look("000017")        # an asset that was made or has failed just now
    index.add(row)              # the same by a process that has read the row elsewhere, see `rows`
    with index.held():
        index.write()           # with the rows that other processes have written meanwhile

The reports are the truth and the table is made from them: a row notes the size and the time of the file
that it was read from, and counts for nothing once these differ. A table that is lost, damaged or of another
version is made anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from im3d_jax.jobs import BATCH, FAILED
from im3d_jax.jobs.rows import KINDS, SECONDS, Row, is_number
from im3d_jax.jobs.storage import Disk, Storage
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import replacing

INDEX = "index.parquet"

VERSION = {b"im3d.index": b"1"}
"""In the file's metadata: what the columns are. A table of another version is made anew."""

COLUMNS = pa.schema(
    {
        "name": pa.string(),
        "path": pa.string(),
        "prompt": pa.string(),
        "image": pa.string(),
        "seed": pa.int64(),
        "verdict": pa.string(),
        "reasons": pa.list_(pa.string()),
        "hints": pa.list_(pa.string()),
        "error": pa.string(),
        "node": pa.string(),
        "has_page": pa.bool_(),
        "tries": pa.int64(),
        "first_seed": pa.int64(),
        "image_digest": pa.string(),
        "given_elevation_deg": pa.float64(),
        "config_digest": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
    }
)
"""Every table has these, and then a column for each score and for the seconds of each stage."""

PATIENCE_S = 60.0
"""So long the table may be held by others before a process gives up writing it."""


class Index:
    """The rows of a batch by their names.

    Attributes:
        storage: where the batch lies. out: the directory in which this process writes for it.
        rows: see `Row`; in no order.
    """

    def __init__(self, place: Path | Storage) -> None:
        """place: where the batch lies; a path stands for `Disk`."""
        self.storage = Disk(place) if isinstance(place, Path) else place
        self.out = self.storage.out
        self.rows: dict[str, Row] = {}
        self._seen: tuple[int, ...] | None = None  # which table the rows have come from or gone to

    def in_order(self) -> list[Row]:
        """The rows by the numbers of their assets."""
        return sorted(self.rows.values(), key=lambda row: int(row.name))

    def refresh(self) -> Index:
        """Makes the rows those of what there is now. Returns itself.

        Raises UserError if there is no batch.
        """
        if not self.storage.is_begun():
            raise UserError(f"no batch in {self.storage}; give what `im3d batch --out` wrote")
        known = (self._load() or {}) | self.rows
        self.rows = {row.name: row for row in self.storage.all_rows(known)}
        return self

    def look(self, name: str) -> None:
        """Takes in what has become of one asset."""
        known = self.rows.pop(name, None)
        for row in self.storage.rows([name], {name: known} if known else {}):
            self.rows[name] = row

    def add(self, row: Row) -> None:
        """Takes in a row that this process has from elsewhere."""
        self.rows[row.name] = row

    @contextmanager
    def held(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Keeps other processes from writing the table, and what is made from it. It may be nested.

        Raises UserError if others hold it for longer than `patience_s`.
        """
        with self.storage.hold_table(patience_s):
            yield

    def write(self) -> None:
        """Writes the table, within `held`. Rows that other processes have written are taken in first.

        Raises UserError for a file of the table's name that is not ours, and where the system refuses.
        """
        outputs.check(self.out, BATCH)
        outputs.claim(self.out, BATCH)
        theirs = self._load() or {}
        changed = [name for name, row in theirs.items() if self.rows.get(name) != row]
        for row in self.storage.rows(changed, self.rows):
            self.rows[row.name] = row
        with replacing(self.out / INDEX) as temporary:
            table = to_table(self.in_order())
            parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        self._seen = self._stamp()

    def _load(self) -> dict[str, Row] | None:
        """The rows of the table that lies there; None if it was seen before, or is none that can be used."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return None
        self._seen = stamp
        return load(self.out / INDEX)

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.out / INDEX)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


# ---- Rows as a table ----


def to_table(rows: Sequence[Row]) -> pa.Table:
    """The table of rows, with a column for each score and each stage that one of them has."""
    scores = sorted({name for row in rows for name in row.scores})
    stages = sorted({name for row in rows for name in row.seconds} - {"total"})
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS.names}
    columns |= {name: [row.scores.get(name) for row in rows] for name in scores}
    columns[SECONDS] = [row.seconds.get("total") for row in rows]
    columns |= {f"{SECONDS}_{name}": [row.seconds.get(name) for row in rows] for name in stages}
    fields = [
        COLUMNS.field(name) if name in COLUMNS.names else pa.field(name, pa.float64()) for name in columns
    ]
    return pa.table(list(columns.values()), schema=pa.schema(fields, metadata=VERSION))


def load(path: Path) -> dict[str, Row] | None:
    """The rows of a table by their names; None for a file that is no table of ours, or cannot be read."""
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if VERSION.items() <= (file.schema_arrow.metadata or {}).items():
                return {row.name: row for row in to_rows(file.read()) if _is_sound(row)}
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError):
        pass
    return None


def _is_sound(row: Row) -> bool:
    is_whole = row.verdict in KINDS and "psnr" in row.scores and "total" in row.seconds
    return is_number(row.name) and (is_whole or row.verdict == FAILED)


def to_rows(table: pa.Table) -> Iterable[Row]:
    """The rows of a table that `to_table` has made. Raises ValueError for one of other columns."""
    others = [name for name in table.column_names if name not in COLUMNS.names]
    wanted = pa.schema([*COLUMNS, *(pa.field(name, pa.float64()) for name in others)])
    if not table.schema.equals(wanted):
        raise ValueError(f"the columns are {table.schema}")
    stages = [name for name in others if name.startswith(SECONDS)]
    scores = [name for name in others if not name.startswith(SECONDS)]
    column = {name: table.column(name).to_pylist() for name in COLUMNS.names if name != "path"}
    for name in ("verdict", "node", "image_digest", "config_digest"):  # many rows share a few texts
        column[name] = [text and sys.intern(text) for text in column[name]]
    for name in ("reasons", "hints"):
        column[name] = [tuple(texts) for texts in column[name]]
    column["scores"] = _gathered(table, {name: name for name in scores})
    names = {name: "total" if name == SECONDS else name.removeprefix(f"{SECONDS}_") for name in stages}
    column["seconds"] = _gathered(table, names)
    return map(Row._make, zip(*(column[name] for name in Row._fields), strict=True))


def _gathered(table: pa.Table, names: dict[str, str]) -> list[dict[str, float]]:
    """For each row the numbers in some columns by new names, without those that it lacks."""
    keys = [sys.intern(name) for name in names.values()]
    numbers = [table.column(name).to_pylist() for name in names]
    if not keys:
        return [{} for _ in range(len(table))]
    return [
        {key: number for key, number in zip(keys, each, strict=True) if number is not None}
        for each in zip(*numbers, strict=True)
    ]
