"""Writing files so that each is whole or absent: under a temporary name first, which is then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recon_torch.errors import UserError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once, because the system lets a process read its mask only by changing it, for all threads.
FILE_MODE = 0o666 & ~_umask()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with its suffix, which is renamed to it if the block succeeds.

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
        temporary.chmod(FILE_MODE)  # because mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(path: str | Path) -> Path:
    """Makes a directory for output, if there is none. Raises UserError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"directory {path} cannot be made: {error.strerror}; choose another one") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"directory {path} cannot be written to; choose another one")
    return Path(path)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes indented JSON, with NumPy scalars and arrays as numbers and lists.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda value: value.tolist())
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def sort_safetensors_header(path: str | Path) -> None:
    """Puts the metadata of a .safetensors file in order, so that equal content makes equal bytes.

    safetensors 0.8.0 writes several entries in a random order: findings/safetensors_metadata_order.sh.
    """
    with open(path, "r+b") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(num_bytes))
