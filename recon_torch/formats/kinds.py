"""What a file of splats is, by its content or else by its suffix."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from recon_torch.settings import Format


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: what messages call it.
        format: in which it is read; None if it is not read at all.
    """

    name: str
    format: Format | None


COMPRESSED = Kind("a compressed .ply (SuperSplat and PlayCanvas)", Format.COMPRESSED_PLY)
SPZ = Kind("an .spz file (Niantic)", Format.SPZ)
SOG = Kind("a .sog file (PlayCanvas)", Format.SOG)
GLB = Kind("a .glb file", Format.GLB)
SUFFIXES = {
    ".spz": SPZ,
    ".sog": SOG,
    ".splat": Kind("a .splat file (antimatter15)", Format.SPLAT),
    ".ksplat": Kind("a .ksplat file (mkkellogg)", Format.KSPLAT),
    ".glb": GLB,
    ".usdz": Kind("a .usdz file", Format.USDZ),
    ".usda": Kind("a .usda file", Format.USDA),
    ".usdc": Kind("a .usdc file", Format.USDA),
    ".usd": Kind("a .usd file", Format.USDA),
    ".gltf": Kind("a .gltf file", None),
    ".csv": Kind("a .csv file", None),
}
"""What a suffix stands for where the content does not tell: .splat and .ksplat have no mark of their own."""
META_JSON = Kind("the meta.json of a SOG directory (PlayCanvas)", None)
ADVICE = "convert it to a .ply of 3DGS first, as splat-transform or SuperSplat do"


def kind_of(path: Path, head: bytes) -> Kind | None:
    """What a file is; None if it may be a .ply of Gaussians as trainers write it.

    head: the beginning of the file, with the whole header of a .ply.
    """
    if head.startswith(b"ply"):
        header = head.partition(b"end_header")[0]
        packed = b"element chunk" in header and b"packed_position" in header
        return COMPRESSED if packed else None
    if head.startswith(b"NGSP") or gunzipped(head, 16).startswith(b"NGSP"):
        return SPZ
    if head.startswith(b"glTF"):
        return GLB
    if head.startswith(b"PK") and _is_sog(path):
        return SOG
    if path.name.lower() == "meta.json":
        return META_JSON
    return SUFFIXES.get(path.suffix.lower())


def gunzipped(head: bytes, most: int) -> bytes:
    """At most so many of the first bytes of what a gzip file holds; nothing if it is none."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, most)
    except zlib.error:
        return b""


def _is_sog(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rsplit("/", 1)[-1] == "meta.json" for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False
