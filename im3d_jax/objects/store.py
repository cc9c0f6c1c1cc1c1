"""What lies below a URL: lists, reads and writes objects, and tries again where a store does not answer.

fsspec speaks to the store. Its own retries are switched off, so that those here bound the time.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from im3d_jax.objects.urls import Url
from recon_torch.errors import UserError, first_line
from recon_torch.files import refusal

T = TypeVar("T")

TRIES = 8
"""So often a call is tried: for about a minute in all, if the store answers at once that it cannot."""

FIRST_TRIES = 3
"""The same for the first call, which shows whether there is a store at all."""

PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
"""Before the second try, doubled from one to the next; a random part of it is left out."""

OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }
    },
    "file": {"auto_mkdir": True},
}
"""Of fsspec's file systems, by their schemes."""

PACKAGES = {"s3": 'pip install "im3d[storage]"', "gs": "pip install gcsfs", "gcs": "pip install gcsfs"}

NO_BUCKET = re.compile(r"bucket.*(not exist|not found)", re.IGNORECASE)
NO_RIGHTS = re.compile(r"credential|token|auth|forbidden|permission", re.IGNORECASE)
TIMES = ("LastModified", "updated", "last_modified", "mtime", "created")
"""What the file systems call the time at which an object was written."""


class Entry(NamedTuple):
    """An object in a list: bytes, and the time at which it was written by the clock of the store."""

    size: int
    mtime_ns: int


class ObjectStore:
    """The objects below a URL, by their names relative to it. Many threads may use it."""

    def __init__(self, url: Url, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises UserError if the package for this kind of store is not installed."""
        self.url = url
        self._sleep = sleep
        self._fs = _file_system(url)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[Url]]:
        return ObjectStore, (self.url,)

    # ---- What is there ----

    def tree(self, folder: str = "", prefix: str = "", tries: int = TRIES) -> dict[str, Entry]:
        """The objects in a folder and all below it, by their names relative to the folder.

        prefix: only those whose relative names begin so.
        """
        whole = self._path(folder)
        only = {"prefix": prefix} if prefix and _takes_prefix(self._fs) else {}
        try:
            found = self._call("list", folder, lambda: self._fs.find(whole, detail=True, **only), tries)
        except FileNotFoundError:
            return {}
        return self._entries(whole, found.values(), prefix)

    def files(self, folder: str = "", tries: int = TRIES) -> dict[str, Entry]:
        """The same without what lies in folders of the folder."""
        whole = self._path(folder)
        return self._entries(whole, self._look(folder, tries), "")

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""
        found = self._look(folder, TRIES)
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found if _is_folder(each))

    def stat(self, name: str) -> Entry | None:
        """An object; None if it is not there."""
        try:
            return _entry(self._call("look at", name, lambda: self._fs.info(self._path(name))))
        except FileNotFoundError:
            return None

    def _look(self, folder: str, tries: int) -> list[dict[str, Any]]:
        try:
            return self._call(
                "list", folder, lambda: self._fs.ls(self._path(folder), detail=True, refresh=True), tries
            )
        except FileNotFoundError:
            return []

    def _entries(self, whole: str, found: Any, prefix: str) -> dict[str, Entry]:
        root = self._fs._strip_protocol(whole).rstrip("/") + "/"  # noqa: SLF001 - fsspec has no other name for it
        named = {each["name"].removeprefix(root): each for each in found if not _is_folder(each)}
        # A store may hold an object whose name is that of the folder.
        return {name: _entry(each) for name, each in named.items() if name and name.startswith(prefix)
                and each["name"].startswith(root)}  # fmt: skip

    # ---- To and fro ----

    def read(self, name: str, tries: int = TRIES) -> bytes:
        """Raises FileNotFoundError for an object that is not there."""
        return self._call("read", name, lambda: self._fs.cat_file(self._path(name)), tries)

    def get(self, name: str, path: Path) -> None:
        """Writes an object's content to a file. Raises FileNotFoundError if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._call("read", name, lambda: self._fs.get_file(self._path(name), str(path)))

    def write(self, name: str, content: bytes, tries: int = TRIES) -> None:
        self._call("write", name, lambda: self._fs.pipe_file(self._path(name), content), tries)

    def put(self, path: Path, name: str) -> None:
        """Writes a file's content, with the type of content that its suffix says where the store keeps it."""
        self._call("write", name, lambda: self._fs.put_file(str(path), self._path(name)))

    def remove(self, name: str, tries: int = TRIES) -> None:
        """An object that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._call("remove", name, lambda: self._fs.rm_file(self._path(name)), tries)

    def _path(self, name: str) -> str:
        return str(self.url / name if name else self.url)

    def _call(self, verb: str, name: str, function: Callable[[], T], tries: int = TRIES) -> T:
        """What a function returns, tried again while the store does not answer.

        Raises FileNotFoundError if something to be read is not there, and UserError for all else.
        """
        what = self._path(name)
        for number in range(tries):
            try:
                return function()
            except Exception as error:  # each store has errors of its own
                is_absent = isinstance(error, FileNotFoundError) and not NO_BUCKET.search(str(error))
                is_bug = isinstance(error, TypeError | AttributeError | KeyError)
                if is_bug or (is_absent and verb != "write"):
                    raise
                if problem := _problem(self.url, error):
                    raise UserError(f"cannot {verb} {what}: {problem}") from error
                if number == tries - 1:
                    tried = f"tried {tries} times; give the same command again when it answers"
                    raise UserError(f"cannot {verb} {what}: {first_line(error, 200)}; {tried}") from error
            pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2**number)
            self._sleep(pause_s * random.uniform(0.5, 1))
        raise AssertionError("tries is positive")


def _file_system(url: Url) -> Any:
    import fsspec

    given = dict(fsspec.config.conf.get(url.scheme, {}))
    options = {
        "skip_instance_cache": True,
        "use_listings_cache": False,
        **OPTIONS.get(url.scheme, {}),
        **given,
    }
    try:
        found = fsspec.filesystem(url.scheme, **options)
    except ImportError as error:
        install = PACKAGES.get(url.scheme, first_line(error))
        raise UserError(f"{url.scheme}:// needs a package that is not installed: {install}") from None
    except Exception as error:
        raise UserError(f"{url}: {first_line(error, 200)}") from None
    if hasattr(found, "retries"):
        found.retries = 1
    return found


def _takes_prefix(fs: Any) -> bool:
    return "prefix" in inspect.signature(getattr(fs, "_find", fs.find)).parameters


def _problem(url: Url, error: Exception) -> str:
    """Why a call fails however often it is tried; "" if it may not."""
    bucket = url.path.partition("/")[0]
    if isinstance(error, FileNotFoundError):
        return f"the bucket {bucket} does not exist; make it, or correct the URL"
    if isinstance(error, PermissionError) or NO_RIGHTS.search(type(error).__name__):
        return (
            f"no permission ({first_line(error, 160)}); check the credentials and the rights of their owner"
        )
    if isinstance(error, NotImplementedError):
        return f"{url.scheme}:// does not allow it; give another place"
    return refusal(error) or ""


def _is_folder(found: dict[str, Any]) -> bool:
    return found["type"] == "directory" or found["name"].endswith("/")


def _entry(found: dict[str, Any]) -> Entry:
    when = next((found[key] for key in TIMES if found.get(key) is not None), 0)
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        aware = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        whole_s = int(aware.replace(microsecond=0).timestamp())
        return Entry(int(found["size"]), whole_s * 10**9 + aware.microsecond * 1000)
    return Entry(int(found["size"]), round(when * 1e6) * 1000)
