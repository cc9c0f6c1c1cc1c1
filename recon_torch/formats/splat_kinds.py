"""Files of splats that are not read, named for what they are, by their content or else by their suffix."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

ADVICE = "convert it to a .ply of 3DGS first, as splat-transform or SuperSplat do"

SUFFIXES = {
    ".spz": "an .spz file (Niantic)",
    ".sog": "a .sog file (PlayCanvas)",
    ".splat": "a .splat file (antimatter15)",
    ".ksplat": "a .ksplat file (mkkellogg)",
    ".glb": "a .glb file",
    ".gltf": "a .gltf file",
    ".usdz": "a .usdz file",
    ".csv": "a .csv file",
}
"""What a suffix stands for where the content does not tell: .splat and .ksplat have no mark of their own."""


def kind_of(path: Path, head: bytes) -> str | None:
    """What a file is, in words; None if it may be a .ply of Gaussians as trainers write it.

    head: the beginning of the file, with the whole header of a .ply.
    """
    if head.startswith(b"ply"):
        header = head.partition(b"end_header")[0]
        packed = b"element chunk" in header and b"packed_position" in header
        return "a compressed .ply (SuperSplat and PlayCanvas)" if packed else None
    if head.startswith(b"NGSP") or _gunzipped(head).startswith(b"NGSP"):
        return SUFFIXES[".spz"]
    if head.startswith(b"glTF"):
        return SUFFIXES[".glb"]
    if head.startswith(b"PK") and _is_sog(path):
        return SUFFIXES[".sog"]
    if path.name.lower() == "meta.json":
        return "the meta.json of a SOG directory (PlayCanvas)"
    return SUFFIXES.get(path.suffix.lower())


def _gunzipped(head: bytes) -> bytes:
    """The first bytes of what a gzip file holds; nothing if it is none."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, 16)
    except zlib.error:
        return b""


def _is_sog(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rsplit("/", 1)[-1] == "meta.json" for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False
