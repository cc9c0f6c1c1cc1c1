"""URLs of objects, where else a path stands."""

from __future__ import annotations

import os
import posixpath
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from recon_torch.errors import UserError, is_url, quoted


class Url(NamedTuple):
    """Where an object lies, or what the names of several begin with.

    Attributes:
        scheme: of the store, such as "s3". path: bucket and key, without a "/" at the end.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> Url:
        return self._replace(path=f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1]

    @property
    def parent(self) -> Url:
        return self._replace(path=posixpath.dirname(self.path))


def parse(text: str) -> Url:
    """The URL that a text is. Raises UserError for an unknown scheme, and if there is no bucket."""
    from fsspec.registry import known_implementations

    scheme, _, path = text.partition("://")
    scheme, path = scheme.lower(), path.rstrip("/")
    if scheme not in known_implementations:
        raise UserError(f"{quoted(text)} has an unknown scheme {scheme!r}; give one such as s3:// or gs://")
    if not path or (path.startswith("/") and scheme not in ("file", "local", "memory")):
        raise UserError(f"{quoted(text)} names no bucket; write {scheme}://BUCKET/NAME")
    if "::" in text or any(part in (".", "..") for part in path.split("/")) or not path.isprintable():
        raise UserError(f"{quoted(text)} is no plain URL; leave out '::', '.' and '..'")
    return Url(scheme, path)


def path_or_url(text: str) -> Path | Url:
    """The type of a flag that takes either."""
    if not text:
        raise ArgumentTypeError("the path is empty; is a variable of your shell not set?")
    try:
        return parse(text) if is_url(text) else Path(text)
    except UserError as error:  # of which argparse would keep no word
        raise ArgumentTypeError(str(error)) from None


def beside(folder: Path | Url, name: str) -> str:
    """The path or URL that a file in a folder means by a relative name, or by a whole one."""
    if is_url(name):
        return str(parse(name))
    if isinstance(folder, Path) or os.path.isabs(name):
        return str(folder / name) if isinstance(folder, Path) else name
    path = posixpath.normpath(posixpath.join(folder.path, name))
    if path.startswith(".."):
        raise UserError(f"{quoted(name)} leads out of {folder}")
    return str(folder._replace(path=path))


def absolute(path: str | Path | Url) -> str:
    """A path that does not depend on the working directory; a URL as it is."""
    return str(path) if is_url(str(path)) else os.path.abspath(str(path))
