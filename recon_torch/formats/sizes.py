"""How many Gaussians a file says that it holds, checked against its size before anything is unpacked.

What these checks let through is unpacked by `conversion` in a process whose memory is limited.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

from PIL import Image

from recon_torch.errors import UserError
from recon_torch.settings import Format

MOST_GAUSSIANS = 10_000_000
MOST_BYTES = 4 * 2**30  # of a file
KSPLAT_HEADER, KSPLAT_SECTION, KSPLAT_ROW = (
    4096,
    1024,
    24,
)  # bytes; the smallest row is that of its levels 1 and 2
SPLAT_ROW = 32
SPZ_HEADER, SPZ_ROW, SPZ_EXTRA = 16, 20, 2**20  # bytes; the extra are extensions
SPZ_HARMONICS = {0: 0, 1: 9, 2: 24, 3: 45, 4: 72}  # bytes a row, by the degree
SOG_EXTRA = 2**20


def check(path: Path, kind: Format) -> None:
    """Raises UserError for a file that states more than it can hold, and OSError where it cannot be read."""
    check_bytes(path)
    count = STATED[kind](path)
    if not 0 < count <= MOST_GAUSSIANS:
        raise UserError(f"{path} states {count} Gaussians; from 1 to {MOST_GAUSSIANS} are read")


def check_bytes(path: Path) -> None:
    """Raises UserError for a file that is too large to be read at once."""
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MOST_BYTES} are read")


def _splat(path: Path) -> int:
    size = path.stat().st_size
    if size % SPLAT_ROW:
        raise UserError(f"{path} is cut short: {size} bytes are no multiple of the {SPLAT_ROW} of a Gaussian")
    return size // SPLAT_ROW


def _ksplat(path: Path) -> int:
    size = path.stat().st_size
    head = _head(path, 20)
    if len(head) < 20:
        raise UserError(f"{path} is cut short: it has {size} bytes")
    _, sections, _, count = struct.unpack("<IIII", head[4:])
    needed = KSPLAT_HEADER + sections * KSPLAT_SECTION + count * KSPLAT_ROW
    if needed > size:
        raise UserError(f"{path} is cut short: {count} Gaussians are at least {needed} bytes, it has {size}")
    return count


def _compressed_ply(path: Path) -> int:
    """The rows of all elements have to be there; all their properties have four bytes or one."""
    head = _head(path, 65536).partition(b"end_header\n")
    counts, needed, rows, row = {}, len(head[0]) + len(head[1]), 0, 0
    for words in (line.split() for line in head[0].decode("ascii", "replace").splitlines()):
        if words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal() and len(words[2]) < 12:
            needed, rows, row = needed + rows * row, int(words[2]), 0
            counts[words[1]] = rows
        elif words[:1] == ["property"]:
            row += 1 if words[1:2] == ["uchar"] else 4
    needed, size = needed + rows * row, path.stat().st_size
    if not head[1] or "vertex" not in counts:
        raise UserError(f"{path} is damaged: its header has no end, or no vertices")
    if needed > size:
        raise UserError(f"{path} is cut short: its header states {needed} bytes, it has {size}")
    return counts["vertex"]


def _spz(path: Path) -> int:
    head = _head(path, SPZ_HEADER)
    if head.startswith(b"NGSP"):  # version 4, whose header is not packed
        return struct.unpack("<4sII", head[:12])[2] if len(head) == SPZ_HEADER else 0
    unpacker, packed = zlib.decompressobj(wbits=31), path.read_bytes()
    try:
        head = unpacker.decompress(packed, SPZ_HEADER)
        if len(head) < SPZ_HEADER:
            raise UserError(f"{path} is cut short")
        _, _, count, degree = struct.unpack("<4sIIB", head[:13])
        room = count * (SPZ_ROW + SPZ_HARMONICS.get(degree, 0)) + SPZ_EXTRA
        if 0 < count <= MOST_GAUSSIANS and _unpacked(unpacker, room) > room:
            raise UserError(f"{path} unpacks to more than its {count} Gaussians take")
    except zlib.error:
        raise UserError(f"{path} is damaged: it cannot be unpacked") from None
    return count


def _unpacked(unpacker: zlib._Decompress, most: int) -> int:
    """How many bytes there are, counted until they are more than `most`."""
    total = 0
    while unpacker.unconsumed_tail and total <= most:
        total += len(unpacker.decompress(unpacker.unconsumed_tail, 2**20))
    return total


def _sog(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if any(entry.file_size > path.stat().st_size + SOG_EXTRA for entry in entries.values()):
                raise UserError(f"{path} unpacks to more than its size, which pictures do not")
            meta = json.loads(archive.read("meta.json"))
            count = meta["count"] if "count" in meta else meta["means"]["shape"][0]
            for name in entries:
                if name.endswith(".webp"):
                    with Image.open(io.BytesIO(archive.read(name)), formats=["WEBP"]) as picture:
                        if picture.width * picture.height > 4 * count + SOG_EXTRA:
                            raise UserError(f"{path}: {name} has more pixels than {count} Gaussians need")
    except UserError:
        raise
    except Exception as error:  # whatever zipfile, json and Pillow make of damaged files
        raise UserError(f"{path} is damaged: it is no .sog with a meta.json and pictures") from error
    if not isinstance(count, int):
        raise UserError(f"{path} is damaged: its meta.json states no number of Gaussians")
    return count


def _head(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)


STATED = {
    Format.SPLAT: _splat,
    Format.KSPLAT: _ksplat,
    Format.COMPRESSED_PLY: _compressed_ply,
    Format.SPZ: _spz,
    Format.SPZ4: _spz,
    Format.SOG: _sog,
}
