"""The ray caster of the procedural objects, in JAX: RGB, alpha and depth for square pinhole cameras.

One program renders all categories, so training needs no data set on disk. The objects' parameters come from
`objects.pack`. For each kind of primitive a loop runs over the slots that are in use and casts all rays
against them; XLA fuses each turn into a few loops over pixels. The light is fixed to the object and not to
the camera, so that a point has the same colour in all views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from im3d_jax.data import objects
from recon_torch.views.cameras import orbit

LIGHT = np.array([0.45, 0.35, 0.82]) / np.linalg.norm([0.45, 0.35, 0.82])
"""Unit vector from the object to its only light, which is infinitely far away."""

AMBIENT = 0.62
"""The share of an albedo that is seen without the light."""

TORUS_STEPS = 20
FAR = 1e4  # the ray parameter of rays that hit nothing
RAYS_AT_ONCE = 2**25  # 1 GB of distances, colours and normals

RayValues = Float[Array, "rows columns"]
"""One number for each ray of a view. A vector for each ray is a sequence of three of these."""

Vector = Sequence[RayValues] | Sequence[Float[Array, ""]]
"""Three coordinates, of each ray or of all."""

HalfWidth = Float[Array, ""] | float | np.floating

Packed = Mapping[str, Num[Array, "..."] | Num[np.ndarray, "..."]]
"""The arrays of `objects.pack`, for B objects or for one."""


class Views(NamedTuple):
    """Renders of B objects from K cameras.

    rgb: over white, in [0, 1].
    alpha: the covered share of each pixel, in [0, 1].
    depth: the mean distance along the camera's z axis of what the pixel covers; 0 where it covers nothing.
    """

    rgb: Float[Array, "B K H W 3"]
    alpha: Float[Array, "B K H W 1"]
    depth: Float[Array, "B K H W 1"]


@partial(jax.jit, static_argnames=("size", "supersampling", "at_once"))
def render(
    packed: Packed,
    w2c: Float[Array, "B K 4 4"] | Float[np.ndarray, "B K 4 4"],
    half_width: HalfWidth,
    size: int,
    supersampling: int = 2,
    at_once: int | None = None,
) -> Views:
    """Renders square images of `size` pixels, with `supersampling`^2 rays for each pixel.

    Args:
        packed: the arrays of `objects.pack`.
        w2c: OpenCV world-to-camera matrices.
        half_width: half the width of an image at depth 1, which is tan(field of view / 2).
        size: side of the images in pixels.
        supersampling: samples along each side of a pixel.
        at_once: how many objects to render together; None chooses by the device (`objects_at_once`).
    """
    one_view = partial(_render_view, half_width=half_width, size=size, supersampling=supersampling)
    at_once = min(at_once or objects_at_once(w2c.shape[1] * (size * supersampling) ** 2), len(w2c))
    return jax.lax.map(
        lambda each: jax.vmap(one_view, in_axes=(None, 0))(*each),
        (packed, w2c),
        batch_size=at_once if at_once > 1 else None,
    )


def objects_at_once(num_rays: int) -> int:
    """How many objects, each of so many rays, to render together.

    A CPU renders one after another, so that each costs only the primitives that it has: 21 ms an object,
    against 33 ms in groups of four (64 px, 16 views, two cores). A GPU renders many, because it has thousands
    of cores to fill and pays for each turn of a loop.
    """
    return 1 if jax.default_backend() == "cpu" else max(1, RAYS_AT_ONCE // num_rays)


def _render_view(
    packed: Packed, w2c: Float[Array, "4 4"], *, half_width: HalfWidth, size: int, supersampling: int
) -> Views:
    origin, direction = _rays(w2c, half_width, size * supersampling)
    distance, color, normal = _first_hit(packed, origin, direction)
    hit = distance < FAR
    shade = AMBIENT + (1 - AMBIENT) * sum(n * light for n, light in zip(normal, LIGHT, strict=True))
    rgb = [jnp.where(hit, jnp.clip(c * shade, 0, 1), 1.0) for c in color]
    # Rays are scaled to unit z in the camera frame, so the ray parameter is the z depth.
    samples = jnp.stack([*rgb, hit.astype(jnp.float32), jnp.where(hit, distance, 0.0)], -1)
    pixels = samples.reshape(size, supersampling, size, supersampling, 5).mean((1, 3))
    alpha = pixels[..., 3:4]
    return Views(pixels[..., :3], alpha, pixels[..., 4:] / jnp.maximum(alpha, 1e-6))


def _rays(w2c: Float[Array, "4 4"], half_width: HalfWidth, side: int) -> tuple[Vector, Vector]:
    """The origin of all rays, and their directions through the centres of side x side samples."""
    ticks = ((jnp.arange(side) + 0.5) / side * 2 - 1) * half_width
    x, y = ticks[None, :], ticks[:, None]
    direction = tuple(w2c[0, i] * x + w2c[1, i] * y + w2c[2, i] for i in range(3))
    origin = tuple(-(w2c[:3, i] * w2c[:3, 3]).sum() for i in range(3))
    return origin, direction


def _first_hit(packed: Packed, origin: Vector, direction: Vector) -> tuple[RayValues, Vector, Vector]:
    """The nearest hit of each ray among all primitives: its distance, colour and unit normal."""

    def cast_against(kind, slot, best):
        to_local = packed[f"{kind}_to_local"][slot]
        o = _transform(to_local, [a - packed[f"{kind}_center"][slot, i] for i, a in enumerate(origin)])
        d = _transform(to_local, direction)
        t, local_normal = INTERSECT[kind](o, d, packed[f"{kind}_shape"][slot])
        new = (t, *packed[f"{kind}_color"][slot], *_transform(to_local.T, local_normal))
        return tuple(jnp.where(t < best[0], ours, old) for ours, old in zip(new, best, strict=True))

    best = (jnp.full(direction[0].shape, FAR), *(jnp.zeros(direction[0].shape) for _ in range(6)))
    for kind in INTERSECT:
        best = jax.lax.fori_loop(0, packed[f"{kind}_count"], partial(cast_against, kind), best)
    length = jnp.sqrt(_dot(best[4:], best[4:]) + 1e-12)
    return best[0], best[1:4], [n / length for n in best[4:]]


def _transform(matrix: Float[Array, "3 3"], vector: Vector) -> Vector:
    return [matrix[i, 0] * vector[0] + matrix[i, 1] * vector[1] + matrix[i, 2] * vector[2] for i in range(3)]


def _dot(a: Vector, b: Vector) -> RayValues | Float[Array, ""]:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _keep(valid: Bool[Array, "rows columns"], t: RayValues) -> RayValues:
    """The ray parameter where there is a hit in front of the camera, FAR elsewhere."""
    return jnp.where(valid & (t > 0), t, FAR)


# ---- Unit shapes ----
#
# Each takes the origin o and the directions d of rays in the frame of the unit shape, and the primitive's
# `shape`. It returns the ray parameter of the first hit, FAR if there is none, and a normal of any length.


def _ellipsoid(o: Vector, d: Vector, _: Float[Array, ""]) -> tuple[RayValues, Vector]:
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1
    discriminant = b * b - a * c
    t = _keep(discriminant > 0, (-b - jnp.sqrt(jnp.maximum(discriminant, 0))) / a)
    return t, [o[i] + t * d[i] for i in range(3)]


def _box(o: Vector, d: Vector, _: Float[Array, ""]) -> tuple[RayValues, Vector]:
    inverse = [1 / jnp.where(jnp.abs(x) < 1e-9, 1e-9, x) for x in d]
    near = [(-jnp.sign(inverse[i]) - o[i]) * inverse[i] for i in range(3)]
    far = [(jnp.sign(inverse[i]) - o[i]) * inverse[i] for i in range(3)]
    enter = jnp.maximum(jnp.maximum(near[0], near[1]), near[2])
    leave = jnp.minimum(jnp.minimum(far[0], far[1]), far[2])
    return _keep(enter < leave, enter), [jnp.where(near[i] >= enter, -jnp.sign(d[i]), 0.0) for i in range(3)]


def _cone(o: Vector, d: Vector, top: Float[Array, ""]) -> tuple[RayValues, Vector]:
    """The frustum |z| <= 1 of radius (1 + top) / 2 - z (1 - top) / 2, with both caps."""
    slope, middle = (top - 1) / 2, (1 + top) / 2
    radius, change = middle + slope * o[2], slope * d[2]
    a = d[0] ** 2 + d[1] ** 2 - change**2
    a = jnp.where(jnp.abs(a) < 1e-9, 1e-9, a)
    b = o[0] * d[0] + o[1] * d[1] - radius * change
    c = o[0] ** 2 + o[1] ** 2 - radius**2
    discriminant = b * b - a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    t = jnp.full_like(a, FAR)
    for sign in (-1, 1):
        side = (-b + sign * root) / a
        t = jnp.minimum(t, _keep((discriminant > 0) & (jnp.abs(o[2] + side * d[2]) <= 1), side))
    normal = [o[0] + t * d[0], o[1] + t * d[1], -slope * (radius + t * change)]
    for z, cap_radius in ((-1.0, 1.0), (1.0, top)):
        cap = (z - o[2]) / jnp.where(jnp.abs(d[2]) < 1e-9, 1e-9, d[2])
        inside = (o[0] + cap * d[0]) ** 2 + (o[1] + cap * d[1]) ** 2 <= cap_radius**2
        cap = _keep(inside, cap)
        normal = [jnp.where(cap < t, n, m) for n, m in zip((0.0, 0.0, z), normal, strict=True)]
        t = jnp.minimum(t, cap)
    return t, normal


def _torus(o: Vector, d: Vector, minor: Float[Array, ""]) -> tuple[RayValues, Vector]:
    """Sphere tracing from the bounding sphere, because the quartic has no stable closed form in float32."""
    norm = jnp.sqrt(_dot(d, d))
    d = [x / norm for x in d]
    b = _dot(o, d)
    discriminant = b * b - _dot(o, o) + (1 + minor) ** 2
    t = -b - jnp.sqrt(jnp.maximum(discriminant, 0))

    def position(t):
        x, y, z = (o[i] + t * d[i] for i in range(3))
        return x, y, z, jnp.sqrt(x * x + y * y + 1e-12)

    for _ in range(TORUS_STEPS):
        x, y, z, ring = position(t)
        t = t + jnp.sqrt((ring - 1) ** 2 + z * z) - minor
    x, y, z, ring = position(t)
    error = jnp.sqrt((ring - 1) ** 2 + z * z) - minor
    toward = 1 - 1 / ring
    return _keep((discriminant > 0) & (jnp.abs(error) < 0.01), t / norm), [x * toward, y * toward, z]


INTERSECT: dict[str, Callable[[Vector, Vector, Float[Array, ""]], tuple[RayValues, Vector]]] = {
    "ellipsoid": _ellipsoid,
    "box": _box,
    "cone": _cone,
    "torus": _torus,
}


# ---- Whole turntables ----


class Turntables(NamedTuple):
    """B rendered objects, each with the elevation of its cameras and its caption."""

    views: Views
    elevation_rad: Float[np.ndarray, " B"]
    captions: list[str]


def turntables(
    seed: int,
    indices: Sequence[int],
    *,
    size: int = 64,
    num_views: int = 16,
    azimuths_rad: Sequence[float] | Float[np.ndarray, " K"] | None = None,
    elevations_rad: Sequence[float] | Float[np.ndarray, " B"] | None = None,
) -> Turntables:
    """Renders objects as the paper does (Sec. 3.1): from `num_views` azimuths, all at one elevation.

    Args:
        seed: of the world of objects.
        indices: numbers of the B objects; see `objects.SPLITS`.
        size: side of the views in pixels.
        num_views: K.
        azimuths_rad: of the K views, instead of 2 pi k / K.
        elevations_rad: of the B objects' cameras, instead of the objects' own.
    """
    scenes = objects.on_turntables(seed, indices, num_views, azimuths_rad, elevations_rad)
    views = render(scenes.packed, scenes.w2c, half_width(size), size)
    return Turntables(views, scenes.elevation_rad, scenes.captions)


def half_width(size: int) -> np.floating:
    """Half the width at depth 1 of what the cameras of `objects.on_turntables` see; see `render`."""
    return size / orbit(1, size=size).intrinsics_px[0, 0, 0] / 2
