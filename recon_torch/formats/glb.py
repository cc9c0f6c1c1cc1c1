"""glTF's Gaussians: a .glb of points with the ratified extension KHR_gaussian_splatting.

Scales and opacities are stored as they are, not as logarithms and logits. The world is glTF's, with +Y up.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from recon_torch.errors import UserError, quoted
from recon_torch.formats import sizes
from recon_torch.formats.activated import from_activated
from recon_torch.formats.ply import Loaded
from recon_torch.raster.gaussians import Gaussians
from recon_torch.text_files import parse_json

EXTENSION = "KHR_gaussian_splatting"
ROTATION, SCALE, OPACITY = (f"{EXTENSION}:{name}" for name in ("ROTATION", "SCALE", "OPACITY"))
COLOR = f"{EXTENSION}:SH_DEGREE_0_COEF_0"
HARMONIC = f"{EXTENSION}:SH_DEGREE_"
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
# numpy's types by glTF's numbers of them, and what a normalized integer is divided by.
TYPES = {5126: ("<f4", 1), 5120: ("i1", 127), 5121: ("u1", 255), 5122: ("<i2", 32767), 5123: ("<u2", 65535)}
READ = {"POSITION": 3, ROTATION: 4, SCALE: 3, OPACITY: 1, COLOR: 3}
JSON_CHUNK, BINARY_CHUNK = 0x4E4F534A, 0x004E4942
MOST_JSON_BYTES = 2**24


def glb_bytes(gaussians: Gaussians) -> bytes:
    """The content of a .glb of Gaussians in glTF's axes. Viewers without the extension show points."""
    arrays = [tensor.detach().cpu().float().numpy() for tensor in gaussians.activated()]
    means, quats, scales, opacities, colors = arrays
    quats = quats / np.linalg.norm(quats, axis=-1, keepdims=True)
    rgba = np.concatenate([colors.clip(0, 1), opacities[:, None]], -1)
    columns = {
        "POSITION": means,
        "COLOR_0": (255 * rgba).round().astype("u1"),
        ROTATION: quats[:, [1, 2, 3, 0]],
        SCALE: scales,
        OPACITY: opacities[:, None],
        COLOR: gaussians.sh0.detach().cpu().numpy(),
    }
    parts: list[bytes] = []
    views: list[dict[str, int]] = []
    accessors: list[dict[str, Any]] = []
    for name, values in columns.items():
        content = values if values.dtype == np.uint8 else values.astype("<f4")
        start = sum(map(len, parts))
        parts.append(content.tobytes())
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(parts[-1])})
        accessors.append(_accessor(len(accessors), content, name))
    extension = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    extension |= {"projection": "perspective", "sortingMethod": "cameraDistance"}
    points = {"mode": 0, "attributes": {name: number for number, name in enumerate(columns)}}
    document = {
        "asset": {"version": "2.0", "generator": "im3d"},
        "extensionsUsed": [EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [points | {"extensions": {EXTENSION: extension}}]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": sum(map(len, parts))}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(parts)  # whose length is a multiple of 4, as each column's is
    chunks = struct.pack("<II", len(text), JSON_CHUNK) + text
    chunks += struct.pack("<II", len(binary), BINARY_CHUNK) + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _accessor(number: int, values: np.ndarray, name: str) -> dict[str, Any]:
    kind = {width: each for each, width in WIDTHS.items()}[values.shape[1]]
    known: dict[str, Any] = {"bufferView": number, "count": len(values), "type": kind}
    if values.dtype == np.uint8:
        return known | {"componentType": 5121, "normalized": True}
    known["componentType"] = 5126
    if name == "POSITION":  # the only one that has to state its range
        known |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
    return known


def load(path: Path) -> Loaded:
    """Reads the Gaussians of a .glb, in glTF's axes; their colours do not depend on the view.

    Raises UserError for a file that is damaged, has no Gaussians or more than one set of them, moves them by
    a node, or stores them in a way that this does not read.
    """
    document, binary = _chunks(path)
    try:
        primitive, notes = _points(document)
        columns = {
            name: _column(document, binary, primitive["attributes"], name, width)
            for name, width in READ.items()
        }
        counts = {len(values) for values in columns.values()}
        if len(counts) > 1:
            raise UserError(f"its attributes have {sorted(counts)} rows")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its JSON is no glTF of Gaussians ({quoted(error)})") from None
    xyzw = columns[ROTATION]
    arrays = (
        columns["POSITION"],
        xyzw[:, [3, 0, 1, 2]],
        columns[SCALE],
        columns[OPACITY][:, 0],
        columns[COLOR],
    )
    gaussians, told = from_activated(path, *arrays)
    return Loaded(gaussians, [*notes, *told])


def _chunks(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary part of a file."""
    sizes.check_bytes(path)
    content = path.read_bytes()
    if len(content) < 20 or content[:4] != b"glTF":
        raise UserError(f"{path} is no .glb, or is cut short")
    version, length, json_bytes, kind = struct.unpack("<4xIIII", content[:20])
    if version != 2 or kind != JSON_CHUNK:
        raise UserError(f"{path} is a .glb of version {version}; only version 2 with JSON is read")
    if length > len(content) or 20 + json_bytes > len(content) or json_bytes > MOST_JSON_BYTES:
        raise UserError(f"{path} is cut short: its header states {length} bytes, it has {len(content)}")
    try:
        text = content[20 : 20 + json_bytes].decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: its JSON is not UTF-8") from None
    document = parse_json(text, path)
    rest = content[20 + json_bytes :]
    if len(rest) < 8 or struct.unpack("<I", rest[4:8])[0] != BINARY_CHUNK or not isinstance(document, dict):
        raise UserError(f"{path} has no binary part, as a .glb of Gaussians has")
    return document, rest[8 : 8 + struct.unpack("<I", rest[:4])[0]]


def _points(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The primitive of Gaussians, and notes on what is not read."""
    required = set(document.get("extensionsRequired", [])) - {EXTENSION}
    if required:
        raise UserError(f"it requires {quoted(', '.join(sorted(required)))}, which is not read")
    primitives = [each for mesh in document["meshes"] for each in mesh["primitives"]]
    found = [each for each in primitives if EXTENSION in each.get("extensions", {})]
    if len(found) != 1:
        raise UserError(f"it has {len(found)} sets of Gaussians ({EXTENSION}); files with one are read")
    moved = [
        key
        for node in document["nodes"]
        for key in ("matrix", "rotation", "scale", "translation")
        if key in node
    ]
    if moved:
        raise UserError(f"a node has a {moved[0]}, which is not read; apply it first")
    [primitive] = found
    extension = primitive["extensions"][EXTENSION]
    if extension.get("kernel") != "ellipse":
        raise UserError(f"its kernel is {quoted(extension.get('kernel'))}; only 'ellipse' is read")
    notes = []
    if extension.get("extensions"):
        raise UserError(f"its Gaussians are stored as {quoted(', '.join(extension['extensions']))} says")
    if len(primitives) > 1:
        notes.append(f"not read: {len(primitives) - 1} meshes beside the Gaussians")
    if any(name.startswith(HARMONIC) and name != COLOR for name in primitive["attributes"]):
        notes.append("colours that depend on the view are left out: each Gaussian has its mean colour")
    return primitive, notes


def _column(
    document: dict[str, Any], binary: bytes, attributes: dict[str, int], name: str, width: int
) -> Float32[np.ndarray, "N width"]:
    """An attribute in float32. Its size is checked against the file's before memory is allocated."""
    if name not in attributes:
        raise UserError(f"it has no {name}")
    accessor = document["accessors"][attributes[name]]
    if "sparse" in accessor or WIDTHS[accessor["type"]] != width or accessor["componentType"] not in TYPES:
        raise UserError(f"{name} is stored in a way that is not read")
    kind, most = TYPES[accessor["componentType"]]
    view = document["bufferViews"][accessor["bufferView"]]
    row = np.dtype(kind).itemsize * width
    start, count = view.get("byteOffset", 0) + accessor.get("byteOffset", 0), accessor["count"]
    stride = view.get("byteStride", row)
    numbers = (start, count, stride, accessor["bufferView"], attributes[name])
    if not all(type(each) is int and each >= 0 for each in numbers) or stride < row or view.get("buffer", 0):
        raise UserError(f"{name} is stored in a way that is not read")
    if count and start + stride * (count - 1) + row > len(binary):
        raise UserError(f"{name} is cut short: {count} rows do not fit into the file's {len(binary)} bytes")
    rows = np.ndarray((count, width), kind, binary, start, (stride, np.dtype(kind).itemsize))
    values = rows.astype(np.float32)
    return values if most == 1 else (values / most).clip(-1 if kind.startswith(("i", "<i")) else 0, 1)
