"""Files are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recon_torch.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that takes its name if the block succeeds.

    Makes the parent folders. Raises UserError where the system refuses to write.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(FILE_MODE)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(path: str | Path) -> Path:
    """Makes an output directory if there is none. Raises UserError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"directory {path} cannot be made: {error.strerror}; choose another one") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"directory {path} cannot be written to; choose another one")
    return Path(path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, indented. NumPy scalars and arrays become numbers and lists; NaN is a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda value: value.tolist())
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FILE_MODE = 0o666 & ~_umask()  # read once: to read it is to change it, for all threads
