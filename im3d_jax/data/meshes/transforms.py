"""Where the nodes of a glTF file put its triangles (glTF 2.0, Sec. 3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from im3d_jax.data.meshes.parts import Part

Matrix = Float[np.ndarray, "4 4"]


def local_matrix(node: Mapping[str, Any]) -> Matrix:
    """The matrix of a node, or of its translation, rotation (a quaternion x, y, z, w) and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), np.float64)
    norm = x * x + y * y + z * z + w * w
    s = 2 / norm if norm > 0 else 0.0
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def moved(part: Part, faces: Int[np.ndarray, "F 3"], matrix: Float[np.ndarray, "*V 4 4"]) -> Part:
    """A part moved by one matrix, or by one for each vertex; faces says which vertices are at its corners."""
    linear, shift = matrix[..., :3, :3], matrix[..., :3, 3]
    if matrix.ndim == 2:
        linear, shift = linear[None, None], shift[None, None]
    else:
        linear, shift = linear[faces], shift[faces]
    mirrored = np.broadcast_to(np.linalg.det(linear) < 0, part.corners.shape[:2])
    normals = part.normals
    if normals is not None:
        normals = _apply(_cofactors(linear), normals) * np.where(mirrored, -1, 1)[..., None]
    part = part._replace(corners=_apply(linear, part.corners) + shift, normals=normals)
    return _turned(part, mirrored[:, 0]) if mirrored.any() else part


def _apply(
    linear: Float[np.ndarray, "#F #corners 3 3"], vectors: Float[np.ndarray, "F corners 3"]
) -> Float[np.ndarray, "F corners 3"]:
    return sum(linear[..., axis] * vectors[..., axis, None] for axis in range(3))


def _cofactors(linear: Float[np.ndarray, "*shape 3 3"]) -> Float[np.ndarray, "*shape 3 3"]:
    """det(M) M^-T, which turns normals as M turns surfaces, and exists for singular matrices as well."""
    rows = [np.cross(linear[..., (i + 1) % 3, :], linear[..., (i + 2) % 3, :]) for i in range(3)]
    return np.stack(rows, -2)


def _turned(part: Part, mirrored: Bool[np.ndarray, " F"]) -> Part:
    """The part with the order of corners reversed where mirroring has turned triangles inside out."""
    order = np.where(mirrored[:, None], [0, 2, 1], [0, 1, 2])[..., None]
    corners, colors = np.take_along_axis(part.corners, order, 1), np.take_along_axis(part.colors, order, 1)
    normals, uvs, emission_uvs = (
        None if array is None else np.take_along_axis(array, order, 1)
        for array in (part.normals, part.uvs, part.emission_uvs)
    )
    return Part(corners, normals, colors, uvs, emission_uvs, part.material)
