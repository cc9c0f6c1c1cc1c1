"""How signals stop a run of many assets: at the next step of each, so that everything is cleaned up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from im3d_jax.stages import Bar, Count
from im3d_jax.training.hosts import EXIT_REQUEUE


class Stopped(Exception):
    """Leaves an asset that is not to be finished."""


class Stop:
    """What signals have asked for, within `with Stop() as stop:`.

    SIGUSR1 is a warning: no further asset is begun. SIGTERM also gives up the assets in hand.

    Attributes:
        soon: whether to stop before the next asset.
        now: whether to stop within an asset.
        by_signal: whether a signal has asked for it.
        in_lanes: whether assets are being made, in threads that look at these; if not, SIGTERM exits.
    """

    def __init__(self) -> None:
        self.soon = self.now = self.by_signal = self.in_lanes = False

    def __enter__(self) -> Stop:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def give_up(self) -> None:
        """Stops at the next step, whatever is in hand. Any thread may do so."""
        self.soon = self.now = True

    def _hear(self, number: int, frame: object) -> None:
        self.soon = self.by_signal = True
        if number == signal.SIGTERM:
            self.now = True
            if not self.in_lanes:
                raise SystemExit(EXIT_REQUEUE)

    @contextmanager
    def show(self, what: str, total: int, initial: int = 0) -> Iterator[Bar]:
        """Takes the place of `stages.progress`: shows nothing, raises `Stopped` at a step if `now`."""
        yield StepCheck(self, initial)


class StepCheck(Count):
    """See `Stop.show`."""

    def __init__(self, stop: Stop, n: int) -> None:
        super().__init__(n)
        self._stop = stop

    def update(self, n: int = 1) -> None:
        if self._stop.now:
            raise Stopped
        super().update(n)
