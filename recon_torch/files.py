"""Writing files so that each is whole or absent: under a temporary name first, which is then renamed."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recon_torch import locks
from recon_torch.errors import UserError, quoted

TEMPORARY = ".im3d_"
"""How the names of files and directories begin that are not finished yet."""

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a system answers where it has no room: full disks, quotas, limits on sizes, read-only mounts."""


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
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    temporary = Path(name)
    locks.lock_file(handle)  # for as long as this process lives, it is no leftover
    try:
        yield temporary
        temporary.chmod(FILE_MODE)  # because mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except UserError as error:  # names the file as it was to be, not as it was on its way
        error.args = (str(error).replace(str(temporary), str(path)),)
        raise
    except Exception as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else refusal(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path} ({reason}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def refusal(error: BaseException) -> str | None:
    """Why the system has refused to write, such as "No space left on device"; None for any other error.

    Libraries hand this on in many ways: as an OSError, as the cause of another error, or in its text alone.
    """
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        for number in REFUSALS:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__ or error
    return None


def check_regular(path: str | os.PathLike) -> None:
    """Raises UserError for a path that names something else than a file, such as a pipe, which may never end.

    A path that names nothing passes: whoever reads it says so.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    except ValueError:
        raise UserError(
            f"{quoted(str(path))} is no path; it has a character that paths cannot have"
        ) from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path} is {kind}; give the path of a file")


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
