"""Views of meshes by ray casting on a CPU, without GL. The paper renders 100k assets (Sec. 3.1).

Light, axes and cameras are those of the procedural objects, so that renders of meshes can train and test the
same models. Surfaces are matt and seen from both sides, also those that a file calls single-sided; metalness,
roughness and normal maps are left out (docs/data.md lists what is read).

Texture, factor and vertex colours are multiplied as linear colours, as glTF asks for. The product is turned
to sRGB, and light and transparency work on that, because the procedural objects have sRGB albedos, and
because whoever puts RGBA pictures over a background blends sRGB as well. Emission is added in linear light.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from jaxtyping import Bool, Float, Int

from im3d_jax.data.meshes.colors import LINEAR_OF_BYTE, linear_from_srgb, srgb_from_linear
from im3d_jax.data.meshes.parts import AlphaMode, Mesh, Texture, Wrap
from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.views.cameras import Cameras

RAYS_AT_ONCE = 2**18  # 200 MB of attributes
MAX_LAYERS = 64  # surfaces that a ray passes through; what lies behind is not seen
STEP = 1e-5  # so far behind a surface a ray goes on; nearer surfaces count as one
OPAQUE_ENOUGH = 1 / 512  # less light than that from behind does not change a pixel


class _Surfaces(NamedTuple):
    """Triangles of a mesh in an Embree scene. indices: of these in the mesh."""

    scene: EmbreeScene
    indices: Int[np.ndarray, " T"]


class _Hits(NamedTuple):
    """Where rays meet triangles. triangle: -1 for none. depth: the ray parameter. u, v: barycentric."""

    triangle: Int[np.ndarray, " R"]
    depth: Float[np.ndarray, " R"]
    u: Float[np.ndarray, " R"]
    v: Float[np.ndarray, " R"]

    def of(self, chosen: Bool[np.ndarray, " R"]) -> _Hits:
        return _Hits(*(array[chosen] for array in self))


def render(
    mesh: Mesh, cameras: Cameras, supersampling: int = 3
) -> tuple[Float[np.ndarray, "K H W 4"], Float[np.ndarray, "K H W 1"]]:
    """Renders RGBA and depth, float32, with `supersampling`^2 rays for each pixel.

    RGBA is in [0, 1], and its colours are not multiplied by alpha, as in PNG files. Alpha is the share of the
    pixel that is covered, less what see-through surfaces let pass. Depth is the mean of what makes up the
    alpha, along the camera's z axis and in world units; it is 0 where alpha is 0.
    """
    see_through = mesh.see_through
    opaque, layers = (_surfaces(mesh, np.flatnonzero(each)) for each in (~see_through, see_through))
    views = [
        _render_view(mesh, opaque, layers, *rays, supersampling) for rays in _rays(cameras, supersampling)
    ]
    rgba, depth = zip(*views, strict=True)
    return np.stack(rgba), np.stack(depth)


def _surfaces(mesh: Mesh, indices: Int[np.ndarray, " T"]) -> _Surfaces | None:
    if not len(indices):
        return None
    scene = EmbreeScene(robust=True)
    TriangleMesh(scene, np.ascontiguousarray(mesh.corners[indices]))
    return _Surfaces(scene, indices)


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
    opaque: _Surfaces | None,
    layers: _Surfaces | None,
    origin: Float[np.ndarray, "3"],
    directions: Float[np.ndarray, "rows columns 3"],
    supersampling: int,
) -> tuple[Float[np.ndarray, "H W 4"], Float[np.ndarray, "H W 1"]]:
    """RGBA and depth of one view; see `render`."""
    rows, columns = directions.shape[:2]
    rays = np.ascontiguousarray(directions.reshape(-1, 3), np.float32)
    samples = np.concatenate(
        [
            _trace(mesh, opaque, layers, origin.astype(np.float32), rays[start : start + RAYS_AT_ONCE])
            for start in range(0, len(rays), RAYS_AT_ONCE)
        ]
    )
    pixels = samples.reshape(
        rows // supersampling, supersampling, columns // supersampling, supersampling, 5
    ).mean((1, 3))
    covered = np.maximum(pixels[..., 3:4], 1e-6)
    return np.concatenate([pixels[..., :3] / covered, pixels[..., 3:4]], -1), pixels[..., 4:] / covered


def _trace(
    mesh: Mesh,
    opaque: _Surfaces | None,
    layers: _Surfaces | None,
    origin: Float[np.ndarray, "3"],
    rays: Float[np.ndarray, "R 3"],
) -> Float[np.ndarray, "R 5"]:
    """For each ray RGB and depth, both multiplied by alpha, and alpha between them.

    The nearest opaque surface is found first. Then rays pass through the see-through ones before it, from
    front to back. One that coincides with an opaque surface, such as a decal, lies before it.
    """
    samples, passing = np.zeros((len(rays), 5), np.float32), np.ones(len(rays), np.float32)
    wall = _hits(opaque, np.tile(origin, (len(rays), 1)), rays)
    active, start = np.arange(len(rays)), np.zeros(len(rays), np.float32)
    previous = np.full(len(rays), -1)
    for _ in range(MAX_LAYERS if layers else 0):
        hits = _hits(layers, origin + start[active, None] * rays[active], rays[active])
        hits = hits._replace(depth=hits.depth + start[active])
        before = (hits.triangle >= 0) & (hits.depth <= wall.depth[active] + STEP)
        active, hits = active[before], hits.of(before)
        fresh = hits.triangle != previous[active]  # a flat triangle is hit once; again is rounding
        _add(samples, passing, active[fresh], mesh, rays, hits.of(fresh))
        start[active], previous[active] = hits.depth + STEP, hits.triangle
        active = active[passing[active] > OPAQUE_ENOUGH]
        if not len(active):
            break
    ends = (wall.triangle >= 0) & (passing > OPAQUE_ENOUGH)
    _add(samples, passing, np.flatnonzero(ends), mesh, rays, wall.of(ends))
    return samples


def _hits(
    surfaces: _Surfaces | None, origins: Float[np.ndarray, "R 3"], rays: Float[np.ndarray, "R 3"]
) -> _Hits:
    """The first surface that each ray meets."""
    if surfaces is None or not len(rays):
        count = len(rays)
        far = np.full(count, np.inf, np.float32)
        return _Hits(np.full(count, -1), far, np.zeros(count, np.float32), np.zeros(count, np.float32))
    found = surfaces.scene.run(np.ascontiguousarray(origins), rays, query="INTERSECT", output=True)
    number = found["primID"].astype(np.int64)
    missed = (number < 0) | (number >= len(surfaces.indices))
    triangle = np.where(missed, -1, surfaces.indices[np.where(missed, 0, number)])
    return _Hits(triangle, np.where(missed, np.inf, found["tfar"]), found["u"], found["v"])


def _add(
    samples: Float[np.ndarray, "all 5"],
    passing: Float[np.ndarray, " all"],
    numbers: Int[np.ndarray, " R"],
    mesh: Mesh,
    rays: Float[np.ndarray, "all 3"],
    hits: _Hits,
) -> None:
    """Adds to the samples of some rays what they hit, behind what they have passed through, in place."""
    if not len(numbers):
        return
    color, alpha = _shade(mesh, rays[numbers], hits)
    weight = passing[numbers] * alpha
    samples[numbers, :3] += color * weight[:, None]
    samples[numbers, 3] += weight
    samples[numbers, 4] += weight * hits.depth  # rays have unit z, so their parameter is the depth
    passing[numbers] -= weight


def _shade(
    mesh: Mesh, rays: Float[np.ndarray, "R 3"], hits: _Hits
) -> tuple[Float[np.ndarray, "R 3"], Float[np.ndarray, " R"]]:
    """The colours and the alpha of points of triangles, which are lit from both sides."""
    triangles, weights = hits.triangle, (1 - hits.u - hits.v, hits.u, hits.v)
    rgba, uv, emission_uv = (
        _interpolate(array, triangles, weights) for array in (mesh.colors, mesh.uvs, mesh.emission_uvs)
    )
    emission, unlit = np.zeros((len(triangles), 3), np.float32), np.zeros(len(triangles), bool)
    material_index = mesh.material_index[triangles]
    for index in np.unique(material_index):
        material, chosen = mesh.materials[index], material_index == index
        if material.texture >= 0:
            with_alpha = material.alpha_mode != AlphaMode.OPAQUE
            rgba[chosen] *= sample(mesh.textures[material.texture], uv[chosen], with_alpha)
        if any(material.emission):
            emission[chosen] = material.emission
            if material.emission_texture >= 0:
                emission[chosen] *= sample(mesh.textures[material.emission_texture], emission_uv[chosen])[
                    :, :3
                ]
        rgba[chosen, 3] = _alpha(rgba[chosen, 3], material.alpha_mode, material.alpha_cutoff)
        unlit[chosen] = material.unlit
    lit = srgb_from_linear(rgba[:, :3])
    shade = _brightness(mesh, triangles, weights, rays)[:, None]
    lit = np.where(unlit[:, None], lit, np.clip(lit * shade, 0.0, 1.0))
    glows = emission.any(-1)
    lit[glows] = srgb_from_linear(linear_from_srgb(lit[glows]) + emission[glows])
    return lit, rgba[:, 3]


def _alpha(alpha: Float[np.ndarray, " R"], mode: AlphaMode, cutoff: float) -> Float[np.ndarray, " R"]:
    if mode == AlphaMode.OPAQUE:
        return np.ones_like(alpha)
    return (alpha >= cutoff).astype(np.float32) if mode == AlphaMode.MASK else np.clip(alpha, 0.0, 1.0)


def _brightness(
    mesh: Mesh,
    triangles: Int[np.ndarray, " R"],
    weights: tuple[Float[np.ndarray, " R"], ...],
    rays: Float[np.ndarray, "R 3"],
) -> Float[np.ndarray, " R"]:
    """What the light multiplies an albedo with."""
    normal = _interpolate(mesh.normals, triangles, weights)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    # The triangle says which side is seen: at a silhouette its smooth normal may already point away.
    corners = mesh.corners[triangles]
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    from_behind = (outward * rays).sum(-1) > 0
    return AMBIENT + (1 - AMBIENT) * (normal @ LIGHT.astype(np.float32)) * np.where(from_behind, -1.0, 1.0)


def _interpolate(
    attribute: Float[np.ndarray, "F 3 components"],
    triangles: Int[np.ndarray, " R"],
    weights: tuple[Float[np.ndarray, " R"], ...],
) -> Float[np.ndarray, "R components"]:
    return sum(attribute[triangles, corner] * weight[:, None] for corner, weight in enumerate(weights))


def sample(
    texture: Texture, uv: Float[np.ndarray, "R 2"], with_alpha: bool = False
) -> Float[np.ndarray, "R 4"]:
    """Linear RGBA of a texture at uv, with v downwards. Texel centres are at +0.5.

    Args:
        with_alpha: colours are averaged with alpha as their weight, so that the colours of invisible texels,
            which may be anything, leave no fringe where something is cut out.
    """
    height, width = texture.pixels.shape[:2]
    column, row = uv[:, 0].astype(np.float64) * width, uv[:, 1].astype(np.float64) * height
    if texture.nearest:
        return _texels(texture, np.floor(row).astype(int), np.floor(column).astype(int))
    left, top = np.floor(column - 0.5).astype(int), np.floor(row - 0.5).astype(int)
    right_share = (column - 0.5 - left)[:, None].astype(np.float32)
    low_share = (row - 0.5 - top)[:, None].astype(np.float32)
    total = np.zeros((len(uv), 4), np.float32)
    for down, row_share in enumerate((1 - low_share, low_share)):
        for right, column_share in enumerate((1 - right_share, right_share)):
            texels = _texels(texture, top + down, left + right)
            if with_alpha:
                texels[:, :3] *= texels[:, 3:]
            total += texels * (row_share * column_share)
    if with_alpha:
        total[:, :3] /= np.maximum(total[:, 3:], 1e-6)
    return total


def _texels(
    texture: Texture, row: Int[np.ndarray, " R"], column: Int[np.ndarray, " R"]
) -> Float[np.ndarray, "R 4"]:
    height, width = texture.pixels.shape[:2]
    wrap_u, wrap_v = texture.wrap
    pixels = texture.pixels[_wrapped(row, height, wrap_v), _wrapped(column, width, wrap_u)]
    return np.concatenate([LINEAR_OF_BYTE[pixels[:, :3]], pixels[:, 3:] / np.float32(255)], -1)


def _wrapped(place: Int[np.ndarray, " R"], size: int, wrap: Wrap) -> Int[np.ndarray, " R"]:
    """Places inside of a texture for places anywhere."""
    if wrap == Wrap.CLAMP:
        return np.clip(place, 0, size - 1)
    if wrap == Wrap.REPEAT:
        return place % size
    place = place % (2 * size)
    return np.minimum(place, 2 * size - 1 - place)
