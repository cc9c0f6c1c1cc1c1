"""Views of textured meshes by ray casting on a CPU, without GL. The paper renders 100k assets (Sec. 3.1).

Light, axes and cameras are those of the procedural objects, so that renders of meshes can train and test the
same models. Materials are a plain albedo: metalness, roughness, normal maps and transparency are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from jaxtyping import Float, Int, UInt32
from PIL import Image

from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.errors import UserError, choice
from recon_torch.views.cameras import Cameras

CREASE_DEG = 40.0  # edges sharper than this are shaded flat, whatever the file's normals say
GREY = 0.7  # the albedo of meshes without any colour


class UpAxis(StrEnum):
    """The axis of a file that points up.

    Y is that of glTF and of most .obj files: +Y is turned to +Z, and the front, +Z, to +X, where view 0 is.
    Z changes nothing.
    """

    Y = "y"
    Z = "z"


class Mesh(NamedTuple):
    """F triangles with attributes on each of their three corners.

    corners: positions inside the ball of radius 0.5, with +Z up.
    normals: unit vectors.
    colors: sRGB in [0, 1]. They are multiplied with the texture where there is one.
    uvs: places in the texture; v grows upwards.
    texture_index: the texture of each triangle; -1 for none.
    """

    corners: Float[np.ndarray, "F 3 3"]
    normals: Float[np.ndarray, "F 3 3"]
    colors: Float[np.ndarray, "F 3 3"]
    uvs: Float[np.ndarray, "F 3 2"]
    texture_index: Int[np.ndarray, " F"]
    textures: list[Float[np.ndarray, "height width 3"]]


def load_mesh(path: str | Path, up: UpAxis | str = UpAxis.Y) -> Mesh:
    """Reads a .glb, .gltf, .obj or .ply with all its parts, and scales it into the ball of radius 0.5.

    Raises:
        UserError: the file is missing, is no mesh or has no triangles, or `up` is not a `UpAxis`.
    """
    up = choice(UpAxis, up, f"the up axis of {path}")
    if not Path(path).is_file():
        raise UserError(f"no mesh at {path}; check the path")
    try:
        scene = trimesh.load_scene(path)
    except Exception as error:  # trimesh's readers raise whatever their parsers raise
        raise UserError(
            f"cannot read {path} as a mesh ({error}); give a .glb, .gltf, .obj or .ply file"
        ) from error
    return from_scene(scene, up, str(path))


def from_scene(scene: trimesh.Scene, up: UpAxis = UpAxis.Z, name: str = "the scene") -> Mesh:
    """All parts of a trimesh scene, each moved by its transform, as one mesh; see `load_mesh`."""
    textures: list[np.ndarray] = []
    parts = []
    for node in scene.graph.nodes_geometry:
        transform, geometry_name = scene.graph[node]
        geometry = scene.geometry[geometry_name]
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
            faces = np.asarray(geometry.faces)
            if np.linalg.det(transform[:3, :3]) < 0:
                faces = faces[:, ::-1]  # mirroring turns triangles inside out
            colors, uvs, texture = _appearance(geometry, faces)
            index = -1 if texture is None else len(textures)
            textures += [] if texture is None else [texture]
            parts.append((*_place(geometry, faces, transform), colors, uvs, np.full(len(colors), index)))
    if not parts:
        raise UserError(f"{name} has no triangles; point clouds and lines cannot be rendered")
    corners, normals, colors, uvs, texture_index = (
        np.concatenate(arrays) for arrays in zip(*parts, strict=True)
    )
    if up == UpAxis.Y:
        corners, normals = corners[..., [2, 0, 1]], normals[..., [2, 0, 1]]
    return Mesh(_normalise(corners, name), normals, colors, uvs, texture_index, textures)


def render(
    mesh: Mesh, cameras: Cameras, supersampling: int = 3
) -> tuple[Float[np.ndarray, "K H W 4"], Float[np.ndarray, "K H W 1"]]:
    """Renders RGBA and depth, float32, with `supersampling`^2 rays for each pixel.

    RGBA is in [0, 1], and its colours are not multiplied by alpha, as in PNG files. Depth is the mean of what
    the pixel covers, along the camera's z axis and in world units; it is 0 where alpha is 0.
    """
    scene = EmbreeScene(robust=True)
    TriangleMesh(scene, mesh.corners.astype(np.float32))
    views = [_render_view(mesh, scene, *rays, supersampling) for rays in _rays(cameras, supersampling)]
    rgba, depth = zip(*views, strict=True)
    return np.stack(rgba), np.stack(depth)


def _rays(cameras: Cameras, supersampling: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each view the camera centre [3] and directions [H*s, W*s, 3], of length 1 along the camera's z."""
    v, u = np.meshgrid(
        (np.arange(cameras.height * supersampling) + 0.5) / supersampling,
        (np.arange(cameras.width * supersampling) + 0.5) / supersampling,
        indexing="ij",
    )
    for w2c, intrinsics, origin in zip(cameras.w2c, cameras.intrinsics_px, cameras.positions, strict=True):
        x, y = (u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1]
        yield origin, np.stack([x, y, np.ones_like(x)], -1) @ w2c[:3, :3]


def _render_view(
    mesh: Mesh,
    scene: EmbreeScene,
    origin: Float[np.ndarray, "3"],
    directions: Float[np.ndarray, "rows columns 3"],
    supersampling: int,
) -> tuple[Float[np.ndarray, "H W 4"], Float[np.ndarray, "H W 1"]]:
    """RGBA and depth of one view; see `render`."""
    rows, columns = directions.shape[:2]
    rays = np.ascontiguousarray(directions.reshape(-1, 3), np.float32)
    hits = scene.run(np.tile(origin.astype(np.float32), (len(rays), 1)), rays, query="INTERSECT", output=True)
    hit = hits["primID"] >= 0
    samples = np.zeros((len(rays), 5), np.float32)  # premultiplied RGB, coverage, depth
    samples[hit, :3] = _shade(mesh, rays[hit], hits["primID"][hit], hits["u"][hit], hits["v"][hit])
    samples[hit, 3] = 1.0
    samples[hit, 4] = hits["tfar"][hit]  # rays have unit z, so their parameter is the depth
    pixels = samples.reshape(
        rows // supersampling, supersampling, columns // supersampling, supersampling, 5
    ).mean((1, 3))
    covered = np.maximum(pixels[..., 3:4], 1e-6)
    return np.concatenate([pixels[..., :3] / covered, pixels[..., 3:4]], -1), pixels[..., 4:] / covered


def _shade(
    mesh: Mesh,
    rays: Float[np.ndarray, "R 3"],
    triangles: Int[np.ndarray, " R"] | UInt32[np.ndarray, " R"],
    u: Float[np.ndarray, " R"],
    v: Float[np.ndarray, " R"],
) -> Float[np.ndarray, "R 3"]:
    """The colours of points at barycentric (1 - u - v, u, v) of triangles, which are lit from both sides."""
    weights = np.stack([1 - u - v, u, v], -1)[:, :, None]
    color, normal, uv = (
        (array[triangles] * weights).sum(1) for array in (mesh.colors, mesh.normals, mesh.uvs)
    )
    texture_index = mesh.texture_index[triangles]
    for index, texture in enumerate(mesh.textures):
        chosen = texture_index == index
        color[chosen] *= _bilinear(texture, uv[chosen])
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    # The triangle says which side is seen: at a silhouette its smooth normal may already point away.
    from_behind = (_outward(mesh.corners[triangles]) * rays).sum(-1, keepdims=True) > 0
    normal *= np.where(from_behind, -1.0, 1.0)
    return np.clip(color * (AMBIENT + (1 - AMBIENT) * (normal @ LIGHT)[:, None]), 0.0, 1.0)


def _bilinear(texture: Float[np.ndarray, "h w 3"], uv: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, "R 3"]:
    """Texture colours at uv. The texture repeats outside [0, 1], and texel centres are at +0.5."""
    height, width = texture.shape[:2]
    column, row = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right_share, low_share = (column - left)[:, None], (row - top)[:, None]
    left, right, top, low = left % width, (left + 1) % width, top % height, (top + 1) % height
    upper = texture[top, left] * (1 - right_share) + texture[top, right] * right_share
    lower = texture[low, left] * (1 - right_share) + texture[low, right] * right_share
    return upper * (1 - low_share) + lower * low_share


def _place(
    geometry: trimesh.Trimesh, faces: Int[np.ndarray, "F 3"], transform: Float[np.ndarray, "4 4"]
) -> tuple[Float[np.ndarray, "F 3 3"], Float[np.ndarray, "F 3 3"]]:
    """The corners' positions and unit normals in the frame of the scene."""
    corners = (geometry.vertices @ transform[:3, :3].T + transform[:3, 3])[faces]
    flat = _outward(corners)[:, None]
    smooth = (geometry.vertex_normals @ np.linalg.pinv(transform[:3, :3]))[faces]
    flat, smooth = (n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-20) for n in (flat, smooth))
    creased = (flat * smooth).sum(-1, keepdims=True) < np.cos(np.radians(CREASE_DEG))
    return corners, np.where(creased, flat, smooth)


def _outward(corners: Float[np.ndarray, "F 3 3"]) -> Float[np.ndarray, "F 3"]:
    """The normals of triangles, not of unit length. Seen from their tips, corners run counter-clockwise."""
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _appearance(
    geometry: trimesh.Trimesh, faces: Int[np.ndarray, "F 3"]
) -> tuple[Float[np.ndarray, "F 3 3"], Float[np.ndarray, "F 3 2"], Float[np.ndarray, "h w 3"] | None]:
    """The corners' colours and uvs, and the texture if there is one."""
    colors = np.full((len(faces), 3, 3), GREY)
    uvs = np.zeros((len(faces), 3, 2))
    visual: Any = geometry.visual  # its attributes differ from kind to kind
    if visual.kind == "vertex":
        return visual.vertex_colors[faces][..., :3] / 255.0, uvs, None
    if visual.kind == "face":
        return np.repeat(visual.face_colors[:, None, :3] / 255.0, 3, axis=1), uvs, None
    if visual.kind != "texture":
        return colors, uvs, None
    factor, image = _material(visual.material)
    colors[:] = factor
    if image is None or visual.uv is None:
        return colors, uvs, None
    uvs = np.asarray(visual.uv, np.float64)[faces]
    return colors, uvs, np.asarray(image.convert("RGB"), np.float32) / 255.0


def _material(
    material: trimesh.visual.material.SimpleMaterial | trimesh.visual.material.PBRMaterial,
) -> tuple[Float[np.ndarray, "3"] | np.floating, Image.Image | None]:
    """The colour, in sRGB, and the image, if there is one, of a glTF or .obj material."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        linear = 1.0 if material.baseColorFactor is None else material.baseColorFactor[:3] / 255.0
        # glTF's factors are linear, its images sRGB.
        return np.power(linear, 1 / 2.2), material.baseColorTexture
    return (np.ones(3) if material.image else material.diffuse[:3] / 255.0), material.image


def _normalise(corners: Float[np.ndarray, "F 3 3"], name: str) -> Float[np.ndarray, "F 3 3"]:
    """Moves the bounding box's centre to the origin, and scales the farthest point to distance 0.5."""
    points = corners.reshape(-1, 3)
    centred = points - (points.min(0) + points.max(0)) / 2
    radius = np.linalg.norm(centred, axis=-1).max()
    if not np.isfinite(radius) or radius == 0:
        raise UserError(f"{name} has no extent, or positions that are not finite")
    return (centred * (0.5 / radius)).reshape(corners.shape)
