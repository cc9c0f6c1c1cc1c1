"""Which objects a data set takes, and into which splits: by a hash of the name, by a file, by a selection.

An augmented variant of an object, NAME~1, goes where its object NAME goes, so that no split knows another's
objects.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recon_torch.errors import UserError
from recon_torch.text_files import read_json

SPLIT_NAME = re.compile("(?!all$)[a-z][a-z0-9_]*")
"""What tfds takes as the name of a split."""


def object_of(name: str) -> str:
    """The name of the object that a name means: "a/mug" for "a/mug" and for its variant "a/mug~2"."""
    return re.sub(r"~\d+$", "", name)


def split_of(name: str, shares: Mapping[str, float]) -> str:
    """The split of an object, by a hash of its name: it stays the same when other objects are added.

    Args:
        shares: split -> its share of the objects; they sum to 1.
    """
    place = int.from_bytes(hashlib.sha256(object_of(name).encode()).digest()[:8]) / 2**64
    bounds = np.cumsum(list(shares.values()))
    return list(shares)[min(int(np.searchsorted(bounds, place, side="right")), len(shares) - 1)]


class SplitFile(NamedTuple):
    """The splits of a file. splits: their names, in its order; by_name: the split of each object."""

    splits: list[str]
    by_name: dict[str, str]

    def split_of(self, name: str) -> str | None:
        """The split of an object or of a variant of it; None if it is in none."""
        return self.by_name.get(name) or self.by_name.get(object_of(name))

    def names(self) -> dict[str, list[str]]:
        """The names of the objects of each split."""
        return {split: [name for name, of in self.by_name.items() if of == split] for split in self.splits}

    def without_object(self, names: Sequence[str]) -> list[str]:
        """The names in the file that are not among `names`, even as an object that has variants there."""
        known = {*names, *map(object_of, names)}
        return [name for name in self.by_name if name not in known]


def read_split_file(path: Path) -> SplitFile:
    """Reads a JSON object of lists of names: {"train": ["a/mug", ...], "test": [...]}.

    Raises UserError for a file of another form, for one without names, and for names that it has twice.
    """
    content = _read_json(path, "--split-file")
    if not isinstance(content, dict) or not all(map(_is_list_of_names, content.values())):
        raise UserError(f"--split-file {path} is not {{split: [names of objects], ...}}; mend it")
    if wrong := [split for split in content if not SPLIT_NAME.fullmatch(split)]:
        raise UserError(
            f"--split-file {path}: {wrong[0]!r} cannot be a split's name; give lower-case letters and digits"
        )
    by_name: dict[str, str] = {}
    twice = []
    for split, names in content.items():
        for name in names:
            if name in by_name:
                twice.append(f"{name} in {by_name[name]} and {split}")
            by_name[name] = split
    if twice:
        raise UserError(f"--split-file {path} has {len(twice)} names twice, as {twice[0]}; leave one of each")
    if not by_name:
        raise UserError(f"--split-file {path} names no objects")
    return SplitFile(list(content), by_name)


def read_selection(path: Path) -> list[str]:
    """The names that a selection file of `im3d dataset select` keeps. Raises UserError for any other file."""
    content = _read_json(path, "--selection")
    names = content.get("names") if isinstance(content, dict) else None
    if not _is_list_of_names(names) or not names:
        raise UserError(f'--selection {path} has no list "names"; make one with `im3d dataset select`')
    return names


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path, flag: str) -> object:
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def _is_list_of_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
