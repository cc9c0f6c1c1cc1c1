"""Leases: who works on what below a URL, where there are no file locks.

    with held(store, "0-of-4", is_rival, lost):    # refused while another process holds a rival
        ...

A lease is an object of its own name, which its holder writes again every few seconds. Whoever wants one
writes it first, and then looks for rivals: of two that come at the same time, at least one sees the other and
withdraws. That takes no conditional writes, only lists that show what was written before, as S3, Google
Cloud Storage and Azure promise. A lease that was not written for `EXPIRY_S` by the clock of the store has
expired, and so has that of a process which has ended, if it ran on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from im3d_jax.objects.store import Entry, ObjectStore
from recon_torch.errors import UserError
from recon_torch.locks import Holder, InUse, started

FOLDER = ".im3d-leases"

BEAT_S, EXPIRY_S = 10.0, 60.0
"""Between two times that a lease is written, and how old one may become."""

LATE_S = 40.0
"""A holder that has not managed to write its lease for so long asks for it anew: it may be another's."""

TURN_S, LONG_TURN_S = 0.3, 1.0
"""About so long one waits who has met another: one that came at the same time, and one that stays."""


class Times(NamedTuple):
    """See the constants of these names."""

    beat_s: float = BEAT_S
    expiry_s: float = EXPIRY_S
    late_s: float = LATE_S
    turn_s: float = TURN_S


class Rival(NamedTuple):
    """Another lease: its object, and who holds it."""

    key: str
    entry: Entry
    holder: Holder | None
    machine: str = ""

    def __str__(self) -> str:
        return str(self.holder) if self.holder else "another process"

    @property
    def has_ended(self) -> bool:
        """Whether it is of a process of this machine that is no more."""
        if self.holder is None or self.machine != machine():
            return False
        return started(self.holder.pid) != self.holder.started


TIMES = Times()


@contextlib.contextmanager
def held(
    store: ObjectStore,
    name: str,
    is_rival: Callable[[str], bool],
    lost: Callable[[], None] = lambda: None,
    patience_s: float | None = None,
    times: Times | None = None,
) -> Iterator[str]:
    """Holds a lease. Yields the name of its object.

    Args:
        name: of what is held, without a dot. is_rival: whether another one of a name excludes it.
        lost: called from another thread if the lease has gone to another process.
        patience_s: so long a rival is waited for. Default: until it is seen that its holder lives.

    Raises InUse, which names the holder, and UserError where the store cannot be written to, and at the end
    if the lease has gone to another process.
    """
    times = times or TIMES
    lease = Lease(store, name, is_rival, times)
    lease.take(patience_s)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(lease, ended, lost), daemon=True)
    beat.start()
    try:
        yield lease.key
    finally:
        ended.set()
        beat.join()
        lease.withdraw()
    if lease.winner:
        raise UserError(
            f"{store.url} went to {lease.winner}, because nothing could be written there for"
            f" {times.expiry_s:.0f} s; what was made until then is there"
        )


def held_now(store: ObjectStore) -> dict[str, str]:
    """The names of leases that have not expired by the clock of this machine -> who holds each."""
    found = {rival.key: rival for rival in _read_all(store, lambda name: True)}
    now_ns = time.time_ns()
    return {
        name_of(key): str(rival)
        for key, rival in found.items()
        if not rival.has_ended and now_ns - rival.entry.mtime_ns < TIMES.expiry_s * 1e9
    }


def name_of(key: str) -> str:
    """The name of what a lease's object holds."""
    return key.rpartition("/")[2].partition(".")[0]


class Lease:
    """See `held`.

    Attributes:
        key: the name of its object, which no other lease ever has. winner: who has it, if it was lost.
    """

    def __init__(self, store: ObjectStore, name: str, is_rival: Callable[[str], bool], times: Times) -> None:
        self._store, self._name, self._is_rival, self.times = store, name, is_rival, times
        self._content = _record()
        self._written = time.monotonic()
        self.key = self._new_key()
        self.winner: Rival | None = None

    def take(self, patience_s: float | None) -> None:
        """Raises InUse as `held` does."""
        until = None if patience_s is None else time.monotonic() + patience_s
        seen: dict[str, int] = {}  # when each rival was written
        pause_s = self.times.turn_s
        while rival := self._take_once():
            self.withdraw()
            lives = until is None and rival.entry.mtime_ns != seen.setdefault(rival.key, rival.entry.mtime_ns)
            if lives or (until is not None and time.monotonic() > until):
                wait = "wait until it ends, or choose another place"
                raise InUse(f"{self._store.url} is in use by {rival}; {wait}")
            if until is None and len(seen) == 1 and pause_s > LONG_TURN_S:
                print(f"im3d: looking whether {rival} still lives", file=sys.stderr, flush=True)
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(1.5 * pause_s, 2 * LONG_TURN_S)
            self.key = self._new_key()  # or others who wait would take this one for that of a holder

    def write_again(self) -> None:
        """Shows that the holder lives. Sets `winner` if it comes so late that another has taken its place."""
        if time.monotonic() - self._written < self.times.late_s:
            self._write(tries=1)
            return
        before, self.key = self.key, self._new_key()
        self.winner = self._take_once()
        self._store.remove(before, tries=1)
        if self.winner:
            self.withdraw()

    def withdraw(self) -> None:
        with contextlib.suppress(UserError):  # it expires
            self._store.remove(self.key, tries=2)

    def _take_once(self) -> Rival | None:
        """Writes the lease, and returns a rival if there is one. Removes those that have expired."""
        self._write()
        now = self._store.stat(self.key)
        for rival in _read_all(self._store, self._is_rival, but=self.key):
            age_ns = (now.mtime_ns if now else 0) - rival.entry.mtime_ns
            if not rival.has_ended and age_ns < self.times.expiry_s * 1e9:
                return rival
            self._store.remove(rival.key)
        return None

    def _write(self, tries: int = 3) -> None:
        begun = time.monotonic()
        self._store.write(self.key, self._content, tries=tries)
        self._written = begun

    def _new_key(self) -> str:
        return f"{FOLDER}/{self._name}.{secrets.token_hex(8)}.json"


def _beat(lease: Lease, ended: threading.Event, lost: Callable[[], None]) -> None:
    while not ended.wait(lease.times.beat_s):
        with contextlib.suppress(UserError, FileNotFoundError):  # the next time, then
            lease.write_again()
        if lease.winner:
            lost()
            return


def _read_all(store: ObjectStore, is_rival: Callable[[str], bool], but: str = "") -> list[Rival]:
    found = []
    for name, entry in store.files(FOLDER).items():
        key = f"{FOLDER}/{name}"
        if key != but and is_rival(name_of(key)):
            with contextlib.suppress(FileNotFoundError):  # it was withdrawn meanwhile
                found.append(Rival(key, entry, *_told(store.read(key))))
    return found


def _record() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = Holder(socket.gethostname(), os.getpid(), started(os.getpid()), since)
    return json.dumps({**holder._asdict(), "machine": machine()}).encode()


def _told(content: bytes) -> tuple[Holder | None, str]:
    try:
        told = json.loads(content)
        return Holder(*(told[name] for name in Holder._fields)), str(told["machine"])
    except (ValueError, LookupError, TypeError):
        return None, ""


def machine() -> str:
    """Tells a machine since its start, and a container in it, from others: processes are numbered in each."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return secrets.token_hex(8)  # like no other: its leases expire
