"""Where the files of a batch lie: in a directory (`Disk`), or below a URL (`object_storage.Bucket`).

All that works on a batch does so in a directory, `Storage.out`. For a `Disk` that is the batch itself. For a
bucket it is one of this process, from which what is done is taken away.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from im3d_jax.jobs import ASSETS, BATCH
from im3d_jax.jobs.rows import Row, is_number, read
from im3d_jax.objects.urls import Url
from recon_torch import locks, outputs
from recon_torch.files import TEMPORARY
from recon_torch.outputs import Kind

LOCK = ".im3d-index.lock"
"""What the process holds that writes the table."""

NUM_READERS = 16
"""Threads that look at files: on a disk that nodes share, each look waits for an answer."""

CHUNK = 512
"""So many assets a thread looks at in one go."""

Part = tuple[int, int]
"""(number, count) of a shard."""


@runtime_checkable
class Storage(Protocol):
    """Where a batch lies. It can be pickled, and is then the same place for another process.

    str() of it is what the user has named.
    """

    @property
    def out(self) -> Path:
        """The directory in which this process writes."""

    def anywhere(self) -> Storage:
        """The same for processes with other working directories."""

    def hold(self, part: Part, lost: Callable[[], None]) -> AbstractContextManager[object]:
        """Keeps other processes from making the assets of a shard. Raises InUse if one does.

        lost: called, from any thread, if the assets have gone to another process.
        """

    def hold_table(self, patience_s: float) -> AbstractContextManager[None]:
        """Keeps other processes from writing the batch's own files, which those in `out` become at its end.

        Raises InUse if others hold them for longer than `patience_s`.
        """

    def is_begun(self) -> bool:
        """Whether there is a batch."""

    def all_rows(self, known: Mapping[str, Row]) -> Iterable[Row]:
        """The rows of all assets that there are.

        known: rows whose files are not read again if they have not changed.
        """

    def rows(self, names: Sequence[str], known: Mapping[str, Row]) -> Iterable[Row]:
        """The same of some assets, without those that are not there."""

    def check(self, directories: Sequence[Path], inputs: Sequence[str], kinds: Sequence[Kind]) -> None:
        """Raises UserError if an input lies where assets are written, or something else that is not ours.

        directories: of the assets, in `out`. inputs: paths and URLs of pictures that are read.
        """

    def keep(self, directory: Path) -> None:
        """Takes what was written in a directory in `out` to where it belongs: the report last.

        Raises UserError if that cannot be; the directory is then empty.
        """

    def locate(self, path: Path) -> str:
        """How other processes name a file in `out`."""

    def has(self, path: Path) -> bool:
        """Whether such a file is there, for other processes, too."""

    def at_work(self) -> dict[Part, str]:
        """The shards that processes hold, and who holds each."""

    def token(self) -> AbstractContextManager[str]:
        """Something by which other processes know that they see the same place."""

    def sees(self, token: str) -> bool:
        """Whether there is such a token."""


class Disk(NamedTuple):
    """A directory, which processes on several hosts may share; see `Storage`."""

    out: Path

    def __str__(self) -> str:
        return str(self.out)

    def anywhere(self) -> Disk:
        return Disk(self.out.absolute())

    def hold(self, part: Part, lost: Callable[[], None]) -> AbstractContextManager[object]:
        return outputs.opened(self.out, Kind(BATCH.command, ()), part=part)

    @contextmanager
    def hold_table(self, patience_s: float) -> Iterator[None]:
        with locks.hold(self.out, LOCK, patience_s):
            yield

    def is_begun(self) -> bool:
        return (self.out / ASSETS).is_dir() and os.access(self.out / ASSETS, os.R_OK)

    def all_rows(self, known: Mapping[str, Row]) -> Iterable[Row]:
        return self.rows([name for name in os.listdir(self.out / ASSETS) if is_number(name)], known)

    def rows(self, names: Sequence[str], known: Mapping[str, Row]) -> Iterable[Row]:
        assets = f"{self.out}/{ASSETS}"

        def look(chunk: Sequence[str]) -> list[Row | None]:
            return [read(f"{assets}/{name}", known.get(name)) for name in chunk]

        chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for rows in readers.map(look, chunks):
                yield from filter(None, rows)

    def check(self, directories: Sequence[Path], inputs: Sequence[str], kinds: Sequence[Kind]) -> None:
        outputs.refuse_inputs(self.out, Kind(BATCH.command, (f"{ASSETS}/",)), inputs)
        for directory in directories:
            for kind in kinds:
                outputs.check(directory, kind, root=self.out)

    def keep(self, directory: Path) -> None:
        pass

    def locate(self, path: Path) -> str:
        return str(path)

    def has(self, path: Path) -> bool:
        return path.is_file()

    def at_work(self) -> dict[Part, str]:
        return locks.parts_at_work(self.out)

    @contextmanager
    def token(self) -> Iterator[str]:
        # A driver that is killed leaves it for `clear`.
        handle, path = tempfile.mkstemp(prefix=TEMPORARY, dir=self.out)
        locks.lock_file(handle)
        try:
            yield Path(path).name
        finally:
            os.close(handle)
            Path(path).unlink(missing_ok=True)

    def sees(self, token: str) -> bool:
        return (self.out / token).is_file()


def at(place: Path | Url) -> AbstractContextManager[Storage]:
    """The storage at what a user has named. Raises UserError if there can be none."""
    if isinstance(place, Path):
        return nullcontext(Disk(place))
    from im3d_jax.jobs.object_storage import opened

    return opened(place)
