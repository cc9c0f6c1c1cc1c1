"""A batch in an object store: what `storage.Storage` asks for, below a URL.

Everything is made in a directory of this process, with the names and the bytes that a batch on a disk has,
and uploaded from there: an asset when it is made, its report last, and the batch's own files when they are
written. An object is ours if the `.im3d.json` of its folder names it, and if it was not written after the
report. Nothing else is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from im3d_jax.asset_kinds import ASSET, PICTURE
from im3d_jax.jobs import ASSETS, BATCH, CONFIGS, ERROR, FAILURE, PICTURES
from im3d_jax.jobs.rows import Place, Row, is_number, parse, unchanged
from im3d_jax.jobs.storage import Part
from im3d_jax.objects import leases
from im3d_jax.objects.store import FIRST_TRIES, Entry, ObjectStore
from im3d_jax.objects.urls import Url
from recon_torch import locks, outputs
from recon_torch.asset_files import REPORT
from recon_torch.errors import UserError
from recon_torch.outputs import MARKER, Kind
from recon_torch.page import PAGE

T = TypeVar("T")
U = TypeVar("U")

NUM_THREADS = 16
"""Calls that wait for answers at once."""

PER_LIST = 2
"""Assets whose numbers differ in so many of the last digits are listed together: 100 with about 30 objects
each take a store three answers."""

OWN = (BATCH, CONFIGS)
"""The batch's own files, in its folder."""

MADE = (ASSET, FAILURE, PICTURE)
"""What is written into the folder of an asset or of a picture."""

GALLERY = re.compile(r"gallery(_\d+)?\.html")
TABLE = "table"
SHARD = re.compile(r"(\d+)-of-(\d+)")


@contextlib.contextmanager
def opened(url: Url) -> Iterator[Bucket]:
    """The batch at a URL. Errors name what lies there by its URL.

    Raises UserError if the store does not answer, the bucket is not there or nothing in it can be read.
    """
    bucket = Bucket(url)
    try:
        bucket.bring(FIRST_TRIES)
        yield bucket
    except UserError as error:
        error.args = (str(error).replace(str(bucket.out), str(url)),)
        raise
    finally:
        shutil.rmtree(bucket.out, ignore_errors=True)


class Bucket:
    """See `storage.Storage`."""

    def __init__(self, url: Url) -> None:
        self.url = url
        self._own: dict[str, Entry] = {}  # the batch's own objects as they were last seen
        self._local: dict[str, tuple[int, int]] = {}  # its files as they were last brought or taken
        self._drawn: set[str] | None = None
        self._lease, self._is_lost = "", False

    def __reduce__(self) -> tuple[type[Bucket], tuple[Url]]:
        return Bucket, (self.url,)

    def __str__(self) -> str:
        return str(self.url)

    @functools.cached_property
    def store(self) -> ObjectStore:
        return ObjectStore(self.url)

    @functools.cached_property
    def out(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="batch-", dir=locks.process_directory()))

    def anywhere(self) -> Bucket:
        return self

    # ---- The batch's own files ----

    def bring(self, *tries: int) -> None:
        """Makes the batch's own files in `out` those that lie in the store."""
        found = self.store.files("", *tries)
        own = {name: each for name, each in found.items() if name == MARKER or _is_of(name, OWN)}
        changed = [name for name, entry in own.items() if self._own.get(name) != entry]

        def bring_one(name: str) -> None:
            if GALLERY.fullmatch(name):  # is written anew, and never read
                (self.out / name).touch()
            else:
                with contextlib.suppress(FileNotFoundError):
                    self.store.get(name, self.out / name)
            self._local[name] = _stamp(self.out / name)

        _at_once(bring_one, changed)
        for name in self._own.keys() - own.keys():
            (self.out / name).unlink(missing_ok=True)
        self._own = own

    def _take(self) -> None:
        """The other way round: writes what was written here since, and removes what was removed."""
        there = {path.name for kind in OWN for path in outputs.files_of(self.out, kind)}
        marker = {MARKER} if (self.out / MARKER).exists() else set()
        changed = [name for name in there | marker if self._local.get(name) != _stamp(self.out / name)]

        def take_one(name: str) -> None:
            stamp = _stamp(self.out / name)
            self.store.put(self.out / name, name)
            self._local[name] = stamp

        _at_once(take_one, [name for name in changed if name == MARKER])  # what is ours, before it is there
        _at_once(take_one, [name for name in changed if name != MARKER])
        _at_once(self.store.remove, list(self._own.keys() - there - {MARKER}))
        now = self.store.files()
        self._own = {name: now[name] for name in there | marker if name in now}

    # ---- Who works ----

    @contextlib.contextmanager
    def hold(self, part: Part, lost: Callable[[], None]) -> Iterator[None]:
        number, count = part

        def is_rival(name: str) -> bool:
            match = SHARD.fullmatch(name)
            return match is not None and (int(match[1]) - number) % math.gcd(count, int(match[2])) == 0

        def lose() -> None:
            self._is_lost = True
            lost()

        self._lease = f"{number}-of-{count}"
        with leases.held(self.store, self._lease, is_rival, lose):
            yield

    @contextlib.contextmanager
    def hold_table(self, patience_s: float) -> Iterator[None]:
        # Who was killed while it wrote keeps the table for so long.
        patience_s = patience_s and max(patience_s, leases.TIMES.expiry_s + 1)
        with leases.held(self.store, TABLE, lambda name: name == TABLE, patience_s=patience_s):
            self.bring()
            yield
            self._take()

    def at_work(self) -> dict[Part, str]:
        found = ((SHARD.fullmatch(name), who) for name, who in leases.held_now(self.store).items())
        return {(int(match[1]), int(match[2])): who for match, who in found if match}

    @contextlib.contextmanager
    def token(self) -> Iterator[str]:
        yield self._lease

    def sees(self, token: str) -> bool:
        return token in map(leases.name_of, self.store.files(leases.FOLDER))

    # ---- What is there ----

    def is_begun(self) -> bool:
        return bool(self._own or self.store.folders(ASSETS))

    def all_rows(self, known: Mapping[str, Row]) -> Iterable[Row]:
        names = [name for name in self.store.folders(ASSETS) if is_number(name)]
        groups = sorted({name[:-PER_LIST] for name in names})

        def look(group: str) -> list[Row]:
            found = _by_folder(self.store.tree(ASSETS, group))
            mine = {name: each for name, each in found.items() if name[:-PER_LIST] == group}
            return [row for name, each in mine.items() if (row := self._row(name, each, known.get(name)))]

        for rows in _at_once(look, groups):
            yield from rows

    def rows(self, names: Sequence[str], known: Mapping[str, Row]) -> Iterable[Row]:
        def look(name: str) -> Row | None:
            return self._row(name, self.store.tree(f"{ASSETS}/{name}"), known.get(name))

        yield from filter(None, _at_once(look, names))

    def _row(self, name: str, there: Mapping[str, Entry], known: Row | None) -> Row | None:
        """The row of an asset. there: the objects in its folder."""
        for kind in (REPORT, ERROR):
            if kind not in there:
                continue
            place = Place(name, kind == REPORT and PAGE in there, *there[kind])
            if row := unchanged(known, kind, place):
                return row
            with contextlib.suppress(FileNotFoundError):
                if row := parse(kind, self.store.read(f"{ASSETS}/{name}/{kind}"), place):
                    return row
        return None

    def check(self, directories: Sequence[Path], inputs: Sequence[str], kinds: Sequence[Kind]) -> None:
        for given in inputs:
            if given.startswith(f"{self.url}/{ASSETS}/"):
                raise UserError(f"{given} lies where assets are written; move it, or choose another --out")
        there = set(self.store.folders(ASSETS))
        _at_once(self._ours, [f"{ASSETS}/{each.name}" for each in directories if each.name in there])

    def _ours(self, folder: str) -> tuple[set[str], dict[str, list]]:
        """What in a folder is ours to replace, and what `.im3d.json` notes of it.

        Raises UserError for an object of another that has the name of one of ours.
        """
        there = self.store.tree(folder)
        if not there:
            return set(), {}
        noted = self._noted(folder) if MARKER in there else {}
        made_ns = there[REPORT].mtime_ns if REPORT in there else math.inf
        for name, entry in there.items():
            if not _is_of(name, MADE):
                continue
            if name not in noted or entry.mtime_ns > made_ns:
                problem = "was changed since it was made" if name in noted else "is not of an earlier run"
                what = f"{self.url}/{folder}/{name} {problem}, and `im3d batch` would write there"
                raise UserError(f"{what}; move it away, or choose another --out")
        return {name for name in there if name in noted and _is_of(name, MADE)}, noted

    def _noted(self, folder: str) -> dict[str, list]:
        """The names that `.im3d.json` has."""
        try:
            commands = json.loads(self.store.read(f"{folder}/{MARKER}"))["made_by_im3d"]
            return {
                name: each
                for noted in commands.values()
                if isinstance(noted, dict)
                for name, each in noted.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, LookupError, TypeError, AttributeError):
            problem = "is damaged or not ours; move it away, or choose another --out"
            raise UserError(f"{self.url}/{folder}/{MARKER} {problem}") from None

    # ---- What was made ----

    def keep(self, directory: Path) -> None:
        try:
            if self._is_lost:
                raise UserError(f"{self.url} is another process's now")
            self._keep(directory, directory.relative_to(self.out).as_posix())
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _keep(self, directory: Path, folder: str) -> None:
        new = {
            path.relative_to(directory).as_posix()
            for kind in MADE
            for path in outputs.files_of(directory, kind)
        }
        last = next((name for name in (REPORT, ERROR) if name in new), "")
        ours, noted = self._ours(folder)
        # From here to the end there is neither a report nor a failure: if this stops, it is made again.
        for name in (REPORT, ERROR):
            if name in ours:
                self.store.remove(f"{folder}/{name}")
        before = {name: each for name, each in noted.items() if name in ours - new}
        if before:
            mine = json.loads((directory / MARKER).read_text())["made_by_im3d"]
            both = {"made_by_im3d": {**mine, ASSET.command: {**before, **mine.get(ASSET.command, {})}}}
            self.store.write(f"{folder}/{MARKER}", json.dumps(both).encode())
        else:
            self.store.put(directory / MARKER, f"{folder}/{MARKER}")
        _at_once(lambda name: self.store.put(directory / name, f"{folder}/{name}"), sorted(new - {last}))
        _at_once(lambda name: self.store.remove(f"{folder}/{name}"), sorted(ours - new))
        if before:
            self.store.put(directory / MARKER, f"{folder}/{MARKER}")
        if last:
            self.store.put(directory / last, f"{folder}/{last}")

    def locate(self, path: Path) -> str:
        return f"{self.url}/{path.relative_to(self.out).as_posix()}"

    def has(self, path: Path) -> bool:
        if self._drawn is None:
            self._drawn = {f"{PICTURES}/{name}" for name in self.store.tree(PICTURES)}
        return path.relative_to(self.out).as_posix() in self._drawn


def _at_once(function: Callable[[T], U], items: Collection[T]) -> list[U]:
    """The results of a function for many items, by many threads. Raises the first error, at the end."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(function, items))


def _by_folder(found: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    folders: dict[str, dict[str, Entry]] = {}
    for name, entry in found.items():
        folder, _, rest = name.partition("/")
        folders.setdefault(folder, {})[rest] = entry
    return folders


def _is_of(name: str, kinds: Sequence[Kind]) -> bool:
    return any(re.fullmatch(pattern, name) for kind in kinds for pattern in kind.paths)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
