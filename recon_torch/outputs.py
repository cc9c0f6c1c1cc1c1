"""Directories that a user names for output: what of it is ours to replace, and what is left alone.

    ASSET = Kind("generate", ("asset[.]ply", "images/[0-9]{3,}[.]png", "report[.]json"))

    with opened(out, ASSET, inputs=[picture]):    # before anything that takes long; refuses, or holds `out`
        ...
        with owned(out) as staging:
            ...                                   # writes all files
            replace(staging, out, ASSET, last="report.json")

A file is ours if an earlier run has noted it in the directory's `.im3d.json`, with the digest of what it
wrote: a file that a user has put there or has changed is not. Such a file in a place where we would write,
and a symbolic link, is refused by name before the work begins. Whatever lies elsewhere stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.files import TEMPORARY, make_directory, refusal, write_json

MARKER = ".im3d.json"

Digests = dict[str, list[str]]
"""The files of a kind by their paths: the SHA-256 that they may have. There are two while one is replaced."""


class Kind(NamedTuple):
    """What a command writes into a directory.

    Attributes:
        command: the command's name.
        paths: of what it writes, relative to the directory: a regular expression for each part of a path.
            One that ends with "/" stands for a directory with all that is in it.
        grows: whether files change after they were written, as logs and checkpoints do. They are then ours by
            their names, in a directory in which there were none of them when our first run began.
    """

    command: str
    paths: tuple[str, ...]
    grows: bool = False


@contextlib.contextmanager
def opened(
    directory: str | os.PathLike,
    kind: Kind,
    inputs: Iterable[str | os.PathLike] = (),
    root: str | os.PathLike | None = None,
    part: tuple[int, int] | None = None,
) -> Iterator[Path]:
    """Holds a directory for the output of a command, makes it, and removes it again if it stays empty.

    Clears what killed runs have left in it. Of the arguments, directory, kind, inputs and root are those of
    `check`.

    part: (number, count) of `locks.hold_part`, where several processes share the directory.

    Raises UserError as `check` does, and if another process holds the directory.
    """
    directory = Path(directory)
    _refuse_links(directory, kind, root)
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    make_directory(directory)
    try:
        with locks.hold_part(directory, *part) if part else locks.hold(directory):
            check(directory, kind, inputs)
            for folder in sorted({directory, *_folders(directory, kind)}):
                locks.clear(folder, TEMPORARY)
            if kind.grows:
                claim(directory, kind)
            try:
                yield directory
            finally:
                if part is None:
                    _remove_lone_marker(directory)
    finally:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for each in missing:
                each.rmdir()


def check(
    directory: str | os.PathLike,
    kind: Kind,
    inputs: Iterable[str | os.PathLike] = (),
    root: str | os.PathLike | None = None,
) -> None:
    """Raises UserError if something that is not ours lies where a command would write; it is named.

    Args:
        directory: may not be there yet.
        inputs: files that the command reads, none of which it may replace.
        root: the directory that the user named, if `directory` lies below it: no links lead out of it.
    """
    directory = Path(directory)
    _refuse_links(directory, kind, root)
    if not directory.exists():  # most of the many assets of a batch
        return
    # First what is there, then the marker: a run that begins meanwhile writes its marker first.
    found = list(_found(directory, kind.paths))
    marker = _read(directory)
    for pattern, path, problem in found:
        if problem := problem or _problem(directory, path, pattern, kind, marker):
            raise _in_the_way(path, problem, kind)
    refuse_inputs(directory, kind, inputs)


def refuse_inputs(directory: Path, kind: Kind, inputs: Iterable[str | os.PathLike]) -> None:
    """Raises UserError if a file that a command reads lies where it writes."""
    for given in inputs:
        if _is_written(directory, Path(given), kind):
            raise _in_the_way(Path(given), "is what it is to read", kind)


def check_file(
    path: Path,
    command: str,
    is_ours: Callable[[Path], bool],
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Raises UserError if a command may not write a file that the user has named.

    Args:
        is_ours: whether the content of the file that is there tells that the command wrote it.
        inputs: files that the command reads, none of which it may replace.
    """
    kind = Kind(command, (re.escape(path.name),))
    for _, found, problem in _found(path.parent, kind.paths):
        if problem or not is_ours(found):
            raise _in_the_way(found, problem or "is not of an earlier run", kind)
    refuse_inputs(path.parent, kind, inputs)


def claim(directory: Path, kind: Kind) -> None:
    """Notes that what a kind that grows writes here is ours from now on."""
    marker = _read(directory)
    claimed = list(dict.fromkeys([*marker.get(kind.command, []), *kind.paths]))
    if claimed != marker.get(kind.command):
        _write(directory, {**marker, kind.command: claimed})


def replace(staged: Path, directory: Path, kind: Kind, last: str = "") -> None:
    """Moves files from `staged` to a directory, in place of those of an earlier run of this kind.

    Args:
        staged: a directory on the same file system. Files in it that are not of this kind stay there.
        last: the path of the file that stands for all: it is removed first and comes last.

    Raises UserError as `check` does, and where the system refuses to write.
    """
    check(directory, kind)
    new = {path.relative_to(staged).as_posix(): path for path in files_of(staged, kind)}
    digests = {name: [_digest(path)] for name, path in new.items()}
    noted = _noted(_read(directory), kind)
    there = {path.relative_to(directory).as_posix() for path in files_of(directory, kind)}
    others = {name: each for name, each in noted.items() if not _has_name(name, kind)}
    both = {
        name: noted.get(name, []) + digests.get(name, []) for name in (noted.keys() & there) | digests.keys()
    }
    try:
        _note(directory, kind, others | both)
        _remove(directory, kind, last)
        for name in sorted(new, key=lambda name: (name == last, name)):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new[name], directory / name)
        with contextlib.suppress(UserError):  # a full disk: all files are there, and known as ours
            _note(directory, kind, others | digests)
    except OSError as error:
        raise UserError(f"cannot write into {directory} ({error.strerror}); choose another place") from error


def put(directory: Path, kind: Kind, name: str, write: Callable[[Path], Any]) -> Path:
    """Writes one file of a kind, in place of an earlier one, and leaves the others as they are.

    Args:
        write: writes it to the path that it is given.

    Raises UserError as `check` does, and where the system refuses to write.
    """
    check(directory, Kind(kind.command, (re.escape(name),)))
    make_directory(directory)
    with owned(directory) as staging:
        write(staging / name)
        digest = _digest(staging / name)
        noted = _noted(_read(directory), kind)
        try:
            _note(directory, kind, noted | {name: [*noted.get(name, []), digest]})
            os.replace(staging / name, directory / name)
        except OSError as error:
            raise UserError(
                f"cannot write {directory / name} ({error.strerror}); choose another place"
            ) from error
        _note(directory, kind, noted | {name: [digest]})
    return directory / name


def remove(directory: Path, kind: Kind, last: str = "") -> None:
    """Removes what an earlier run of this kind has written and nobody has changed, beginning with `last`."""
    noted = _noted(_read(directory), kind)
    if any(_has_name(name, kind) for name in noted):
        _remove(directory, kind, last)
        _note(directory, kind, {name: each for name, each in noted.items() if not _has_name(name, kind)})


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[Path]:
    """A directory for files on their way into `directory`. Raises UserError where they cannot be written."""
    try:
        staging = locks.OwnedDirectory(TEMPORARY, directory)
    except OSError as error:
        raise UserError(f"cannot write into {directory} ({error.strerror}); choose another place") from error
    with staging as path:
        try:
            yield path
        except UserError as error:  # names a file where it was to be, not where it was on its way
            error.args = (str(error).replace(f"{path}{os.sep}", f"{directory}{os.sep}"),)
            raise
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
            raise UserError(f"cannot write into {directory} ({reason}); choose another place") from error


# ---- What is there ----


def files_of(directory: Path, kind: Kind) -> list[Path]:
    """The files in a directory that have the names of a kind, whosever they are."""
    return sorted(path for _, path, problem in _found(directory, kind.paths) if not problem)


def _found(directory: Path, patterns: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """(pattern, path, problem) of what has a name that we write; problem: why it cannot be ours, or ""."""
    for pattern in patterns:
        for path, problem in _matching(directory, pattern.split("/")):
            yield pattern, path, problem


def _folders(directory: Path, kind: Kind) -> Iterator[Path]:
    """The directories below one in which a kind has files, as far as they are in order."""
    for pattern, path, problem in _found(directory, kind.paths):
        if not problem:
            yield path if pattern.endswith("/") else path.parent


def _matching(directory: Path, parts: Sequence[str]) -> Iterator[tuple[Path, str]]:
    part, *rest = parts
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):  # `make_directory` has the words for a file
        return
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}); choose another place") from None
    for entry in entries:
        if not re.fullmatch(part, entry.name):
            continue
        path = Path(entry.path)
        if entry.is_symlink():
            yield path, "is a symbolic link"
        elif bool(rest) != entry.is_dir():
            yield path, "is a directory" if entry.is_dir() else "is no directory"
        elif rest in ([], [""]):
            yield path, ""
        else:
            yield from _matching(path, rest)


def _problem(directory: Path, path: Path, pattern: str, kind: Kind, marker: dict[str, Any]) -> str:
    """Why something with a name of ours is not to be replaced; "" if it is ours."""
    if kind.grows:
        return "" if pattern in marker.get(kind.command, []) else "is not of an earlier run"
    name, digest = path.relative_to(directory).as_posix(), _digest(path)
    owners = [command for command in marker if digest in _noted(marker, Kind(command, ())).get(name, [])]
    if kind.command in owners:
        return ""
    return f"is of `im3d {owners[0]}`" if owners else "is not of an earlier run, or was changed since"


def _is_written(directory: Path, given: Path, kind: Kind) -> bool:
    """Whether a file that is read lies where a command writes."""
    whole, root = given.resolve(), directory.resolve()
    if not whole.is_relative_to(root):
        return False
    return _has_name(whole.relative_to(root).as_posix(), kind)


def _has_name(name: str, kind: Kind) -> bool:
    """Whether a kind writes a file of this path."""
    return any(
        re.match(pattern, name) if pattern.endswith("/") else re.fullmatch(pattern, name)
        for pattern in kind.paths
    )


def _refuse_links(directory: Path, kind: Kind, root: str | os.PathLike | None) -> None:
    """Raises UserError if a link lies between `root` and a directory below it."""
    parts = () if root is None else directory.relative_to(root).parts
    for number in range(len(parts)):
        path = Path(root or "", *parts[: number + 1])
        if path.is_symlink():
            raise _in_the_way(path, "is a symbolic link", kind)


def _in_the_way(path: Path, problem: str, kind: Kind) -> UserError:
    what = f"{path} {problem}, and `im3d {kind.command}` would write there"
    return UserError(f"{what}; move it away, or choose another directory")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(directory: Path, kind: Kind, last: str) -> None:
    """Removes files that are ours, and the directories that are empty then."""
    noted = _noted(_read(directory), kind)
    there = {path.relative_to(directory).as_posix(): path for path in files_of(directory, kind)}
    for name in sorted(there, key=lambda name: (name != last, name)):
        if _digest(there[name]) not in noted.get(name, []):
            continue
        there[name].unlink()
        for parent in list(Path(name).parents)[:-1]:  # the last one is the directory itself
            with contextlib.suppress(OSError):  # what is not empty stays
                (directory / parent).rmdir()


# ---- The marker ----


def _remove_lone_marker(directory: Path) -> None:
    """Removes the marker if nothing else has come into being."""
    with contextlib.suppress(OSError):
        if set(os.listdir(directory)) <= {MARKER, locks.LOCK}:
            (directory / MARKER).unlink(missing_ok=True)


def _read(directory: Path) -> dict[str, Any]:
    """What earlier runs have noted, by their commands. Raises UserError for a marker that is not ours."""
    path = directory / MARKER
    try:
        noted = json.loads(path.read_text())["made_by_im3d"]
        if isinstance(noted, dict):
            return noted
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged or not ours; move it away, or choose another directory")


def _write(directory: Path, marker: dict[str, Any]) -> None:
    if marker:
        write_json(directory / MARKER, {"made_by_im3d": marker})
    else:
        (directory / MARKER).unlink(missing_ok=True)


def _noted(marker: dict[str, Any], kind: Kind) -> Digests:
    noted = marker.get(kind.command)
    return noted if isinstance(noted, dict) else {}


def _note(directory: Path, kind: Kind, files: Digests) -> None:
    others = {command: noted for command, noted in _read(directory).items() if command != kind.command}
    _write(directory, others | ({kind.command: files} if files else {}))
