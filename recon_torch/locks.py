"""Locks that die with their process: who works in a directory, and what dead processes have left behind.

    with hold(workdir):            # refused while another process, on whatever host, holds it
        with OwnedDirectory(".im3d_", workdir) as staging:
            ...
    clear(workdir, ".im3d_")       # what killed processes left there; that of living ones stays

A lock is `flock` on a file, which the kernel gives back however the process ends, and which NFS and most
cluster file systems pass on to other hosts. The file says who holds it. Where a file system has no locks,
that is all there is: a process of this host is looked up, and one of another host is warned of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import multiprocessing.util
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from recon_torch.errors import UserError

LOCK = ".im3d.lock"
PART_LOCK = re.compile(r"\.im3d-(\d+)-of-(\d+)\.lock")
OWNER = ".owner.lock"
"""The file in an `OwnedDirectory` that its owner holds."""

PROCESS = "im3d_"
"""How the names of the directories for temporary files begin."""

MAX_SOCKET_DIRECTORY = 60
"""The longest directory of sockets: their paths may have 107 characters, of which theirs takes about 40."""

AFTER_SOCKETS = -200
"""At a process's end `multiprocessing` removes its sockets at priority -100, and expects them to be there."""

PATIENCE_S = 1.0
"""A lock that is taken is asked for again so long: others hold it for a moment to see whether it is held."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What file systems without locks answer."""

_held: dict[str, int] = {}  # path of a lock -> the thread that holds it
_guard = threading.Lock()


class InUse(UserError):
    """Another process holds what was to be held."""


class State(Enum):
    """Whose a lock is. UNKNOWN: of a process on another host, and the file system has no locks."""

    OURS = "ours"
    TAKEN = "taken"
    UNKNOWN = "unknown"


class Holder(NamedTuple):
    """A process. started: ticks since the boot, which tell it from a later one with its number."""

    host: str
    pid: int
    started: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextlib.contextmanager
def hold(directory: str | os.PathLike, name: str = LOCK, patience_s: float | None = None) -> Iterator[None]:
    """Holds a directory, which must exist. A thread that holds it already may do so again within.

    patience_s: so long a lock that is taken is asked for again; default: `PATIENCE_S`.

    Raises InUse, a UserError which names host and process, if another one holds it.
    """
    path = Path(os.path.realpath(directory), name)
    with _guard:
        is_again = _held.get(str(path)) == threading.get_ident()
    if is_again:
        yield
        return
    lock = _acquire(path, Path(directory), PATIENCE_S if patience_s is None else patience_s)
    with _guard:
        _held[str(path)] = threading.get_ident()
    try:
        yield
    finally:
        with _guard:
            del _held[str(path)]
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)


@contextlib.contextmanager
def hold_part(directory: str | os.PathLike, number: int, count: int) -> Iterator[None]:
    """Holds part `number`, from 0, of `count`, to which the items number, number + count, ... belong.

    Processes that hold other parts may work in the directory, too. Raises UserError if another process holds
    a part that has items in common with this one, also of another count.
    """
    own = f".im3d-{number}-of-{count}.lock"
    with hold(directory, own):
        for path in sorted(Path(directory).iterdir()):
            match = PART_LOCK.fullmatch(path.name)
            if match is None or path.name == own:
                continue
            other, other_count = int(match[1]), int(match[2])
            overlap = (other - number) % math.gcd(count, other_count) == 0
            if overlap and (holder := _holder(path)):
                raise InUse(
                    f"part {number}/{count} of {directory} shares items with {other}/{other_count}, which"
                    f" {holder} works on; wait until it ends, or give other parts"
                )
        yield


def parts_at_work(directory: str | os.PathLike) -> dict[tuple[int, int], str]:
    """(number, count) of the parts of a directory that processes hold, see `hold_part` -> who holds each."""
    matches = ((path, PART_LOCK.fullmatch(path.name)) for path in Path(directory).iterdir())
    found = {(int(match[1]), int(match[2])): _holder(path) for path, match in matches if match}
    return {part: str(holder) for part, holder in found.items() if holder}


class OwnedDirectory:
    """A new directory that is removed by `cleanup`, at the end of the process, or after its death by `clear`.

    It is a context manager that yields its path.
    """

    def __init__(self, prefix: str, parent: str | os.PathLike | None = None) -> None:
        """Raises OSError. parent: default: the system's directory for temporary files."""
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._remove = multiprocessing.util.Finalize(
            self, shutil.rmtree, (self.path, True), exitpriority=AFTER_SOCKETS
        )
        # It gets its name when it is locked, so that nobody meets it without an owner.
        handle, name = tempfile.mkstemp(dir=self.path)
        _lock(handle)
        _write(handle)
        os.replace(name, self.path / OWNER)
        self._lock: int | None = handle

    def cleanup(self) -> None:
        """Removes the directory."""
        self._remove()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.cleanup()


def process_directory() -> Path:
    """This process's directory for temporary files, which it removes at its end.

    The first call clears what dead processes have left, and lets the sockets of `multiprocessing` lie there,
    too, because those of a process that was killed would be left otherwise.
    """
    with _guard:
        return _process_directory(os.getpid(), tempfile.gettempdir()).path


@functools.cache
def _process_directory(pid: int, parent: str) -> OwnedDirectory:
    clear(parent, PROCESS)
    own = OwnedDirectory(PROCESS, parent)
    if len(str(own.path)) < MAX_SOCKET_DIRECTORY:
        before, tempfile.tempdir = tempfile.tempdir, str(own.path)
        try:
            multiprocessing.util.get_temp_dir()  # is made now, and kept by `multiprocessing`
        finally:
            tempfile.tempdir = before
    return own


def lock_file(handle: int) -> None:
    """Marks an open file as one of a living process, for `clear`."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def clear(directory: str | os.PathLike, prefix: str) -> int:
    """Removes what dead processes left in a directory, and says so on stderr. Returns how many there were.

    prefix: of the names of `OwnedDirectory`s and, if it is hidden, of files that `lock_file` has marked.
    """
    removed = 0
    with contextlib.suppress(OSError):
        for path in sorted(Path(directory).iterdir()):
            if path.name.startswith(prefix) and not path.is_symlink():
                removed += _clear_directory(path) if path.is_dir() else _clear_file(path, prefix)
    if removed:
        what = "what a killed run left" if removed == 1 else f"{removed} things that killed runs left"
        print(f"im3d: removed {what} in {directory}", file=sys.stderr, flush=True)
    return removed


def _clear_directory(path: Path) -> bool:
    if not os.path.isfile(path / OWNER) or _holder(path / OWNER):  # that of another user cannot be read
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _clear_file(path: Path, prefix: str) -> bool:
    is_ours = prefix.startswith(".") and re.fullmatch(re.escape(prefix) + r"[a-z0-9_]{8}(\.\w+)?", path.name)
    if not is_ours or not path.is_file() or _holder(path, has_record=False):
        return False
    path.unlink(missing_ok=True)
    return True


def _acquire(path: Path, directory: Path, patience_s: float) -> int:
    """The open file of a lock that is ours now."""
    until = time.monotonic() + patience_s
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"cannot lock {path} ({error.strerror}); choose another place") from None
        state = _lock(handle)
        if state is not State.TAKEN and _is_there(handle, path):
            break
        holder = _read(handle)
        os.close(handle)
        if state is State.TAKEN and time.monotonic() > until:
            who = str(holder) if holder else "another process"
            raise InUse(f"{directory} is in use by {who}; wait until it ends, or choose another place")
        time.sleep(0.05)
    if state is State.UNKNOWN:
        print(
            f"im3d: warning: {directory} was last used by {_read(handle)}, and its file system cannot tell"
            " whether that still runs",
            file=sys.stderr,
        )
    _write(handle)
    return handle


def _lock(handle: int) -> State:
    """Takes the lock on an open file, if it is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return State.OURS
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return State.TAKEN
    return _by_record(_read(handle))


def _by_record(holder: Holder | None) -> State:
    """Whose a lock is, by what its file says: all there is where the file system has no locks."""
    if holder is None:
        return State.OURS
    if holder.host != socket.gethostname():
        return State.UNKNOWN
    return State.TAKEN if started(holder.pid) == holder.started else State.OURS


def _holder(path: Path, has_record: bool = True) -> Holder | str | None:
    """Who holds the lock on a file; None if nobody does."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError:  # it belongs to another user
        return "another user"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        holder = _read(handle) if has_record else None
        if error.errno in NO_LOCKS and has_record and _by_record(holder) is State.OURS:
            return None
        return holder or "another process"
    finally:
        os.close(handle)


def _is_there(handle: int, path: Path) -> bool:
    """Whether an open file still has its name: its last holder may have removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _read(handle: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(handle, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _write(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = Holder(socket.gethostname(), os.getpid(), started(os.getpid()), since)
    with contextlib.suppress(OSError):  # a full disk; the lock itself holds
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder._asdict()).encode(), 0)


def started(pid: int) -> str:
    """When a process of this host started, in ticks since the boot; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
