"""How signals stop a run of many assets: at the next step of each, so that all of it cleans up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from im3d_jax.stages import Bar
from im3d_jax.training.hosts import EXIT_REQUEUE


class Stopped(Exception):
    """Out of an asset that is not to be finished."""


class Stop:
    """What signals ask for, in `with Stop() as stop:`.

    SIGUSR1, a warning: no other asset is begun. SIGTERM: those in hand are given up, too.

    Attributes:
        soon, now: whether to stop before the next asset, and within an asset.
        by_signal: whether a signal asked.
        in_lanes: whether assets are being made, in threads, which look at these; otherwise SIGTERM exits.
    """

    def __init__(self):
        self.soon = self.now = self.by_signal = self.in_lanes = False

    def __enter__(self) -> Stop:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self.soon = self.by_signal = True
        if number == signal.SIGTERM:
            self.now = True
            if not self.in_lanes:
                raise SystemExit(EXIT_REQUEUE)

    @contextmanager
    def show(self, what: str, total: int, initial: int = 0) -> Iterator[Bar]:
        """Stands in for an asset's bars. Shows nothing; raises `Stopped` at its next step."""
        yield StepCheck(self, initial)


class StepCheck:
    """See `Stop.show`."""

    def __init__(self, stop: Stop, initial: int):
        self._stop, self.n = stop, initial

    def update(self, steps: int = 1) -> None:
        if self._stop.now:
            raise Stopped
        self.n += steps
