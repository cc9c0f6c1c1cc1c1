"""Reads .ply files of triangles or polygons, with colours of vertices or faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.parts import AlphaMode, Material, Part, Scene, Texture, grey
from im3d_jax.data.meshes.pictures import TexelBudget, UnreadablePicture, decode_picture, find_beside
from im3d_jax.data.meshes.polygons import triangulate
from recon_torch.errors import UserError

TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
INDICES = ("vertex_indices", "vertex_index")
UV_NAMES = (("texture_u", "texture_v"), ("s", "t"), ("u", "v"))
COLOR_NAMES = (
    ("red", "green", "blue", "alpha"),
    ("diffuse_red", "diffuse_green", "diffuse_blue", "diffuse_alpha"),
    ("r", "g", "b", "a"),
)


class Property(NamedTuple):
    """length_type: of a list's length; None for a single number."""

    name: str
    type: str
    length_type: str | None


class Element(NamedTuple):
    name: str
    length: int
    properties: list[Property]


class Lists(NamedTuple):
    """A list property of all rows: their lengths, and all values one after the other."""

    sizes: Int[np.ndarray, " rows"]
    values: Num[np.ndarray, " all"]


class Table(NamedTuple):
    """The rows of an element, by the names of its properties."""

    numbers: dict[str, Num[np.ndarray, " rows"]]
    lists: dict[str, Lists]


def read_ply(path: Path) -> Scene:
    """The triangles of a file."""
    content = path.read_bytes()
    order, elements, textures, start = _read_header(content)
    tables = (
        _read_ascii(content[start:], elements)
        if order is None
        else _read_binary(content, start, elements, order)
    )
    nothing = Table({}, {})
    vertex, face = tables.get("vertex", nothing), tables.get("face", nothing)
    left_out = {"triangle strips"} if "tristrips" in tables else set()
    left_out |= {"lines"} if "edge" in tables else set()
    lists = next((face.lists[name] for name in INDICES if name in face.lists), None)
    if lists is None or not len(lists.values):
        return Scene([], [], left_out | {"points"})
    positions = np.stack([vertex.numbers[axis] for axis in "xyz"], -1).astype(np.float64)
    indices = lists.values.astype(np.int64)
    if indices.min() < 0 or indices.max() >= len(positions):
        raise UserError("it has indices of vertices that it does not have; export it again")
    if (lists.sizes < 3).any():
        left_out.add("faces of fewer than three corners")
    corner_of_triangle = triangulate(lists.sizes, positions[indices])
    faces = indices[corner_of_triangle]
    face_number = np.repeat(np.arange(len(lists.sizes)), lists.sizes)[corner_of_triangle[:, 0]]
    pictures = _textures(path.parent, textures, TexelBudget(path.name), left_out)
    uvs = _uvs(vertex, face, lists, faces, corner_of_triangle) if pictures else None
    colors = _colors(vertex, face, faces, face_number)
    if uvs is not None and colors is not None:
        left_out.add("vertex colours beside a texture")
    if uvs is not None or colors is None:
        colors = grey(len(faces)) if uvs is None else np.ones((len(faces), 3, 4))
    if not colors[..., 3].any():
        left_out.add("opacity of 0")
        colors[..., 3] = 1
    alpha_mode = AlphaMode.BLEND if (colors[..., 3] < 1).any() else AlphaMode.OPAQUE
    normals = None
    if {"nx", "ny", "nz"} <= vertex.numbers.keys():
        of_vertices = np.stack([vertex.numbers[name] for name in ("nx", "ny", "nz")], -1)
        normals = of_vertices.astype(np.float64)[faces]
    material = Material(-1 if uvs is None else 0, alpha_mode)
    return Scene([Part(positions[faces], normals, colors, uvs, None, material)], pictures, left_out)


# ---- Looks ----


def _colors(
    vertex: Table, face: Table, faces: Int[np.ndarray, "F 3"], face_number: Int[np.ndarray, " F"]
) -> Float[np.ndarray, "F 3 4"] | None:
    """Linear RGBA of the corners, from sRGB ones of vertices or else of faces; None if there are none."""
    srgb = _rgba(vertex.numbers)
    if srgb is not None:
        srgb = srgb[faces]
    elif (of_faces := _rgba(face.numbers)) is not None:
        srgb = np.repeat(of_faces[face_number][:, None], 3, 1)
    else:
        return None
    return np.concatenate([linear_from_srgb(srgb[..., :3]), srgb[..., 3:]], -1)


def _rgba(columns: Mapping[str, Num[np.ndarray, " rows"]]) -> Float[np.ndarray, "rows 4"] | None:
    """Colours in [0, 1] of integers of any width, or of floats up to 1 or to 255."""
    for names in COLOR_NAMES:
        if set(names[:3]) <= columns.keys():
            alpha = names[3] in columns
            channels = [np.asarray(columns[name]) for name in names[: 3 + alpha]]
            kind = channels[0].dtype
            rgba = np.stack([np.asarray(each, np.float64) for each in channels], -1)
            largest = (
                float(np.iinfo(kind).max) if kind.kind in "iu" else 255.0 if rgba.max(initial=0) > 1 else 1.0
            )
            rgba = np.clip(np.nan_to_num(rgba / largest), 0, 1)
            return rgba if alpha else np.concatenate([rgba, np.ones((len(rgba), 1))], -1)
    return None


def _textures(folder: Path, names: Sequence[str], budget: TexelBudget, left_out: set[str]) -> list[Texture]:
    """The first texture that a `comment TextureFile` names."""
    if len(names) > 1:
        left_out.add("second texture")
    for name in names[:1]:
        path = find_beside(folder, name)
        if path is None:
            left_out.add(f"missing texture: {name[:200]}")
            continue
        try:
            return [Texture(decode_picture(path.read_bytes(), budget))]
        except UnreadablePicture:
            left_out.add(f"unreadable texture: {name[:200]}")
    return []


def _uvs(
    vertex: Table,
    face: Table,
    lists: Lists,
    faces: Int[np.ndarray, "F 3"],
    corner_of_triangle: Int[np.ndarray, "F 3"],
) -> Float[np.ndarray, "F 3 2"] | None:
    """Places in the texture: of the corners of faces, or of vertices; v grows upwards in the file."""
    uvs = None
    texcoord = face.lists.get("texcoord")
    if texcoord is not None and (texcoord.sizes == 2 * lists.sizes).all():
        uvs = texcoord.values.reshape(-1, 2).astype(np.float64)[corner_of_triangle]
    for names in UV_NAMES:
        if uvs is None and set(names) <= vertex.numbers.keys():
            uvs = np.stack([vertex.numbers[name] for name in names], -1).astype(np.float64)[faces]
    return None if uvs is None else np.stack([uvs[..., 0], 1 - uvs[..., 1]], -1)


# ---- The format ----


def _read_header(content: bytes) -> tuple[str | None, list[Element], list[str], int]:
    """The byte order (None for text), the elements, the names of textures, and where the data start."""
    end = content.find(b"end_header")
    if not content.startswith(b"ply") or end < 0:
        raise UserError("it does not begin as a .ply file does; export it again")
    start = content.index(b"\n", end) + 1 if b"\n" in content[end : end + 12] else end + 11
    order: str | None = None
    elements: list[Element] = []
    textures: list[str] = []
    for line in content[:end].decode("latin-1").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            order = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}[words[1]]
        elif words[:1] == ["element"]:
            elements.append(Element(words[1], int(words[2]), []))
        elif words[:2] == ["property", "list"]:
            elements[-1].properties.append(Property(words[4], TYPES[words[3]], TYPES[words[2]]))
        elif words[:1] == ["property"]:
            elements[-1].properties.append(Property(words[2], TYPES[words[1]], None))
        elif words[:2] == ["comment", "TextureFile"]:
            textures.append(line.split(None, 2)[2])
    if any(not 0 <= each.length <= len(content) for each in elements):
        raise UserError("it says that it has more elements than it has bytes; the file may be cut off")
    return order, elements, textures, start


def _read_ascii(text: bytes, elements: list[Element]) -> dict[str, Table]:
    words = text.split()
    tables, place = {}, 0
    for element in elements:
        width = len(element.properties)
        if not any(each.length_type for each in element.properties):
            rows = words[place : place + width * element.length]
            columns = [rows[number::width] for number in range(width)]
            place += len(rows)
        else:
            columns, place = _ascii_rows(words, place, element)
        tables[element.name] = _table(element, columns)
    return tables


def _ascii_rows(words: list[bytes], place: int, element: Element) -> tuple[list[list], int]:
    columns: list[list] = [[] for _ in element.properties]
    for _ in range(element.length):
        for each, column in zip(element.properties, columns, strict=True):
            count = int(words[place]) if each.length_type else 1
            place += bool(each.length_type)
            if count < 0 or place + count > len(words):
                raise UserError("it ends before its last element; the file may be cut off")
            column.append(words[place : place + count] if each.length_type else words[place])
            place += count
    return columns, place


def _table(element: Element, columns: Sequence[Sequence[Any]]) -> Table:
    """The columns as arrays; those of lists have a sequence for each row."""
    table = Table({}, {})
    for each, column in zip(element.properties, columns, strict=True):
        if len(column) < element.length:
            raise UserError("it ends before its last element; the file may be cut off")
        if each.length_type:
            values = _as_type([value for row in column for value in row], each)
            table.lists[each.name] = Lists(np.array([len(row) for row in column], np.int64), values)
        else:
            table.numbers[each.name] = _as_type(column, each)
    return table


def _as_type(values: Sequence[Any], each: Property) -> Num[np.ndarray, " rows"]:
    """Values in the type of their property. Raises UserError for those that an integer type cannot hold."""
    numbers, kind = np.array(values, np.float64), np.dtype(each.type)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        held = (numbers >= limits.min) & (numbers <= limits.max) & (numbers == np.rint(numbers))
        if not held.all():  # NaN is not held either
            raise UserError(f"it has values of {each.name[:80]} that its type {kind} does not hold")
    with np.errstate(over="ignore"):  # what is too large for a float becomes infinite, which is looked for
        return numbers.astype(kind)


def _read_binary(content: bytes, start: int, elements: list[Element], order: str) -> dict[str, Table]:
    tables = {}
    for element in elements:
        alike = _read_alike(content, start, element, order)
        tables[element.name], start = alike or _read_rows(content, start, element, order)
    return tables


def _read_alike(content: bytes, start: int, element: Element, order: str) -> tuple[Table, int] | None:
    """Reads rows whose lists are all as long as those of the first, at once; None if they are not."""
    fields: list[tuple] = []
    place = start
    for number, each in enumerate(element.properties):
        length = 1
        if each.length_type:
            kind = np.dtype(order + each.length_type)
            if element.length and place + kind.itemsize <= len(content):
                length = int(np.frombuffer(content, kind, 1, place)[0])
            fields.append((f"length {number}", kind))
            place += kind.itemsize
        fields.append((f"value {number}", order + each.type, (max(length, 0),)))
        place += np.dtype(each.type).itemsize * length
    dtype = np.dtype(fields)
    if start + dtype.itemsize * element.length > len(content):
        return None
    rows, table = np.frombuffer(content, dtype, element.length, start), Table({}, {})
    for number, each in enumerate(element.properties):
        values = rows[f"value {number}"].astype(each.type)
        if not each.length_type:
            table.numbers[each.name] = values[:, 0]
            continue
        lengths = rows[f"length {number}"].astype(np.int64)
        if (lengths != values.shape[1]).any():
            return None
        table.lists[each.name] = Lists(lengths, values.reshape(-1))
    return table, start + dtype.itemsize * element.length


def _read_rows(content: bytes, start: int, element: Element, order: str) -> tuple[Table, int]:
    """Reads rows one by one, because their lists differ in length."""
    columns: list[list] = [[] for _ in element.properties]
    kinds = [(order + each.type, order + (each.length_type or "")) for each in element.properties]
    for _ in range(element.length):
        for (kind, length_kind), column in zip(kinds, columns, strict=True):
            length = 1
            if len(length_kind) > 1:
                length = int(np.frombuffer(content, length_kind, 1, start)[0])
                start += np.dtype(length_kind).itemsize
            values = np.frombuffer(content, kind, max(length, 0), start)
            column.append(values if len(length_kind) > 1 else values[0])
            start += values.nbytes
    return _table(element, columns), start
