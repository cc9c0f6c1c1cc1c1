"""Reads .stl files, binary ones and text, with the colours that some programs write into binary ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt16

from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.parts import Part, Scene, grey
from recon_torch.errors import UserError

HEADER_BYTES = 84
TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read_stl(path: Path) -> Scene:
    """The triangles of a file. Its normals are not used: they are those of the triangles, or wrong."""
    content = path.read_bytes()
    count = int.from_bytes(content[80:HEADER_BYTES], "little")
    fits = HEADER_BYTES <= HEADER_BYTES + TRIANGLE.itemsize * count <= len(content)
    if fits and (count or not content.lstrip().startswith(b"solid")):
        rows = np.frombuffer(content, TRIANGLE, count, HEADER_BYTES)
        colors = _colors(rows["attribute"], content[:80])
        return Scene([Part(rows["corners"].astype(np.float64), None, colors)], [], set())
    if not content.lstrip()[:5].lower() == b"solid":
        raise UserError("it is neither a binary .stl file nor a text one; it may be cut off")
    number = rb"\s+([-+.\deEnaifNAIF]+)"
    corners = re.findall(rb"vertex" + number * 3, content, re.IGNORECASE)
    if len(corners) % 3:
        raise UserError("it ends within a triangle; the file may be cut off")
    points = np.array([[float(each) for each in row] for row in corners], np.float64).reshape(-1, 3, 3)
    return Scene([Part(points, None, grey(len(points)))], [], set())


def _colors(attributes: UInt16[np.ndarray, " F"], header: bytes) -> Float[np.ndarray, "F 3 4"]:
    """Linear RGBA of the triangles: 15 bits of sRGB each, in one of two orders, where the file has them.

    Materialise Magics announces them with "COLOR=" and the colour of all others, starts with red at the
    lowest bit, and clears the highest one. VisCAM starts with blue, and sets it.
    """
    colors = grey(len(attributes))
    place = header.find(b"COLOR=")
    if place >= 0 and place + 9 <= len(header):
        default = np.frombuffer(header, np.uint8, 3, place + 6) / 255
        colors[..., :3] = linear_from_srgb(default)
        colored, channels = attributes < 0x8000, _channels(attributes)
    elif (attributes & 0x8000).any():
        colored, channels = attributes >= 0x8000, _channels(attributes)[:, ::-1]
    else:
        return colors
    colors[colored, :, :3] = linear_from_srgb(channels / 31)[colored, None]
    return colors


def _channels(attributes: UInt16[np.ndarray, " F"]) -> Int[np.ndarray, "F 3"]:
    """The three numbers of five bits, the lowest bits first."""
    return np.stack([attributes >> shift & 31 for shift in (0, 5, 10)], -1).astype(np.int64)
