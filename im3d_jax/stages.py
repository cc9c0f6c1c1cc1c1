"""The stages of making an asset: how long each takes, and what is shown meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from tqdm import tqdm


class Bar(Protocol):
    """What a stage tells of its steps, of which `n` are done."""

    n: int

    def update(self, steps: int = 1) -> None: ...


Show = Callable[..., AbstractContextManager[Bar]]
"""Called as `progress` is, when a stage begins."""


class Stopwatch:
    """Wall-clock seconds of named stages; a stage that comes again adds up."""

    def __init__(self):
        self.begun, self.stages = time.monotonic(), {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.monotonic() - start

    def report(self) -> dict[str, float]:
        return {
            name: round(s, 2) for name, s in (self.stages | {"total": time.monotonic() - self.begun}).items()
        }


@contextmanager
def progress(what: str, total: int, initial: int = 0) -> Iterator[Bar]:
    """A bar with rate and ETA on a terminal, one plain line in a log."""
    start = time.monotonic()
    with tqdm(total=total, initial=initial, desc=f"{what:>18}", disable=None, file=sys.stderr) as bar:
        yield bar
    if bar.disable:
        print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
