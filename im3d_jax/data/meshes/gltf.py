"""Reads glTF 2.0, as .glb or .gltf: nodes, skins, morph targets and instances, in the pose of rest."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from im3d_jax.data.meshes.accessors import TYPES, Accessors, item, to_unit
from im3d_jax.data.meshes.compression import DRACO, MESHOPT, NoDecoder, decode_draco
from im3d_jax.data.meshes.gltf_materials import (
    BASISU,
    PICTURES,
    SPECULAR_GLOSSINESS,
    STRENGTH,
    TRANSFORM,
    UNLIT,
    Look,
    Materials,
    TextureUse,
)
from im3d_jax.data.meshes.parts import Material, Part, Scene, check_triangles, grey
from im3d_jax.data.meshes.pictures import TexelBudget
from im3d_jax.data.meshes.transforms import Matrix, local_matrix, moved
from recon_torch.errors import UserError

MAGIC = b"glTF"
INSTANCING, VISIBILITY = "EXT_mesh_gpu_instancing", "KHR_node_visibility"
HONOURED = {
    *(DRACO, *MESHOPT, "KHR_mesh_quantization", INSTANCING, VISIBILITY),
    *(TRANSFORM, UNLIT, STRENGTH, SPECULAR_GLOSSINESS, BASISU, *PICTURES),
}
"""Extensions that are read. A texture that needs KHR_texture_basisu is refused when it is used."""

WITHOUT_LOOKS = {"KHR_xmp", "KHR_xmp_json_ld", "KHR_materials_ior", "FB_ngon_encoding"}
"""Extensions that change nothing of what is rendered."""

MODES = {0: "points", 1: "lines", 2: "lines", 3: "lines"}
TRIANGLES, STRIP, FAN = 4, 5, 6


def read_gltf(path: Path) -> Scene:
    """All triangles of the file's scene. Raises UserError if the file needs what is not read."""
    document, blob = _parse(path.read_bytes())
    _check_requirements(document)
    return _Reader(document, Accessors(document, path.parent, blob), path.name).scene()


def _parse(content: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON and the binary chunk of either form, told apart by the first bytes and not by the suffix."""
    if content[:4] != MAGIC:
        return json.loads(content.decode("utf-8-sig")), None
    version, length = struct.unpack_from("<II", content, 4)
    if version != 2:
        raise UserError(f"it is glTF {version}; export it as glTF 2.0")
    if length > len(content):
        raise UserError(f"it ends after {len(content):,} of {length:,} bytes; copy it again")
    chunks: dict[bytes, bytes] = {}
    start = 12
    while start + 8 <= length:
        size, kind = struct.unpack_from("<I4s", content, start)
        chunks.setdefault(kind, content[start + 8 : start + 8 + size])
        start += 8 + size
    return json.loads(chunks[b"JSON"].decode()), chunks.get(b"BIN\0")


def _check_requirements(document: Mapping[str, Any]) -> None:
    asset = document["asset"]
    if not str(asset["version"]).startswith("2.") or asset.get("minVersion", "2.0") != "2.0":
        raise UserError(f"it is glTF {asset.get('minVersion', asset['version'])}; export it as glTF 2.0")
    if unknown := sorted(set(document.get("extensionsRequired", [])) - HONOURED - WITHOUT_LOOKS):
        raise UserError(f"it needs {', '.join(unknown)}, which is not read; export it without")


class _Reader:
    """Reads one document."""

    def __init__(self, document: Mapping[str, Any], accessors: Accessors, name: str):
        self._document, self._accessors, self._name = document, accessors, name
        undeclared = {name for each in document.get("materials", []) for name in each.get("extensions", {})}
        asked = undeclared | set(document.get("extensionsUsed", []))
        self._left_out = asked - HONOURED - WITHOUT_LOOKS
        self._materials = Materials(document, accessors, TexelBudget(name), self._left_out)
        self._world = self._world_matrices()
        self._decoded: dict[
            int, tuple[dict[str, Num[np.ndarray, "V components"]], Int[np.ndarray, "F 3"]]
        ] = {}

    def scene(self) -> Scene:
        parts, count = [], 0
        for part in self._parts():
            count += len(part.corners)
            check_triangles(count, self._name)
            parts.append(part)
        if self._document.get("animations"):
            self._left_out.add("animation")
        if len(self._document.get("scenes", [])) > 1:
            self._left_out.add("other scenes")
        return Scene(parts, self._materials.textures, self._left_out)

    # ---- Nodes ----

    def _world_matrices(self) -> dict[int, Matrix]:
        """The matrix from each node to the world."""
        nodes = self._document.get("nodes", [])
        listed = [child for node in nodes for child in node.get("children", [])]
        children = set(listed)
        if len(children) < len(listed):
            raise UserError("it has a node with two parents; export it again")
        open_nodes = [(index, np.eye(4)) for index in range(len(nodes)) if index not in children]
        world: dict[int, Matrix] = {}
        while open_nodes:
            index, parent = open_nodes.pop()
            node = item(self._document, "nodes", index)
            world[index] = parent @ local_matrix(node)
            open_nodes += [(child, world[index]) for child in node.get("children", [])]
        if len(world) < len(nodes):
            raise UserError("it has a node that is its own ancestor; export it again")
        return world

    def _visible_nodes(self) -> Iterator[int]:
        """The nodes of the default scene, or else of the first, or else all of them."""
        nodes = self._document.get("nodes", [])
        if self._document.get("scenes"):
            open_nodes = list(item(self._document, "scenes", self._document.get("scene", 0)).get("nodes", []))
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            open_nodes = [index for index in range(len(nodes)) if index not in children]
        open_nodes.reverse()
        while open_nodes:
            index = open_nodes.pop()
            node = item(self._document, "nodes", index)
            if node.get("extensions", {}).get(VISIBILITY, {}).get("visible", True):
                yield index
                open_nodes += reversed(node.get("children", []))

    def _parts(self) -> Iterator[Part]:
        for index in self._visible_nodes():
            node = self._document["nodes"][index]
            if "mesh" not in node:
                continue
            mesh = item(self._document, "meshes", node["mesh"])
            weights = node.get("weights", mesh.get("weights", []))
            for primitive in mesh["primitives"]:
                mode = primitive.get("mode", TRIANGLES)
                if mode in MODES:
                    self._left_out.add(MODES[mode])
                    continue
                vertices = self._vertices(primitive, weights)
                yield from self._placed(index, node, primitive, vertices)

    def _placed(
        self, index: int, node: Mapping[str, Any], primitive: Mapping[str, Any], vertices: _Vertices
    ) -> Iterator[Part]:
        """A primitive where its node puts it: by its joints, or by its matrix and instances."""
        part = self._part(primitive, vertices)
        if "skin" in node:
            yield moved(part, vertices.faces, self._joint_matrices(node["skin"], vertices))
            return
        for instance in self._instances(node, len(part.corners)):
            yield moved(part, vertices.faces, self._world[index] @ instance)

    def _joint_matrices(self, skin_index: int, vertices: _Vertices) -> Float[np.ndarray, "V 4 4"]:
        """The matrix of each vertex. The joints count, and the transform of the mesh's own node does not."""
        skin = item(self._document, "skins", skin_index)
        joints = np.stack([self._world[joint] for joint in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self._accessors.array(skin["inverseBindMatrices"]).astype(np.float64)
            joints = joints @ inverse.reshape(-1, 4, 4).transpose(0, 2, 1)[: len(joints)]
        numbers, weights = vertices.joints, vertices.weights
        total = weights.sum(1, keepdims=True)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1), 0)
        matrices = np.zeros((len(numbers), 4, 4))
        for column in range(numbers.shape[1]):
            matrices += joints[numbers[:, column]] * weights[:, column, None, None]
        matrices[total[:, 0] == 0] = np.eye(4)
        return matrices

    def _instances(self, node: Mapping[str, Any], num_triangles: int) -> Iterator[Matrix]:
        attributes = node.get("extensions", {}).get(INSTANCING, {}).get("attributes")
        if not attributes:
            yield np.eye(4)
            return
        arrays = {
            name: self._accessors.array(attributes[name], unit=name == "ROTATION")
            for name in ("TRANSLATION", "ROTATION", "SCALE")
            if name in attributes
        }
        count = min(len(array) for array in arrays.values()) if arrays else 0
        check_triangles(count * num_triangles, self._name)
        for number in range(count):
            yield local_matrix({name.lower(): array[number] for name, array in arrays.items()})

    # ---- Primitives ----

    def _vertices(self, primitive: Mapping[str, Any], weights: Sequence[float]) -> _Vertices:
        """The arrays of a primitive, morphed by its default weights."""
        if id(primitive) not in self._decoded:  # because many nodes may show the same mesh
            self._decoded[id(primitive)] = self._attributes(primitive)
        arrays, faces = dict(self._decoded[id(primitive)][0]), self._decoded[id(primitive)][1]
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            if weight:
                for name in target.keys() & arrays.keys():
                    unit = name.startswith("COLOR_")
                    delta = self._accessors.array(target[name], unit=unit).astype(np.float64)
                    delta = delta[:, : arrays[name].shape[1]]
                    arrays[name] = arrays[name].astype(np.float64)
                    arrays[name][:, : delta.shape[1]] += weight * delta
        if len(faces) and faces.max() >= len(arrays["POSITION"]):
            raise UserError("it has indices of vertices that it does not have; export it again")
        if {"COLOR_1", "COLOR_2"} & arrays.keys():
            self._left_out.add("second vertex colours")
        return _Vertices(arrays, faces)

    def _attributes(
        self, primitive: Mapping[str, Any]
    ) -> tuple[dict[str, Num[np.ndarray, "V components"]], Int[np.ndarray, "F 3"]]:
        """All attributes that are read, and the triangles."""
        places = {name: place for name, place in primitive["attributes"].items() if _is_read(name)}
        arrays, faces = (
            self._draco(primitive, places) if DRACO in primitive.get("extensions", {}) else ({}, None)
        )
        for name, place in places.items():
            if name not in arrays:
                arrays[name] = self._accessors.array(place, unit=name.startswith(("COLOR_", "WEIGHTS_")))
        if "POSITION" not in arrays:
            return {"POSITION": np.zeros((0, 3))}, np.zeros((0, 3), np.int64)
        count = len(arrays["POSITION"])
        if any(len(array) != count for array in arrays.values()):
            raise UserError("it has attributes of different length; export it again")
        if faces is None:
            if "indices" in primitive:
                indices = self._accessors.array(primitive["indices"])[:, 0].astype(np.int64)
            else:
                indices = np.arange(count)
            faces = _triangles(indices, primitive.get("mode", TRIANGLES))
        return arrays, faces

    def _draco(
        self, primitive: Mapping[str, Any], places: Mapping[str, int]
    ) -> tuple[dict[str, Num[np.ndarray, "V components"]], Int[np.ndarray, "F 3"] | None]:
        """What is compressed of a primitive. Nothing if that cannot be decoded and there is a plain copy."""
        extension = primitive["extensions"][DRACO]
        content, _ = self._accessors.view(extension["bufferView"])
        numbers = {name: number for name, number in extension["attributes"].items() if name in places}
        try:
            faces, arrays = decode_draco(bytes(content), numbers)
        except NoDecoder:
            if not all(self._accessors.stored(place) for place in places.values()):
                raise
            return {}, None
        for name, array in arrays.items():
            accessor = item(self._document, "accessors", places[name])
            if accessor.get("normalized", False) or name.startswith(("COLOR_", "WEIGHTS_")):
                arrays[name] = to_unit(array, TYPES[accessor["componentType"]])
        return arrays, faces.astype(np.int64)

    def _part(self, primitive: Mapping[str, Any], vertices: _Vertices) -> Part:
        """A primitive with its material, in its own frame."""
        arrays, faces = vertices.arrays, vertices.faces
        look = None
        if "material" in primitive:
            look = self._materials.look(primitive["material"])
        normals = arrays.get("NORMAL")
        material, base, emission = look.material if look else Material(), None, None
        if look:
            base, emission = self._uvs(look.base, vertices), self._uvs(look.emission, vertices)
            material = material._replace(
                texture=-1 if base is None else material.texture,
                emission_texture=-1 if emission is None else material.emission_texture,
            )
        return Part(
            arrays["POSITION"].astype(np.float64)[faces],
            None if normals is None else normals.astype(np.float64)[faces],
            _colors(arrays.get("COLOR_0"), faces, look),
            base,
            emission,
            material,
        )

    def _uvs(self, use: TextureUse | None, vertices: _Vertices) -> Float[np.ndarray, "F 3 2"] | None:
        if use is None:
            return None
        uvs = vertices.arrays.get(f"TEXCOORD_{use.uv_set}")
        if uvs is None:
            self._left_out.add(f"texture without coordinates: TEXCOORD_{use.uv_set}")
            return None
        return use.place(uvs.astype(np.float64))[vertices.faces]


class _Vertices:
    """The attributes and triangles of a primitive."""

    def __init__(self, arrays: dict[str, Num[np.ndarray, "V components"]], faces: Int[np.ndarray, "F 3"]):
        self.arrays, self.faces = arrays, faces

    @property
    def joints(self) -> Int[np.ndarray, "V joints"]:
        return self._sets("JOINTS_").astype(np.int64)

    @property
    def weights(self) -> Float[np.ndarray, "V joints"]:
        return self._sets("WEIGHTS_").astype(np.float64)

    def _sets(self, prefix: str) -> Num[np.ndarray, "V components"]:
        names = sorted(name for name in self.arrays if name.startswith(prefix))
        if not names:
            return np.zeros((len(self.arrays["POSITION"]), 1))
        return np.concatenate([self.arrays[name] for name in names], 1)


def _is_read(name: str) -> bool:
    return name in ("POSITION", "NORMAL") or name.startswith(("TEXCOORD_", "COLOR_", "JOINTS_", "WEIGHTS_"))


def _triangles(indices: Int[np.ndarray, " I"], mode: int) -> Int[np.ndarray, "F 3"]:
    """The triangles of a list, a strip or a fan; corners run counter-clockwise."""
    if mode == TRIANGLES:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    count = max(len(indices) - 2, 0)
    if mode == STRIP:
        first, odd = np.arange(count), np.arange(count) % 2
        return indices[np.stack([first, first + 1 + odd, first + 2 - odd], -1)]
    if mode == FAN:
        second = np.arange(1, count + 1)
        return indices[np.stack([second, second + 1, np.zeros_like(second)], -1)]
    raise UserError(f"it has a primitive of mode {mode}, which glTF does not have; export it again")


def _colors(
    color: Num[np.ndarray, "V components"] | None, faces: Int[np.ndarray, "F 3"], look: Look | None
) -> Float[np.ndarray, "F 3 4"]:
    """Linear RGBA of the corners: the material's factor times COLOR_0."""
    if look is None and color is None:
        return grey(len(faces))
    colors = np.ones((len(faces), 3, 4)) * (look.factor if look else 1.0)
    if color is not None:
        colors[..., : color.shape[1]] *= np.clip(color, 0, None)[faces]
    return colors
