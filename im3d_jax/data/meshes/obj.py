"""Reads .obj files with their .mtl files (Wavefront)."""

from __future__ import annotations

import warnings
from itertools import groupby
from operator import itemgetter
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
    """What the lines of an .obj file give, as text.

    faces: what follows each f. runs: of consecutive faces their number, their material (-1 for none), and how
    many vertices, uvs and normals stand before them.
    """

    def __init__(self) -> None:
        self.vertices: list[str] = []
        self.uvs: list[str] = []
        self.normals: list[str] = []
        self.faces: list[str] = []
        self.runs: list[list[int]] = []
        self.materials: dict[str, int] = {}
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
    names = list(content.materials)
    for number in np.unique(geometry.face_materials):
        name = names[number] if number >= 0 else None
        lines = None if name is None else _find_material(known, name)
        if name is not None and lines is None:
            content.left_out.add(f"missing material: {name[:200]}")
        look = None if lines is None else materials.look(lines)
        parts.append(_part(geometry, geometry.face_materials == number, look))
        if parts[-1].material.texture >= 0 and np.isfinite(geometry.colors).all():
            content.left_out.add("vertex colours beside a texture")
    return Scene(parts, materials.textures, content.left_out)


def _read_lines(text: str) -> _Content:
    content, material = _Content(), -1
    lists = {"v": content.vertices, "vt": content.uvs, "vn": content.normals}
    for word, run in groupby(lines_of(text), itemgetter(0)):
        rests = [rest for _, rest in run]
        if word in lists:
            lists[word] += rests
        elif word in ("f", "fo"):
            content.faces += rests
            content.runs.append([len(rests), material, *(len(each) for each in lists.values())])
        elif word == "usemtl":
            material = content.materials.setdefault(rests[-1], len(content.materials))
        elif word == "mtllib":
            content.libraries += rests
        elif word in NOT_SHOWN:
            content.left_out.add(NOT_SHOWN[word])
    return content


def _references(content: _Content, sizes: Int[np.ndarray, " faces"]) -> Int[np.ndarray, "corners 3"]:
    """The places, from 0, that `7/2/3`, `7//3`, `7` or `-1` stand for, and -1 for what is not there.

    Negative numbers count back from the last element before the face.

    Raises UserError for vertices that do not exist; uvs and normals that do not are only named.
    """
    text = " ".join(content.faces)
    corners = text.split()
    slashes = {corner.count("/") for corner in corners}
    if len(slashes) == 1 and "//" not in text and "/ " not in text and text[-1] != "/":
        numbers = _numbers(text.replace("/", " ")).reshape(len(corners), -1)
        if not ((np.abs(numbers) < 2**53) & (numbers == np.rint(numbers))).all():  # false for NaN as well
            raise UserError("it has faces whose corners are no whole numbers; export it again")
        numbers = np.pad(numbers, ((0, 0), (0, 2)))[:, :3].astype(np.int64)
    else:
        rows = [[*corner.split("/"), "", ""][:3] for corner in corners]
        numbers = np.array([[int(word or 0) for word in row] for row in rows], np.int64).reshape(-1, 3)
    runs = np.array(content.runs, np.int64).reshape(-1, 5)
    before = np.repeat(np.repeat(runs[:, 2:], runs[:, 0], 0), sizes, 0)
    places = np.where(numbers > 0, numbers - 1, np.where(numbers < 0, before + numbers, -1))
    wrong = (places < 0) | (places >= [len(content.vertices), len(content.uvs), len(content.normals)])
    if wrong[:, 0].any():
        corner = corners[int(wrong[:, 0].argmax())]
        raise UserError(
            f"it has a face with the corner {corner[:40]!r}, which does not exist; export it again"
        )
    content.left_out |= {
        kind
        for column, kind in ((1, "texture coordinates that do not exist"), (2, "normals that do not exist"))
        if (wrong[:, column] & (numbers[:, column] != 0)).any()
    }
    return np.where(wrong, -1, places)


def _rows(lines: list[str], columns: int) -> Float[np.ndarray, "rows columns"]:
    """The first numbers of each line; those that are missing are 0."""
    if {len(line.split()) for line in lines} == {columns}:
        return _numbers(" ".join(lines)).reshape(-1, columns)
    words = [word for line in lines for word in [*line.split()[:columns], *["0"] * columns][:columns]]
    return np.array(words, np.float64).reshape(-1, columns)


def _numbers(text: str) -> Float[np.ndarray, " numbers"]:
    """The numbers in a text. Raises ValueError, or in older NumPy a warning, where something else stands."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.fromstring(text, np.float64, sep=" ")


def _geometry(content: _Content) -> _Geometry:
    positions = _rows(content.vertices, 3)
    colors = np.full(positions.shape, np.nan)
    colored = [number for number, line in enumerate(content.vertices) if len(line.split()) >= 6]
    if colored:  # x y z r g b, and perhaps alpha
        colors[colored] = _rows([content.vertices[number] for number in colored], 6)[:, 3:]
        colors /= 255 if colors[colored].max() > 1 else 1
    sizes = np.array([len(face.split()) for face in content.faces], np.int64)
    references = _references(content, sizes)
    if (sizes < 3).any():
        content.left_out.add("faces of fewer than three corners")
    triangles = triangulate(sizes, positions[references[:, 0]])
    face_of_corner = np.repeat(np.arange(len(sizes)), sizes)
    of_faces = np.repeat([run[1] for run in content.runs], [run[0] for run in content.runs]).astype(np.int64)
    face_materials = of_faces[face_of_corner[triangles[:, 0]]]
    uvs, normals = _rows(content.uvs, 2), _rows(content.normals, 3)
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
    vertex_colors = geometry.colors[vertex]
    if material.texture >= 0:  # scanners write both, of which the texture is the better one
        vertex_colors = np.full_like(vertex_colors, np.nan)
    return Part(corners, normals, _colors(vertex_colors, look), base, emission, material)


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
