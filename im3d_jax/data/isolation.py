"""Work on many named items, of which none may stop the rest: in processes that may die, and are replaced.

A mesh of a collection of 100k may exhaust the memory, crash a library written in C or never end. The item
that a process was at when it died has failed, and a new process goes on with the next one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from enum import StrEnum
from multiprocessing import connection
from typing import Any, NamedTuple

from im3d_jax.data.workers import begin
from recon_torch.errors import UserError, first_line

GRACE_S = 30.0  # how long a process may take to finish its item when all is over


class Reason(StrEnum):
    """Why an item failed.

    UNUSABLE: a user's mistake, named by a UserError. MEMORY: there was not enough of it. KILLED: its process
    died. TIMEOUT: it took too long. FAULT: any other error, whose traceback is on stderr.
    """

    UNUSABLE = "unusable"
    MEMORY = "memory"
    KILLED = "killed"
    TIMEOUT = "timeout"
    FAULT = "fault"


TRANSIENT = (Reason.MEMORY, Reason.KILLED)
"""Reasons that may lie in what else ran on the machine, so that another attempt is worth its time."""


class Failure(NamedTuple):
    """The last of an item's attempts, which failed. message: one line."""

    reason: Reason
    message: str
    attempts: int = 1


class Outcome(NamedTuple):
    """An item with its failure, or None if it succeeded."""

    name: str
    failure: Failure | None


Work = Callable[[str], Failure | None]
"""Does what is to be done for one item. A UserError that it raises stops all of the work."""


def attempt(function: Callable[..., Any], *arguments: Any) -> Any | Failure:
    """What a function returns, or the `Failure` that its exception stands for."""
    try:
        return function(*arguments)
    except UserError as error:
        return Failure(Reason.UNUSABLE, str(error))
    except MemoryError as error:
        return Failure(Reason.MEMORY, f"not enough memory ({first_line(error, 200)})")
    except Exception as error:  # whatever a mesh from anywhere brings about, the others are not to suffer
        traceback.print_exc()
        return Failure(Reason.FAULT, f"{type(error).__name__}: {first_line(error, 200)}")


def run_all(
    make: Callable[..., Work],
    arguments: Sequence[Any],
    names: Sequence[str],
    *,
    jobs: int,
    retries: int = 1,
    timeout_s: float = 0.0,
) -> Generator[Outcome, None, None]:
    """Works on every item, and yields how each of them ended, in the order in which they end.

    Args:
        make: called with `arguments` once in every process, where it returns what does the work. All of
            these must be picklable.
        jobs: the number of processes. 0 does the work in this one, which nothing then protects.
        retries: further attempts at an item that failed for one of the reasons that are `TRANSIENT`.
        timeout_s: an item that takes longer fails, if `jobs` is not 0; 0 stands for no limit.

    Raises UserError if `make` or the work does, or if a process dies before its first item.
    """
    queue = deque((name, 1) for name in names)
    if not jobs:
        work = make(*arguments)
        while queue:
            name, number = queue.popleft()
            yield from _ended(name, number, work(name), queue, retries)
        return
    children = [_Child(make, arguments) for _ in range(min(jobs, len(names)))]
    try:
        while queue or any(child.name for child in children):
            for child in children:
                if child.is_ready and not child.name and queue:
                    child.start(*queue.popleft())
                elif child.is_late(timeout_s):
                    child.process.kill()
            waiting = [child.pipe for child in children if child.name or not child.is_ready]
            found = connection.wait(waiting, timeout=1.0 if timeout_s else None)
            for number, child in enumerate(children):
                if child.pipe not in found:
                    continue
                name, tries = child.name, child.attempt
                failure = child.receive(timeout_s)
                if name:
                    yield from _ended(name, tries, failure, queue, retries)
                if child.is_dead:
                    children[number] = _Child(make, arguments)
    finally:
        _end(children)


def _end(children: Sequence[_Child]) -> None:
    """Lets the processes finish their items, and ends those that take longer than `GRACE_S`."""
    for child in children:
        child.pipe.close()  # which ends a process once its item is done
    until = time.monotonic() + GRACE_S
    for child in children:
        child.process.join(max(0.0, until - time.monotonic()))
        child.process.kill()
        child.process.join()


def _ended(
    name: str, number: int, failure: Failure | None, queue: deque[tuple[str, int]], retries: int
) -> Iterator[Outcome]:
    """The outcome of attempt `number` at an item, unless the item goes into the queue again."""
    if failure and failure.reason in TRANSIENT and number <= retries:
        queue.append((name, number + 1))
    else:
        yield Outcome(name, failure and failure._replace(attempts=number))


class _Child:
    """A process as its parent sees it.

    Attributes:
        is_ready: it has made what does the work.
        is_dead: it has ended; another one is to take its place.
        name: of its item; "" if it has none.
        attempt: which attempt at the item this is, from 1.
    """

    def __init__(self, make: Callable[..., Work], arguments: Sequence[Any]):
        context = multiprocessing.get_context("spawn")  # a fork would lose the threads of XLA
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, tuple(arguments)), daemon=True)
        self.process.start()
        other.close()
        self.is_ready = self.is_dead = self._timed_out = False
        self.name, self.attempt, self._since = "", 0, 0.0

    def start(self, name: str, attempt: int) -> None:
        self.name, self.attempt, self._since = name, attempt, time.monotonic()
        with contextlib.suppress(OSError):  # it died between two items; the end of the pipe will say so
            self.pipe.send(name)

    def is_late(self, timeout_s: float) -> bool:
        late = bool(timeout_s and self.name and time.monotonic() - self._since > timeout_s)
        self._timed_out |= late
        return late

    def receive(self, timeout_s: float) -> Failure | None:
        """How its item ended, or how it did itself. Raises UserError if that stops all of the work."""
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionError):
            return self._died(timeout_s)
        if isinstance(message, str):
            raise UserError(message)
        self.is_ready, self.name = True, ""
        return message

    def _died(self, timeout_s: float) -> Failure:
        self.process.join()
        self.pipe.close()
        self.is_dead = True
        code = self.process.exitcode or 0
        if not self.is_ready:
            raise UserError(f"a process of --jobs ended with code {code} before its first object; see above")
        if self._timed_out:
            return Failure(Reason.TIMEOUT, f"it took longer than {timeout_s:g} s")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Failure(Reason.KILLED, f"its process {how}")


def _serve(pipe: connection.Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """The life of a process: it says that it is ready, and then how each item ended. A string stops all."""
    begin((signal.SIGINT,))  # Ctrl-C is the parent's affair
    try:
        work = make(*arguments)
        pipe.send(None)
        while True:
            pipe.send(work(pipe.recv()))
    except UserError as error:
        with contextlib.suppress(OSError):  # another process has stopped all of the work before
            pipe.send(str(error))
    except (EOFError, ConnectionError):
        sys.exit(0)
