"""The table of a batch: index.parquet, one row an asset, so that 100,000 assets are not 100,000 file reads.

    index = Index(out)
    index.refresh()             # the table, and from the disk what has changed since it was written
    index.look("000017")        # an asset that was made or has failed just now
    index.add(row)              # the same by a process that has read the row elsewhere, see `read`
    with index.held():
        index.write()           # with the rows that other processes have written meanwhile

The reports are the truth and the table is made from them: a row notes the size and the time of the file
that it was read from, and counts for nothing once these differ. A table that is lost, damaged or of another
version is made anew.
"""

from __future__ import annotations

import functools
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from json import JSONDecoder
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from im3d_jax.jobs import ASSETS, BATCH, ERROR, FAILED
from recon_torch import locks, outputs
from recon_torch.asset_files import REPORT
from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.page import PAGE
from recon_torch.settings import Verdict

INDEX = "index.parquet"
LOCK = ".im3d-index.lock"
KINDS = (*Verdict, FAILED)

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

SECONDS = "seconds"
"""The column of the total; those of the stages are seconds_fit and the like."""

NUMBER = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""The names of scores and stages that become columns."""

NOT_SCORES = re.compile("|".join(["until_step", f"{SECONDS}.*", *COLUMNS.names]))

NUM_READERS = 16
"""Threads that look at files: on a disk that nodes share, each look waits for an answer."""

CHUNK = 512
"""So many assets a thread looks at in one go."""

PATIENCE_S = 60.0
"""So long the table may be held by others before a process gives up writing it."""

DECODE = JSONDecoder(parse_constant=str).decode


class Row(NamedTuple):
    """One asset: what its report.json or, where it failed, its error.json says.

    Attributes:
        name: of its directory, a number.
        verdict: on the asset, or `FAILED`.
        seed: of the asset as it is; first_seed: of its first try, which is what was asked for.
        tries: how many were made of it.
        reasons, hints: of its quality.
        scores: of the last round: psnr [dB], ssim ... Only whole assets have them, and psnr is always there.
        seconds: by stage, and in total; of whole assets.
        error: why it failed. node: the host that it was made on.
        has_page: whether there is a page to look at it.
        image_digest, given_elevation_deg, config_digest: see `asset.origin`.
        size, mtime_ns: of the file that the row was read from.
    """

    name: str
    verdict: str
    prompt: str = ""
    image: str = ""
    seed: int | None = None
    first_seed: int | None = None
    tries: int = 1
    reasons: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    scores: dict[str, float] = {}
    seconds: dict[str, float] = {}
    error: str = ""
    node: str = ""
    has_page: bool = False
    image_digest: str | None = None
    given_elevation_deg: float | None = None
    config_digest: str | None = None
    size: int = 0
    mtime_ns: int = 0

    @property
    def path(self) -> str:
        """Relative to the batch's directory."""
        return f"{ASSETS}/{self.name}"


class Index:
    """The rows of a batch by their names.

    Attributes:
        out: the batch's directory.
        rows: see `Row`; in no order.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: dict[str, Row] = {}
        self._seen: tuple[int, ...] | None = None  # which table the rows have come from or gone to

    def in_order(self) -> list[Row]:
        """The rows by the numbers of their assets."""
        return sorted(self.rows.values(), key=lambda row: int(row.name))

    def refresh(self) -> Index:
        """Makes the rows those of what lies on the disk now. Returns itself.

        Raises UserError if there is no batch.
        """
        try:
            names = [name for name in os.listdir(self.out / ASSETS) if is_number(name)]
        except OSError:
            raise UserError(
                f"no batch in {self.out}; give a directory that `im3d batch --out` wrote"
            ) from None
        known = self._load() or {}
        self.rows = {row.name: row for row in self._looked(names, known | self.rows)}
        return self

    def look(self, name: str) -> None:
        """Takes in what has become of one asset."""
        row = read(self.out / ASSETS / name, self.rows.get(name))
        if row:
            self.rows[name] = row
        else:
            self.rows.pop(name, None)

    def add(self, row: Row) -> None:
        """Takes in a row that this process has from elsewhere."""
        self.rows[row.name] = row

    @contextmanager
    def held(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Keeps other processes from writing the table, and what is made from it. It may be nested.

        Raises UserError if others hold it for longer than `patience_s`.
        """
        with locks.hold(self.out, LOCK, patience_s):
            yield

    def write(self) -> None:
        """Writes the table, within `held`. Rows that other processes have written are taken in first.

        Raises UserError for a file of the table's name that is not ours, and where the system refuses.
        """
        outputs.check(self.out, BATCH)
        outputs.claim(self.out, BATCH)
        theirs = self._load() or {}
        for row in self._looked(
            [name for name, row in theirs.items() if self.rows.get(name) != row], self.rows
        ):
            self.rows[row.name] = row
        with replacing(self.out / INDEX) as temporary:
            table = to_table(self.in_order())
            parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        self._seen = self._stamp()

    def _looked(self, names: Sequence[str], known: dict[str, Row]) -> Iterator[Row]:
        """The rows of these assets, by many threads.

        known: rows whose files are not read again if they have not changed.
        """
        assets = f"{self.out}/{ASSETS}"

        def look(chunk: Sequence[str]) -> list[Row | None]:
            return [read(f"{assets}/{name}", known.get(name)) for name in chunk]

        chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for rows in readers.map(look, chunks):
                yield from filter(None, rows)

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


# ---- A row from its file ----


def is_number(name: str) -> bool:
    """Whether a directory has the name of an asset's."""
    return name.isascii() and name.isdigit()


def read(directory: str | os.PathLike, known: Row | None = None) -> Row | None:
    """The row of an asset's directory; None if it has neither a whole report nor a reason for a failure.

    known: an earlier row, which is returned if its file has not changed.
    """
    directory = os.fspath(directory)
    for name, read_row in ((REPORT, _success), (ERROR, _failure)):
        path = f"{directory}/{name}"
        try:
            found = os.stat(path)
            has_page = name == REPORT and os.access(f"{directory}/{PAGE}", os.F_OK)
            if known and _is_of(known, name, found):
                return known if known.has_page == has_page else known._replace(has_page=has_page)
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                continue
            with open(path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                told = DECODE(file.read().decode())
            place = Place(os.path.basename(directory), has_page, found.st_size, found.st_mtime_ns)
            return read_row(told, place)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            continue
    return None


class Place(NamedTuple):
    """What a row has from its files rather than from what they say; see `Row`."""

    name: str
    has_page: bool
    size: int
    mtime_ns: int


def _is_of(row: Row, name: str, found: os.stat_result) -> bool:
    is_kind = (row.verdict == FAILED) == (name == ERROR)
    return is_kind and (row.size, row.mtime_ns) == (found.st_size, found.st_mtime_ns)


def _failure(told: dict[str, Any], place: Place) -> Row:
    seed = _whole(told.get("seed"))
    return Row(
        verdict=FAILED,
        prompt=_text(told.get("prompt") or ""),
        image=_text(told.get("image") or ""),
        seed=seed,
        first_seed=seed,
        error=_text(told["error"]),
        node=_text(told.get("node") or ""),
        **place._asdict(),
    )


def _success(told: dict[str, Any], place: Place) -> Row:
    """Raises one of many errors for what is no whole report."""
    quality, tries = told["quality"], told.get("tries", [told])
    scores, seconds = _numbers(told["rounds"][-1], _score), _numbers(told["seconds"], _stage)
    _ = scores["psnr"], seconds["total"]
    elevation_deg = told.get("given_elevation_deg")
    return Row(
        verdict=str(Verdict(quality["verdict"])),
        prompt=_text(told.get("prompt") or ""),
        image=_text(told.get("image") or ""),
        seed=_whole(told.get("seed")),
        first_seed=_whole(tries[0].get("seed")),
        tries=len(tries),
        reasons=tuple(map(_text, quality["reasons"])),
        hints=tuple(map(_text, quality["hints"])),
        scores=scores,
        seconds=seconds,
        node=sys.intern(_text(told.get("node") or "")),
        image_digest=_text_or_none(told.get("image_digest")),
        given_elevation_deg=None if elevation_deg is None else float(elevation_deg),
        config_digest=_text_or_none(told.get("config_digest")),
        **place._asdict(),
    )


def _numbers(told: dict[str, Any], name_of: Callable[[str], str | None]) -> dict[str, float]:
    """What of an object are finite numbers with names of columns."""
    return {
        column: float(value)
        for name, value in told.items()
        if type(value) in (float, int) and math.isfinite(value) and (column := name_of(name))
    }


@functools.lru_cache(1000)
def _stage(name: str) -> str | None:
    """The one string for all stages of this name; None if it cannot be the name of a column."""
    return name if NUMBER.fullmatch(name) else None


@functools.lru_cache(1000)
def _score(name: str) -> str | None:
    """The same for a score."""
    return name if NUMBER.fullmatch(name) and not NOT_SCORES.fullmatch(name) else None


def _text(value: object) -> str:
    """As UTF-8 can have it: half a character becomes a question mark."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _text_or_none(value: object) -> str | None:
    return None if value is None else sys.intern(_text(value))


def _whole(value: object) -> int | None:
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


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
