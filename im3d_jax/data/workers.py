"""Processes that compute for the threads of a loader what would hold Python's lock there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

Run = Callable[..., Any]
"""Calls its first argument with the others, wherever, and returns or raises what that did."""


def run_here(function: Callable, *arguments):
    return function(*arguments)


class Workers:
    """`count` processes; 0 of them: the calling thread computes. A context manager.

    They end with it and with this process, however that ends. Their modules should be quick to import.

    Args:
        ignored: signals that are not theirs to obey, as a scheduler sends its own to every process of a job.
    """

    def __init__(self, count: int, ignored: Sequence[signal.Signals] = ()):
        self._pool = None
        if count:
            # Not by fork: neither the threads of XLA nor its devices outlive one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(tuple(ignored),))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable, *arguments):
        """See `Run`. Raises BrokenProcessPool once a process has died."""
        return self._pool.submit(function, *arguments).result() if self._pool else function(*arguments)


def _begin(ignored: tuple[signal.Signals, ...]) -> None:
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
