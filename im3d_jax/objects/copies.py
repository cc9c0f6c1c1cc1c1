"""Local copies of what URLs name, for all that reads files: prompts and pictures, and weights.

A path is given back as it is. The copy of a URL is removed after use. That of weights lies in the user's
cache ($XDG_CACHE_HOME/im3d, by default ~/.cache/im3d) from one process to the next, until the object changes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from im3d_jax.objects.store import FIRST_TRIES, ObjectStore
from im3d_jax.objects.urls import Url, parse
from recon_torch import locks
from recon_torch.errors import UserError, is_url
from recon_torch.files import make_directory, replacing

PATIENCE_S = 3600.0
"""So long a process waits for another one to fetch the same weights."""


@contextlib.contextmanager
def local(path: str | Path | Url, keep: bool = False) -> Iterator[Path]:
    """The file of a path, or a local copy of what a URL names; errors within name the URL.

    keep: as weights are kept, see above.

    Raises UserError if nothing is there, or the store does not answer.
    """
    if not is_url(str(path)):
        yield Path(str(path))
        return
    url = path if isinstance(path, Url) else parse(str(path))
    with contextlib.ExitStack() as stack:
        copy = _kept(url) if keep else _fetch(url, stack.enter_context(_folder()) / url.name)
        try:
            yield copy
        except UserError as error:
            error.args = (str(error).replace(str(copy), str(url)),)
            raise


class Presence:
    """Tells whether files are there. Of URLs, a folder is listed once for all files in it."""

    def __init__(self) -> None:
        self._names: dict[Url, set[str]] = {}

    def __call__(self, path: str) -> bool:
        if not is_url(path):
            return os.path.isfile(path)
        url = parse(path)
        if url.parent not in self._names:
            self._names[url.parent] = set(_store(url.parent).files(tries=FIRST_TRIES))
        return url.name in self._names[url.parent]


@functools.lru_cache(64)
def _store(folder: Url) -> ObjectStore:
    return ObjectStore(folder)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=locks.process_directory()) as folder:
        yield Path(folder)


def _kept(url: Url) -> Path:
    """A copy that lasts until the object changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "im3d" / _digest(str(url))
    entry = _store(url.parent).stat(url.name)
    if entry is None:
        raise UserError(f"there is nothing at {url}; correct the URL")
    path = make_directory(cache) / _digest(repr(entry)) / url.name
    with locks.hold(cache, patience_s=PATIENCE_S):
        if not path.exists():
            for earlier in cache.iterdir():
                if earlier.is_dir():
                    shutil.rmtree(earlier, ignore_errors=True)
            _fetch(url, path)
    return path


def _fetch(url: Url, path: Path) -> Path:
    with replacing(path) as temporary:
        try:
            _store(url.parent).get(url.name, temporary)
        except FileNotFoundError:
            raise UserError(f"there is nothing at {url}; correct the URL") from None
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
