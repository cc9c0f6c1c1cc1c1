"""Reads .obj files with their .mtl files (Wavefront)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.mtl import Lines, Look, Materials, Reference, decode_text, lines_of, read_library
from im3d_jax.data.meshes.parts import Material, Part, Scene, grey, smooth_normals
from im3d_jax.data.meshes.pictures import TexelBudget, find_beside
from im3d_jax.data.meshes.polygons import triangulate
from recon_torch.errors import UserError

NOT_SHOWN = {"l": "lines", "p": "points", "curv": "curves", "curv2": "curves", "surf": "free-form surfaces"}


class _Content:
    """What the lines of an .obj file give, as lists."""

    def __init__(self) -> None:
        self.vertices: list[list[str]] = []
        self.uvs: list[list[str]] = []
        self.normals: list[list[str]] = []
        self.references: list[tuple[int, int, int]] = []  # of each corner: vertex, uv, normal; -1 for none
        self.sizes: list[int] = []
        self.face_materials: list[int] = []
        self.materials: list[str] = []
        self.libraries: list[str] = []
        self.left_out: set[str] = set()


class _Geometry(NamedTuple):
    """A file as arrays. colors: NaN for vertices without. references: F triangles' vertex, uv and normal."""

    positions: Float[np.ndarray, "V 3"]
    colors: Float[np.ndarray, "V 3"]
    uvs: Float[np.ndarray, "T 2"]
    normals: Float[np.ndarray, "N 3"]
    references: Int[np.ndarray, "F 3 3"]
    face_materials: Int[np.ndarray, " F"]


def read_obj(path: Path) -> Scene:
    """All triangles and polygons of a file, one part for each material."""
    content = _read_lines(decode_text(path.read_bytes()))
    geometry = _geometry(content)
    known = _materials(path.parent, content)
    materials = Materials(path.parent, TexelBudget(path.name), content.left_out)
    parts = []
    for number in np.unique(geometry.face_materials):
        name = content.materials[number] if number >= 0 else None
        lines = None if name is None else _find_material(known, name)
        if name is not None and lines is None:
            content.left_out.add(f"missing material: {name[:200]}")
        look = None if lines is None else materials.look(lines)
        parts.append(_part(geometry, geometry.face_materials == number, look))
    return Scene(parts, materials.textures, content.left_out)


def _read_lines(text: str) -> _Content:
    content, material = _Content(), -1
    for word, rest in lines_of(text):
        if word == "v":
            content.vertices.append(rest.split())
        elif word == "vt":
            content.uvs.append(rest.split())
        elif word == "vn":
            content.normals.append(rest.split())
        elif word in ("f", "fo"):
            corners = [_reference(each, content) for each in rest.split()]
            content.references += corners
            content.sizes.append(len(corners))
            content.face_materials.append(material)
        elif word == "usemtl":
            if rest not in content.materials:
                content.materials.append(rest)
            material = content.materials.index(rest)
        elif word == "mtllib":
            content.libraries.append(rest)
        elif word in NOT_SHOWN:
            content.left_out.add(NOT_SHOWN[word])
    return content


def _reference(corner: str, content: _Content) -> tuple[int, int, int]:
    """The places, from 0, that `7/2/3`, `7//3`, `7` or `-1` stand for; negative ones count from the end."""
    words = [*corner.split("/"), "", ""]
    lengths = (len(content.vertices), len(content.uvs), len(content.normals))
    found = []
    for word, length in zip(words[:3], lengths, strict=True):
        place = int(word) if word else 0
        place = place - 1 if place > 0 else length + place if place < 0 else -1
        found.append(place)
    if found[0] < 0 or (words[1] and found[1] < 0) or (words[2] and found[2] < 0):
        raise UserError(
            f"it has a face with the corner {corner[:40]!r}, which does not exist; export it again"
        )
    return found[0], found[1], found[2]


def _geometry(content: _Content) -> _Geometry:
    positions = np.array([each[:3] for each in content.vertices], np.float64).reshape(-1, 3)
    colors = np.full(positions.shape, np.nan)
    for number, words in enumerate(content.vertices):
        if len(words) >= 6:  # x y z r g b, and perhaps alpha
            colors[number] = [float(word) for word in words[3:6]]
    if np.nanmax(colors, initial=0) > 1:
        colors /= 255
    uvs = np.array([[*each[:2], "0"][:2] for each in content.uvs], np.float64).reshape(-1, 2)
    normals = np.array([each[:3] for each in content.normals], np.float64).reshape(-1, 3)
    references = np.array(content.references, np.int64).reshape(-1, 3)
    if (references.max(0, initial=-1) >= [len(positions), len(uvs), len(normals)]).any():
        raise UserError("it has faces with corners that do not exist; export it again")
    sizes = np.array(content.sizes, np.int64)
    triangles = triangulate(sizes, positions[references[:, 0]])
    face_of_corner = np.repeat(np.arange(len(sizes)), sizes)
    face_materials = np.array(content.face_materials, np.int64)[face_of_corner[triangles[:, 0]]]
    return _Geometry(positions, colors, uvs, normals, references[triangles], face_materials)


def _materials(folder: Path, content: _Content) -> dict[str, Lines]:
    """The materials of all .mtl files that are named. A line has one name with spaces, or several names."""
    found: dict[str, Lines] = {}
    for line in content.libraries:
        names = [line] if find_beside(folder, line) else line.split()
        if not any(find_beside(folder, name) for name in names):
            names = [line]
        for name in names:
            path = find_beside(folder, name)
            if path is None:
                content.left_out.add(f"missing material file: {name[:200]}")
            else:
                found |= read_library(path.read_bytes())
    return found


def _find_material(known: dict[str, Lines], name: str) -> Lines | None:
    if name in known:
        return known[name]
    return next((lines for other, lines in known.items() if other.casefold() == name.casefold()), None)


def _part(geometry: _Geometry, chosen: np.ndarray, look: Look | None) -> Part:
    """The chosen triangles, which have one look."""
    vertex, uv, normal = np.moveaxis(geometry.references[chosen], -1, 0)
    corners, uvs = geometry.positions[vertex], None
    if (uv >= 0).any():
        uvs = geometry.uvs[uv]
        uvs[uv < 0] = 0
    normals = None
    if (normal >= 0).any():
        normals = geometry.normals[normal]
        if (normal < 0).any():
            normals[normal < 0] = smooth_normals(corners, uvs)[normal < 0]
    base, emission = (_placed(uvs, use) for use in ((look.base, look.emission) if look else (None, None)))
    material = look.material if look else Material()
    if uvs is None:
        material = material._replace(texture=-1, emission_texture=-1)
    return Part(corners, normals, _colors(geometry.colors[vertex], look), base, emission, material)


def _colors(vertex_colors: Float[np.ndarray, "F 3 3"], look: Look | None) -> Float[np.ndarray, "F 3 4"]:
    """Linear RGBA: the material's colour times that of the vertices, which is taken as sRGB."""
    colored = np.isfinite(vertex_colors).all()
    if look is None and not colored:
        return grey(len(vertex_colors))
    colors = np.ones((len(vertex_colors), 3, 4)) * (1.0 if look is None else look.factor)
    if colored:
        colors[..., :3] *= linear_from_srgb(np.clip(vertex_colors, 0, 1))
    return colors


def _placed(
    uvs: Float[np.ndarray, "F 3 2"] | None, use: Reference | None
) -> Float[np.ndarray, "F 3 2"] | None:
    """Places in a texture, whose v grows downwards, of the file's coordinates, whose v grows upwards."""
    if uvs is None or use is None:
        return None
    moved = uvs * use.scale + np.array(use.offset)
    return np.stack([moved[..., 0], 1 - moved[..., 1]], -1)
