"""What mesh files are read to: a `Mesh`, put together of the `Part`s that a reader finds in a file."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from im3d_jax.data.meshes.colors import linear_from_srgb
from recon_torch.errors import UserError

CREASE_DEG = 40.0  # edges sharper than this are shaded flat, whatever the file's normals say
GREY = 0.7  # the albedo, in sRGB, of surfaces that have neither a material nor colours
BRIGHTEST = 1e4  # a factor that no surface has; a file with more is damaged
MAX_TRIANGLES = 10_000_000
FARTHEST_UV = 1e5  # coordinates beyond have lost their fraction, or are no coordinates at all

Vec3s = Float[np.ndarray, "F 3 3"]
"""A vector at each corner of F triangles."""


class AlphaMode(StrEnum):
    """What alpha does, as in glTF: nothing, it cuts out what is below a cutoff, or it is see-through."""

    OPAQUE = "OPAQUE"
    MASK = "MASK"
    BLEND = "BLEND"


class Wrap(StrEnum):
    """How a texture goes on outside [0, 1]."""

    REPEAT = "repeat"
    CLAMP = "clamp"
    MIRROR = "mirror"


class Texture(NamedTuple):
    """A picture in sRGB with alpha, not multiplied by it, and how it is sampled.

    wrap: along u and along v.
    nearest: take the nearest texel, and do not interpolate between four.
    """

    pixels: UInt8[np.ndarray, "height width 4"]
    wrap: tuple[Wrap, Wrap] = (Wrap.REPEAT, Wrap.REPEAT)
    nearest: bool = False


class Material(NamedTuple):
    """How a surface looks, but for the colours at its corners.

    texture, emission_texture: indices into the textures of the mesh; -1 for none.
    emission: linear RGB. It is multiplied with its texture, and added to the lit colour.
    unlit: the light does not count, and there is no emission.
    """

    texture: int = -1
    alpha_mode: AlphaMode = AlphaMode.OPAQUE
    alpha_cutoff: float = 0.5
    unlit: bool = False
    emission: tuple[float, float, float] = (0.0, 0.0, 0.0)
    emission_texture: int = -1


class Part(NamedTuple):
    """F triangles of one material, in the frame of the file.

    normals: None lets `smooth_normals` find them. They need not be of unit length.
    colors: linear RGBA, which is multiplied with the texture.
    uvs, emission_uvs: places in the two textures; v grows downwards. None where there is no texture.
    """

    corners: Vec3s
    normals: Vec3s | None
    colors: Float[np.ndarray, "F 3 4"]
    uvs: Float[np.ndarray, "F 3 2"] | None = None
    emission_uvs: Float[np.ndarray, "F 3 2"] | None = None
    material: Material = Material()


class Scene(NamedTuple):
    """What a reader finds in a file.

    left_out: what the file asks for and the renders do not show, such as "normal map". What differs from
        file to file follows a colon: "missing texture: wood.png".
    """

    parts: list[Part]
    textures: list[Texture]
    left_out: set[str]


class Mesh(NamedTuple):
    """F triangles with attributes on each of their three corners.

    corners: positions with +Z up, inside the ball of radius 0.5 unless `load_mesh` was told to leave it.
    normals: unit vectors.
    colors: linear RGBA. They are multiplied with the texture where there is one.
    uvs, emission_uvs: places in the textures; v grows downwards from the picture's upper edge.
    material_index: of each triangle.
    left_out: sorted; see `Scene`.
    """

    corners: Float32[np.ndarray, "F 3 3"]
    normals: Float32[np.ndarray, "F 3 3"]
    colors: Float32[np.ndarray, "F 3 4"]
    uvs: Float32[np.ndarray, "F 3 2"]
    emission_uvs: Float32[np.ndarray, "F 3 2"]
    material_index: Int[np.ndarray, " F"]
    materials: list[Material]
    textures: list[Texture]
    left_out: tuple[str, ...] = ()

    @property
    def see_through(self) -> Bool[np.ndarray, " F"]:
        """The triangles that rays may pass through."""
        modes = np.array([material.alpha_mode != AlphaMode.OPAQUE for material in self.materials])
        return modes[self.material_index]


def assemble(scene: Scene, name: str, *, y_up: bool, in_ball: bool = True) -> Mesh:
    """All parts as one mesh, scaled into the ball of radius 0.5 unless it is to stay where it is.

    Args:
        name: of the file, for errors.
        y_up: turn +Y to +Z, and the front, +Z, to +X, where view 0 is.

    Raises:
        UserError: there are no triangles, too many of them, or they have no extent.
    """
    parts = [part for part in scene.parts if len(part.corners)]
    if not parts:
        others = " and ".join(sorted(scene.left_out & {"points", "lines", "triangle strips"}))
        raise UserError(
            f"{name} has no triangles{others and ', only ' + others}; nothing of it can be rendered"
        )
    check_triangles(sum(len(part.corners) for part in parts), name)
    corners = np.concatenate([part.corners for part in parts])
    fitted = _in_unit_ball(corners, name)  # also if it is not asked for, as it refuses what has no extent
    corners = fitted if in_ball else corners
    normals = np.concatenate([_creased_normals(part) for part in parts])
    if not np.isfinite([(part.material.alpha_cutoff, *part.material.emission) for part in parts]).all():
        raise UserError(f"{name} has a material whose numbers are not finite; export it again")
    colors = [np.clip(np.nan_to_num(part.colors), 0, BRIGHTEST).astype(np.float32) for part in parts]
    mended = not all(np.isfinite(part.colors).all() for part in parts)
    numbers: dict[Material, int] = {}
    material_of_part = [numbers.setdefault(part.material, len(numbers)) for part in parts]
    if y_up:
        corners, normals = corners[..., [2, 0, 1]], normals[..., [2, 0, 1]]
    return Mesh(
        corners.astype(np.float32),
        normals.astype(np.float32),
        np.concatenate(colors),
        np.concatenate([_finite_uvs(part.uvs, len(part.corners)) for part in parts]),
        np.concatenate([_finite_uvs(part.emission_uvs, len(part.corners)) for part in parts]),
        np.repeat(material_of_part, [len(part.corners) for part in parts]),
        list(numbers),
        scene.textures,
        tuple(sorted(scene.left_out | ({"colours that are no numbers"} if mended else set()))),
    )


def check_triangles(count: int, name: str) -> None:
    """Raises UserError if a mesh has more triangles than are rendered."""
    if count > MAX_TRIANGLES:
        raise UserError(f"{name} has {count:,} triangles; simplify it to at most {MAX_TRIANGLES:,}")


def grey(count: int) -> Float[np.ndarray, "F 3 4"]:
    """The colours of F triangles that have neither a material nor colours."""
    colors = np.ones((count, 3, 4))
    colors[..., :3] = linear_from_srgb(np.array(GREY))
    return colors


def flat_normals(corners: Vec3s) -> Float[np.ndarray, "F 3"]:
    """The normals of triangles, not of unit length. Seen from their tips, corners run counter-clockwise."""
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def smooth_normals(corners: Vec3s, uvs: Float[np.ndarray, "F 3 2"] | None) -> Vec3s:
    """The mean normal of the triangles that meet in a corner, weighted by their angles there.

    Triangles meet where position and texture coordinates are equal, so that seams of the texture, which
    artists lay along sharp edges, stay sharp.
    """
    keys = corners if uvs is None else np.concatenate([corners, uvs], -1)
    vertex = _numbers_of_equals(keys.reshape(-1, keys.shape[-1]))
    edges = _unit(np.roll(corners, -1, 1) - corners)
    angles = np.arccos(np.clip(-(edges * np.roll(edges, 1, 1)).sum(-1), -1, 1))
    weighted = (_unit(flat_normals(corners))[:, None] * angles[..., None]).reshape(-1, 3)
    summed = np.stack([np.bincount(vertex, weighted[:, axis]) for axis in range(3)], -1)
    return summed[vertex].reshape(corners.shape)


def _numbers_of_equals(rows: Float[np.ndarray, "rows columns"]) -> Int[np.ndarray, " rows"]:
    """A number for each row, the same for equal rows. A hash of 64 bits stands for the row, to sort fast."""
    bits = (np.ascontiguousarray(rows, np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    hashed = np.zeros(len(rows), np.uint64)
    for column in bits.T:
        hashed = (hashed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return np.unique(hashed, return_inverse=True)[1]


def _creased_normals(part: Part) -> Vec3s:
    """Unit normals: the file's or smooth ones, but those of the triangle where they are far from these."""
    normals = part.normals
    if normals is None:
        normals = smooth_normals(part.corners, part.uvs)
    flat, smooth = _unit(flat_normals(part.corners))[:, None], _unit(np.nan_to_num(normals))
    creased = (flat * smooth).sum(-1, keepdims=True) < np.cos(np.radians(CREASE_DEG))
    return np.where(creased, flat, smooth)


def _unit(vectors: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    with np.errstate(over="ignore"):  # those that are too long for a float become 0
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)


def _finite_uvs(uvs: Float[np.ndarray, "F 3 2"] | None, count: int) -> Float32[np.ndarray, "F 3 2"]:
    if uvs is None:
        return np.zeros((count, 3, 2), np.float32)
    return np.clip(np.nan_to_num(uvs), -FARTHEST_UV, FARTHEST_UV).astype(np.float32)


def _in_unit_ball(corners: Vec3s, name: str) -> Vec3s:
    """Moves the bounding box's centre to the origin, and scales the farthest point to distance 0.5."""
    points = corners.reshape(-1, 3).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        centred = points - (points.min(0) / 2 + points.max(0) / 2)
        radius = np.sqrt((centred**2).sum(-1).max())
    if not np.isfinite(radius) or radius == 0:
        raise UserError(f"{name} has no extent, or positions that are not finite; repair it in an editor")
    return (centred * (0.5 / radius)).reshape(corners.shape)
