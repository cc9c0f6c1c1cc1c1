"""Colours of a surface from views of it: for each point, the mean over the views that see it well.

A view counts for a point by the cosine between surface and ray, if nothing lies between the two. A pixel near
which the depth jumps shows near and far parts at once, or background: it counts for points that no other
pixel shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from scipy import ndimage
from scipy.spatial import cKDTree

from recon_torch.kernel import kernel, run
from recon_torch.mesh.sights import Sights
from recon_torch.mesh.surface import Surface
from recon_torch.mesh.unwrapping import Unwrapped
from recon_torch.views.cameras import Cameras

SHARPNESS = 4.0  # the power of the cosine, so that the view that sees a point best has most to say
EDGE_WEIGHT = 1e-4
JUMP_PX = 6.0  # of depth, in the width of a pixel there, from which it is an edge
FULL_ALPHA = 0.95
LEAST_COSINE = 0.05
LIFT = 1e-3  # by which rays begin above the surface, in the unit world
NEIGHBOURS = 4


class Points(NamedTuple):
    """N points of a surface with unit normals."""

    places: Float[np.ndarray, "N 3"]
    normals: Float[np.ndarray, "N 3"]


class Colored(NamedTuple):
    """sRGB of N points in [0, 1], and which of them a view has seen; others have those of neighbours."""

    rgb: Float32[np.ndarray, "N 3"]
    seen: Bool[np.ndarray, " N"]


Paint = Callable[[Surface, Points], Colored]
"""The colours of points of a surface."""


class Texture(NamedTuple):
    """A picture in sRGB, and the share of the surface's texels that a view has seen."""

    pixels: UInt8[np.ndarray, "height width 3"]
    coverage: float


def bake(unwrapped: Unwrapped, size_px: int, paint: Paint) -> Texture:
    """The texture of a surface. Texels between charts have the colour of the nearest one in a chart."""
    triangles, weights = texels(unwrapped, size_px)
    inside = triangles >= 0
    surface, numbers = unwrapped.surface, unwrapped.surface.triangles[triangles[inside]]
    shares = weights[inside][..., None]
    normals = (unwrapped.normals[numbers] * shares).sum(1)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    colored = paint(surface, Points((surface.vertices[numbers] * shares).sum(1), normals))
    picture = np.zeros((size_px, size_px, 3), np.float32)
    picture[inside] = colored.rgb
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    pixels = np.round(picture[tuple(nearest)] * 255).astype(np.uint8)
    return Texture(pixels, float(colored.seen.mean()))


def from_sights(sources: Sequence[Sights]) -> Paint:
    """Paints with the colours of views, see `colors`."""
    return lambda surface, points: colors(surface, points, sources)


def colors(
    surface: Surface,
    points: Points,
    sources: Sequence[Sights],
    on_view: Callable[[], object] = lambda: None,
) -> Colored:
    """The colours of points of a surface, which hides them from some views."""
    scene = _scene(surface)
    sums, weights = np.zeros((len(points.places), 3)), np.zeros(len(points.places))
    for source in sources:
        for index in range(len(source.cameras)):
            seen, rgb, weight = _seen_by(scene, points, source, index)
            sums[seen] += rgb * weight[:, None]
            weights[seen] += weight
            on_view()
    found = weights > 0
    rgb = sums / np.maximum(weights, 1e-30)[:, None]
    if not found.any():
        return Colored(np.full(rgb.shape, 0.5, np.float32), found)
    if not found.all():
        tree = cKDTree(points.places[found])
        rgb[~found] = rgb[found][tree.query(points.places[~found], NEIGHBOURS)[1] % found.sum()].mean(1)
    return Colored(rgb.astype(np.float32), found)


def _seen_by(
    scene: object, points: Points, source: Sights, index: int
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "S 3"], Float[np.ndarray, " S"]]:
    """The numbers of the points that a view sees, their colours in it, and how much these count."""
    camera = source.cameras[index]
    towards = camera.positions[0] - points.places
    towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
    cosine = (towards * points.normals).sum(-1)
    pixels, _, inside = (each[0] for each in camera.project(points.places))
    chosen = np.flatnonzero(inside & (cosine > LEAST_COSINE))
    starts = points.places[chosen] + LIFT * points.normals[chosen]
    hidden = scene.run(  # type: ignore[attr-defined]
        starts.astype(np.float32), towards[chosen].astype(np.float32), query="OCCLUDED"
    )
    chosen = chosen[hidden < 0]  # embreex: 0 for what is hidden, -1 for what is not
    rgb, alpha = source.rgb[index], source.alpha[index][..., None]
    # Weighted with alpha, as what a pixel has that nothing covers may be anything, such as white.
    covered = _sampled(np.concatenate([rgb * alpha, alpha], -1), pixels[chosen])
    clear = _clear(scene, camera, source.alpha[index])
    trust = np.where(clear[tuple(np.floor(pixels[chosen, ::-1].T).astype(int))], 1.0, EDGE_WEIGHT)
    weight = source.weight * trust * covered[:, 3] * cosine[chosen] ** SHARPNESS
    kept = weight > 0
    rgb = covered[:, :3] / np.maximum(covered[:, 3:], 1e-6)
    return chosen[kept], rgb[kept], weight[kept]


def _sampled(
    picture: Float32[np.ndarray, "H W C"], pixels: Float[np.ndarray, "S 2"]
) -> Float[np.ndarray, "S C"]:
    """Bilinear; pixel centres lie at +0.5."""
    height, width = picture.shape[:2]
    column, row = (pixels - 0.5).clip(0, [width - 1, height - 1]).T
    left, top = np.minimum(column.astype(int), width - 2), np.minimum(row.astype(int), height - 2)
    right_share, low_share = (column - left)[:, None], (row - top)[:, None]
    upper = picture[top, left] * (1 - right_share) + picture[top, left + 1] * right_share
    lower = picture[top + 1, left] * (1 - right_share) + picture[top + 1, left + 1] * right_share
    return upper * (1 - low_share) + lower * low_share


def _clear(scene: object, camera: Cameras, alpha: Float32[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that the object covers, with all around them, and near which its depth does not jump."""
    depth = depth_map(scene, camera)
    near, far = ndimage.minimum_filter(depth, 3), ndimage.maximum_filter(depth, 3)
    width = depth / camera.intrinsics_px[0, 0, 0]
    with np.errstate(invalid="ignore"):
        even = far - near < JUMP_PX * width
    return even & (ndimage.minimum_filter(alpha, 3) >= FULL_ALPHA)


def depth_map(scene: object, camera: Cameras) -> Float[np.ndarray, "H W"]:
    """Depth of a surface along the camera's z axis at pixel centres; infinite where there is none."""
    columns, rows = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    focal, center = camera.intrinsics_px[0, [0, 1], [0, 1]], camera.intrinsics_px[0, :2, 2]
    local = np.stack(
        [(columns - center[0]) / focal[0], (rows - center[1]) / focal[1], np.ones_like(rows)], -1
    )
    rays = (local.reshape(-1, 3) @ camera.w2c[0, :3, :3]).astype(np.float32)
    starts = np.tile(camera.positions[0].astype(np.float32), (len(rays), 1))
    found = scene.run(starts, rays, query="INTERSECT", output=True)  # type: ignore[attr-defined]
    depth = np.where(found["primID"].astype(np.int64) >= 0, found["tfar"], np.inf)
    return depth.reshape(camera.height, camera.width)  # rays have unit z, so their parameter is the depth


def _scene(surface: Surface) -> object:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    scene = EmbreeScene(robust=True)
    TriangleMesh(scene, np.ascontiguousarray(surface.corners, dtype=np.float32))
    return scene


def texels(
    unwrapped: Unwrapped, size_px: int
) -> tuple[Int[np.ndarray, "size size"], Float[np.ndarray, "size size 3"]]:
    """The triangle in which the centre of each texel lies, -1 for none, and its barycentric weights there."""
    triangles = np.full((size_px, size_px), -1, np.int64)
    weights = np.zeros((size_px, size_px, 3), np.float64)
    places = (unwrapped.uvs * size_px)[unwrapped.surface.triangles]
    run(_fill_rows, size_px, triangles, weights, np.ascontiguousarray(places), grain=64)
    return triangles, weights


@kernel()
def _fill_rows(begin, end, triangles, weights, places):
    """Fills the rows begin ... end - 1."""
    size = triangles.shape[0]
    for n in range(len(places)):
        ax, ay, bx, by, cx, cy = (
            places[n, 0, 0],
            places[n, 0, 1],
            places[n, 1, 0],
            places[n, 1, 1],
            places[n, 2, 0],
            places[n, 2, 1],
        )
        doubled = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if doubled == 0:
            continue
        top, bottom = int(np.floor(min(ay, by, cy))), int(np.ceil(max(ay, by, cy)))
        left, right = int(np.floor(min(ax, bx, cx))), int(np.ceil(max(ax, bx, cx)))
        for row in range(max(begin, top), min(end, bottom + 1)):
            for column in range(max(0, left), min(size, right + 1)):
                x, y = column + 0.5, row + 0.5
                b = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / doubled
                c = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / doubled
                a = 1 - b - c
                if a >= 0 and b >= 0 and c >= 0:
                    triangles[row, column] = n
                    weights[row, column, 0], weights[row, column, 1], weights[row, column, 2] = a, b, c
