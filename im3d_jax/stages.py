"""The stages of making an asset: how long each takes, and what is shown of its steps meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class Bar(Protocol):
    """What a stage tells of its progress: `n` of its steps are done, and `update` adds to them."""

    n: int

    def update(self, n: int = 1) -> object: ...


@runtime_checkable
class Show(Protocol):
    """Begins to show a stage of `total` steps, of which `initial` are done already. `progress` is one."""

    def __call__(self, what: str, total: int, initial: int = 0) -> AbstractContextManager[Bar]: ...


@contextmanager
def progress(what: str, total: int, initial: int = 0) -> Iterator[Bar]:
    """A bar with rate and remaining time on a terminal; in a log one plain line when the stage is over."""
    start = time.monotonic()
    with tqdm(total=total, initial=initial, desc=f"{what:>18}", disable=None, file=sys.stderr) as bar:
        yield bar
    if bar.disable:
        print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


class Count:
    """A `Bar` that counts and shows nothing."""

    def __init__(self, n: int) -> None:
        self.n = n

    def update(self, n: int = 1) -> None:
        self.n += n


@contextmanager
def silent(what: str, total: int, initial: int = 0) -> Iterator[Bar]:
    """Shows nothing; takes the place of `progress`."""
    yield Count(initial)


class Stages:
    """Times the stages of one asset, adding up those of the same name, and shows those that have steps."""

    def __init__(self, show: Show = progress) -> None:
        self._show = show
        self._seconds: dict[str, float] = {}
        self._begun = time.monotonic()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A stage without steps to show. One that comes again adds to its seconds."""
        start = time.monotonic()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - start

    @contextmanager
    def shown(self, stage: str, what: str, total: int, initial: int = 0) -> Iterator[Bar]:
        """A stage whose `total` steps are shown under the name `what`; `initial` of them are done already."""
        with self.timed(stage), self._show(what, total, initial) as bar:
            yield bar

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each stage so far, and in total."""
        total = time.monotonic() - self._begun
        return {name: round(s, 2) for name, s in (self._seconds | {"total": total}).items()}
