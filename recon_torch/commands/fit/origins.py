"""What a fit is made from: its report says it, and --resume compares it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recon_torch.errors import UserError
from recon_torch.views.transforms import TRANSFORMS, parts_of, read_part

VIEWER = ("viewer", "viewer_host", "viewer_port", "viewer_stay")
NOT_SETTINGS = ("views", "video", "held_out", "out", "check", "resume", "at_once", *VIEWER)
"""Flags that say where views and files are, or do not change what is made."""


def origin(flags: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Digests of the views that are fitted and of those held out, and the flags, as values that JSON has.

    Equal origins make equal assets, up to what runs together. Files are compared by their content.
    """
    settings = {name: value for name, value in vars(flags).items() if name not in NOT_SETTINGS}
    settings["isnet_weights"] = flags.isnet_weights and str(flags.isnet_weights)
    settings["start"] = flags.start and _digest([flags.start])
    held_out = flags.held_out
    if held_out is not None and not held_out.isdecimal():
        held_out = _digest(_files_of(Path(held_out), flags.allow_missing))
    views = _digest(_files_of(source, flags.allow_missing) if flags.video is None else [source])
    return {"views": views, "held_out": held_out, "settings": settings}


def difference(before: Any, now: dict[str, Any]) -> list[str]:
    """The names of the parts of an origin in which another one differs, and of the flags among them.

    before: read from a report, so it may be anything.
    """
    before = before if isinstance(before, dict) else {}
    names = [name for name in now if name != "settings" and before.get(name) != now[name]]
    settings = before.get("settings") if isinstance(before.get("settings"), dict) else {}
    changed = [name for name, value in now["settings"].items() if settings.get(name) != value]
    return names + ["--" + name.replace("_", "-") for name in changed]


def files(flags: argparse.Namespace, source: Path) -> list[Path]:
    """The files that a fit reads, as far as they are there."""
    found = [
        Path(path) for path in (flags.isnet_weights, flags.lpips_weights, flags.start) if path is not None
    ]
    if flags.video is not None:
        return [*found, source]
    directories = [source]
    if flags.held_out is not None and not flags.held_out.isdecimal():
        directories.append(Path(flags.held_out))
    return found + [path for directory in directories for path in _files_of(directory, flags.allow_missing)]


def _files_of(source: Path, allow_missing: bool) -> Iterator[Path]:
    """The files of cameras that views are read from, and the pictures and masks that these name."""
    try:
        parts = parts_of(source)
    except UserError:  # is reported when the views are read
        yield source / TRANSFORMS
        return
    for part in (parts.train, parts.test):
        if part is None:
            continue
        yield part.path
        with contextlib.suppress(UserError):
            for frame in read_part(part, allow_missing)[0]:
                yield part.path.parent / frame.image
                if frame.mask is not None:
                    yield part.path.parent / frame.mask


def _digest(files: Iterator[Path] | list[Path]) -> str:
    """SHA-256, in hex, of the contents of files."""
    whole = hashlib.sha256()
    for path in files:
        try:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:  # is reported when the views are read
            whole.update(b"missing")
    return whole.hexdigest()
