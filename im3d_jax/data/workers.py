"""Processes that do work which would hold Python's lock in the threads of a loader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")

Run = Callable[..., Any]
"""Calls its first argument with the others, here or in another process. Returns or raises what that does."""


def run_here(function: Callable[..., R], *arguments: Any) -> R:
    """A `Run` in the calling thread."""
    return function(*arguments)


class Workers:
    """A context manager that holds `count` processes. With a count of 0, the calling thread does the work.

    The processes end with the `with` block, and with this process however that ends. The modules that they
    import should be quick to load.

    Args:
        ignored: signals that the processes ignore. A scheduler sends some signals to every process of a job.
    """

    def __init__(self, count: int, ignored: Sequence[signal.Signals] = ()):
        self._pool = None
        if count:
            # A forked process would lose the threads and devices of XLA.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, initializer=begin, initargs=(tuple(ignored),))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., R], *arguments: Any) -> R:
        """See `Run`. Raises BrokenProcessPool once a process has died."""
        return self._pool.submit(function, *arguments).result() if self._pool else function(*arguments)


def begin(ignored: tuple[signal.Signals, ...]) -> None:
    """Arranges the signals of a worker process, and that it ends with its parent, however that ends."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
