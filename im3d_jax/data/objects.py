"""Procedural objects: categories, colours, captions, primitives and cameras (NumPy only).

Paper: 100k artist-made assets. Here: the objects of this module, because they need no download and their
ground truth is known. They are the training data and the test data of the small model. Object `index` is a
pure function of `(seed, index)`, and the splits are disjoint ranges of `index`, so training never meets a
test object.

An object is a caption and four padded groups of primitives (ellipsoids, boxes, cones, tori). The padding
gives every category the same array shapes, so that `procedural.render` compiles once for all of them.

The object lies inside the ball of radius 0.5, with +Z up. Its front faces +X before the random yaw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from numpy.random import Generator

from recon_torch.views.cameras import orbit

COLORS = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.85, 0.15),
    "green": (0.18, 0.62, 0.22),
    "cyan": (0.15, 0.78, 0.80),
    "blue": (0.14, 0.30, 0.84),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.97, 0.55, 0.72),
    "brown": (0.48, 0.28, 0.13),
    "gray": (0.52, 0.52, 0.54),
    "black": (0.12, 0.12, 0.13),
    "beige": (0.88, 0.78, 0.60),
}
"""Colour name -> linear RGB in [0, 1]. White is left out because it is the background."""


class Split(StrEnum):
    """Disjoint ranges of object numbers, which `SPLITS` gives."""

    TEST = "test"
    VALIDATION = "validation"
    TRAIN = "train"


SPLITS = {Split.TEST: (0, 10_000), Split.VALIDATION: (10_000, 20_000), Split.TRAIN: (20_000, 2**31)}
"""Split -> [first, last) object number."""

SLOTS = {"ellipsoid": 4, "box": 7, "cone": 5, "torus": 1}
"""Kind of primitive -> how many of it every object is padded to."""

MAX_YAW_RAD = np.deg2rad(30.0)
"""Objects are turned away from the first camera by at most this angle, as objects in pictures are."""


Color = Float[np.ndarray, "3"]
Triple = Sequence[float | int] | Float[np.ndarray, "3"]


class Primitive(NamedTuple):
    """The image of a unit shape under `local -> center + axes @ local`.

    The unit shapes are the unit sphere, the cube [-1, 1]^3, the frustum |z| <= 1 whose radius goes from 1 at
    the bottom to `shape` at the top, and the torus around z of major radius 1 and minor radius `shape`.
    """

    center: Float[np.ndarray, "3"]
    axes: Float[np.ndarray, "3 3"]
    color: Color
    shape: float


@dataclass
class Scene:
    """One object: its caption, its category (a key of `CATEGORIES`), and its primitives by kind."""

    caption: str = ""
    category: str = ""
    primitives: dict[str, list[Primitive]] = field(default_factory=lambda: {kind: [] for kind in SLOTS})

    def add(
        self,
        kind: str,
        center: Triple,
        half_size: Triple | float,
        color: Triple,
        *,
        rotation: Float[np.ndarray, "3 3"] | None = None,
        shape: float = 1.0,
    ) -> None:
        """Adds a primitive of half extents `half_size` (one number, or three), turned by `rotation`."""
        axes = (np.eye(3) if rotation is None else rotation) * np.broadcast_to(half_size, 3)
        self.primitives[kind].append(
            Primitive(np.asarray(center, float), axes, np.asarray(color, float), float(shape))
        )


def rotate(axis: Literal["x", "y", "z"], angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """The rotation matrix about a coordinate axis."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle_rad)
    matrix[i, j], matrix[j, i] = -np.sin(angle_rad), np.sin(angle_rad)
    return matrix


# ---- Categories: each builder takes a random generator and the colours of the two parts that are named ----

DARK = np.array([0.16, 0.16, 0.18])


def _tree(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    height, width = rng.uniform(0.22, 0.30), rng.uniform(0.20, 0.32)
    scene.add("cone", (0, 0, -0.22), (0.06, 0.06, 0.2), second, shape=0.8)
    for level in range(3):
        scale = 1 - 0.24 * level
        scene.add(
            "cone",
            (0, 0, -0.04 + 0.17 * level),
            (width * scale, width * scale, height * 0.55),
            first,
            shape=0.1,
        )


def _bush(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    scene.add("cone", (0, 0, -0.24), (0.055, 0.055, 0.2), second)
    side = rng.uniform(0.10, 0.16)
    scene.add("ellipsoid", (0, 0, 0.12), rng.uniform(0.2, 0.27, 3), first)
    scene.add("ellipsoid", (side, side * 0.6, 0.0), rng.uniform(0.13, 0.18, 3), first)


def _mushroom(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    radius, height = rng.uniform(0.07, 0.12), rng.uniform(0.18, 0.26)
    scene.add("cone", (0, 0, -0.2), (radius * 1.25, radius * 1.25, height), second, shape=0.75)
    cap = rng.uniform(0.26, 0.38)
    scene.add("cone", (0, 0, -0.2 + height + 0.06), (cap, cap, 0.1), first, shape=0.55)
    scene.add(
        "ellipsoid", (0, 0, -0.2 + height + 0.12), (cap * 0.6, cap * 0.6, rng.uniform(0.1, 0.15)), first
    )


def _snowman(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    sizes = np.array([0.22, 0.16, 0.115]) * rng.uniform(0.9, 1.1, 3)
    heights = np.array([-0.24, 0.02, 0.20])
    body = np.array([0.84, 0.88, 0.93])
    for height, size in zip(heights, sizes, strict=True):
        scene.add("ellipsoid", (0, 0, height), size, body)
    brim = rng.uniform(0.13, 0.18)
    scene.add("cone", (0, 0, 0.29), (brim, brim, 0.018), first)
    scene.add("cone", (0, 0, 0.37), (brim * 0.62, brim * 0.62, 0.075), first)
    scene.add("cone", (0.16, 0, 0.2), (0.03, 0.03, 0.075), second, rotation=rotate("y", np.pi / 2), shape=0.1)


def _lamp(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    base, shade = rng.uniform(0.14, 0.22), rng.uniform(0.2, 0.3)
    scene.add("cone", (0, 0, -0.38), (base, base, 0.04), second, shape=0.7)
    scene.add("cone", (0, 0, -0.1), (0.03, 0.03, 0.28), second)
    scene.add(
        "cone", (0, 0, 0.2), (shade, shade, rng.uniform(0.13, 0.19)), first, shape=rng.uniform(0.4, 0.7)
    )


def _house(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    length, width, height = rng.uniform(0.22, 0.32), rng.uniform(0.18, 0.22), rng.uniform(0.16, 0.2)
    scene.add("box", (0, 0, -0.3 + height), (width, length, height), second)
    roof = width / np.sqrt(2) * 1.1
    scene.add(
        "box", (0, 0, -0.3 + 2 * height), (roof, length * 1.08, roof), first, rotation=rotate("y", np.pi / 4)
    )
    scene.add("box", (0.1, length * 0.5, 2 * height - 0.12), (0.04, 0.04, 0.12), DARK)
    scene.add("box", (width, -length * rng.uniform(0, 0.5), -0.2), (0.012, 0.055, 0.1), DARK)


def _chair(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    half, seat = rng.uniform(0.17, 0.23), rng.uniform(-0.1, 0.0)
    scene.add("box", (0, 0, seat), (half, half, 0.035), first)
    back = rng.uniform(0.18, 0.24)
    scene.add("box", (-half + 0.03, 0, seat + back), (0.03, half, back), first)
    _legs(scene, half - 0.035, half - 0.035, seat, second)


def _table(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    length, width, top = rng.uniform(0.26, 0.36), rng.uniform(0.2, 0.28), rng.uniform(-0.02, 0.14)
    scene.add("box", (0, 0, top), (width, length, 0.035), first)
    _legs(scene, width - 0.05, length - 0.05, top, second)


def _legs(scene: Scene, x: float, y: float, top: float, color: Color) -> None:
    for sign_x, sign_y in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        half = (top + 0.38) / 2
        scene.add("box", (sign_x * x, sign_y * y, top - half), (0.035, 0.035, half), color)


def _mug(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    radius, height = rng.uniform(0.2, 0.26), rng.uniform(0.2, 0.3)
    scene.add("cone", (0, 0, 0), (radius, radius, height), first, shape=rng.uniform(0.85, 1.1))
    scene.add("cone", (0, 0, height), (radius * 0.8, radius * 0.8, 0.006), DARK)
    handle = height * 0.55
    turn = rotate("x", np.pi / 2)
    scene.add(
        "torus", (0, radius * 0.98, 0), handle, second, rotation=rotate("z", np.pi / 2) @ turn, shape=0.28
    )


def _car(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    length, width = rng.uniform(0.34, 0.4), rng.uniform(0.15, 0.19)
    scene.add("box", (0, 0, -0.06), (length, width, 0.085), first)
    cabin = rng.uniform(0.14, 0.2)
    scene.add("box", (-0.08, 0, 0.08), (cabin, width * 0.85, 0.08), second)
    turn = rotate("x", np.pi / 2)
    for x in (-0.6, 0.6):
        for y in (-1, 1):
            scene.add("cone", (x * length, y * width, -0.14), (0.085, 0.085, 0.03), DARK, rotation=turn)


def _truck(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    width, load = rng.uniform(0.15, 0.19), rng.uniform(0.14, 0.2)
    scene.add("box", (-0.1, 0, -0.13 + load), (0.26, width, load), first)
    scene.add("box", (0.27, 0, -0.02), (0.11, width * 0.9, 0.12), second)
    turn = rotate("x", np.pi / 2)
    for x in (-0.24, 0.24):
        for y in (-1, 1):
            scene.add("cone", (x, y * width, -0.16), (0.085, 0.085, 0.03), DARK, rotation=turn)


def _duck(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    body = np.array([0.26, 0.17, 0.16]) * rng.uniform(0.9, 1.12, 3)
    head = rng.uniform(0.11, 0.14)
    scene.add("ellipsoid", (-0.04, 0, -0.12), body, first)
    scene.add("ellipsoid", (0.14, 0, 0.14), head, first)
    scene.add(
        "cone",
        (0.14 + head + 0.04, 0, 0.12),
        (0.045, 0.06, 0.07),
        second,
        rotation=rotate("y", 1.57),
        shape=0.4,
    )
    scene.add("cone", (-0.3, 0, -0.02), (0.07, 0.07, 0.1), first, rotation=rotate("y", -0.9), shape=0.15)


def _rocket(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    radius, height = rng.uniform(0.11, 0.15), rng.uniform(0.2, 0.26)
    scene.add("cone", (0, 0, -0.06), (radius, radius, height), first)
    scene.add("cone", (0, 0, height + 0.06), (radius, radius, 0.13), second, shape=0.05)
    fin = rng.uniform(0.06, 0.1)
    for quarter in range(4):
        turn = rotate("z", quarter * np.pi / 2 + np.pi / 4)
        center = turn @ np.array([radius + fin * 0.7, 0, -0.06 - height + 0.08])
        scene.add("box", center, (fin, 0.02, 0.1), second, rotation=turn)


def _ice_cream(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    radius = rng.uniform(0.15, 0.19)
    scene.add("cone", (0, 0, -0.18), (0.02, 0.02, 0.22), second, shape=radius / 0.02)
    scene.add("ellipsoid", (0, 0, 0.1), radius * 1.15, first)
    scene.add("ellipsoid", (0.0, 0, 0.27), radius * rng.uniform(0.7, 0.9), first)


def _donut(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    plate, ring = rng.uniform(0.34, 0.42), rng.uniform(0.2, 0.26)
    scene.add("cone", (0, 0, -0.14), (plate * 0.7, plate * 0.7, 0.03), second, shape=1.4)
    scene.add("torus", (0, 0, -0.02), ring, first, shape=rng.uniform(0.34, 0.44))


def _ball_beside_box(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    ball, box = rng.uniform(0.13, 0.19), rng.uniform(0.11, 0.17, 3)
    side = rng.choice([-1.0, 1.0])
    scene.add("ellipsoid", (rng.uniform(-0.06, 0.1), side * 0.21, ball - 0.2), ball, first)
    scene.add("box", (rng.uniform(-0.1, 0.06), -side * 0.2, box[2] - 0.2), box, second)


def _cone_on_box(scene: Scene, rng: Generator, first: Color, second: Color) -> None:
    box, radius, height = rng.uniform(0.16, 0.25, 3), rng.uniform(0.12, 0.2), rng.uniform(0.12, 0.2)
    offset = rng.uniform(-0.07, 0.07, 2)
    scene.add("cone", (*offset, 2 * box[2] - 0.35 + height), (radius, radius, height), first, shape=0.05)
    scene.add("box", (0, 0, box[2] - 0.35), box, second)


@dataclass(frozen=True)
class Category:
    """How a category is built and described. `caption` has {first} and {second} for the parts' colours."""

    build: Callable[[Scene, Generator, Color, Color], None]
    caption: str


CATEGORIES = {
    "tree": Category(_tree, "a {first} tree with a {second} trunk"),
    "bush": Category(_bush, "a {first} bush with a {second} trunk"),
    "mushroom": Category(_mushroom, "a {first} mushroom with a {second} stem"),
    "snowman": Category(_snowman, "a snowman with a {first} hat and a {second} nose"),
    "lamp": Category(_lamp, "a {first} lamp with a {second} base"),
    "house": Category(_house, "a {second} house with a {first} roof"),
    "chair": Category(_chair, "a {first} chair with {second} legs"),
    "table": Category(_table, "a {first} table with {second} legs"),
    "mug": Category(_mug, "a {first} mug with a {second} handle"),
    "car": Category(_car, "a {first} car with a {second} cabin"),
    "truck": Category(_truck, "a {first} truck with a {second} cabin"),
    "duck": Category(_duck, "a {first} duck with a {second} beak"),
    "rocket": Category(_rocket, "a {first} rocket with {second} fins"),
    "ice cream": Category(_ice_cream, "{first} ice cream in a {second} cone"),
    "donut": Category(_donut, "a {first} donut on a {second} plate"),
    "ball and box": Category(_ball_beside_box, "a {first} ball beside a {second} box"),
    "cone on box": Category(_cone_on_box, "a {first} cone on a {second} box"),
}


def random_generator(seed: int, index: int) -> Generator:
    """The generator of object `index`. It is counter-based, so that neighbouring objects are independent."""
    return Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


def make_object(
    seed: int, index: int, category: str | None = None, colors: tuple[str, str] | None = None
) -> Scene:
    """Makes object `index`, which depends on nothing but the arguments.

    Args:
        seed: of the world of objects.
        index: number of the object; see `SPLITS`.
        category, colors: keys of `CATEGORIES` and `COLORS` to take instead of drawing them.
    """
    rng = random_generator(seed, index)
    drawn_category = list(CATEGORIES)[rng.integers(len(CATEGORIES))]
    drawn_colors = rng.choice(list(COLORS), 2, replace=False)
    category = category or drawn_category
    entry = CATEGORIES[category]
    first, second = (str(name) for name in (colors or drawn_colors))
    caption = entry.caption.format(first=first, second=second)
    scene = Scene(re.sub(r"\ba (?=[aeiou])", "an ", caption), category)
    entry.build(scene, rng, np.array(COLORS[first]), np.array(COLORS[second]))
    _place(scene, rng)
    return scene


def _place(scene: Scene, rng: Generator) -> None:
    """Turns the object by its yaw and shrinks it into the ball of radius 0.5."""
    turn = rotate("z", rng.uniform(-MAX_YAW_RAD, MAX_YAW_RAD))
    parts = [(kind, part) for kind, group in scene.primitives.items() for part in group]
    low = np.min([part.center - _extent(kind, part) for kind, part in parts], 0)
    high = np.max([part.center + _extent(kind, part) for kind, part in parts], 0)
    middle, radius = (low + high) / 2, np.linalg.norm(high - low) / 2
    scale = min(1.0, 0.5 / radius)
    for kind, group in scene.primitives.items():
        scene.primitives[kind] = [
            Primitive(turn @ (center - middle) * scale, turn @ axes * scale, color, shape)
            for center, axes, color, shape in group
        ]


def _extent(kind: str, part: Primitive) -> Float[np.ndarray, "3"]:
    """Half the size of the axis-aligned box around a primitive."""
    grow = {
        "torus": np.array([1 + part.shape, 1 + part.shape, part.shape]),
        "cone": np.array([max(1, part.shape), max(1, part.shape), 1]),
    }
    local = part.axes * grow.get(kind, np.ones(3))
    return np.abs(local).sum(1) if kind in ("box", "cone") else np.sqrt((local**2).sum(1))


def pack(scenes: Sequence[Scene]) -> dict[str, Num[np.ndarray, "B ..."]]:
    """Scenes as padded arrays, as `procedural.render` takes them.

    Returns:
        For each kind of primitive, which has S slots, and B scenes: `{kind}_center` [B, S, 3],
        `{kind}_to_local` [B, S, 3, 3] (the inverse of the axes), `{kind}_color` [B, S, 3] and `{kind}_shape`
        [B, S], all float32, and `{kind}_count` [B], int32.
    """
    packed: dict[str, np.ndarray] = {}
    for kind, slots in SLOTS.items():
        center, color = np.zeros((2, len(scenes), slots, 3), np.float32)
        to_local = np.zeros((len(scenes), slots, 3, 3), np.float32)
        shape = np.zeros((len(scenes), slots), np.float32)
        for b, scene in enumerate(scenes):
            for s, (c, axes, rgb, k) in enumerate(scene.primitives[kind]):
                center[b, s], to_local[b, s], color[b, s], shape[b, s] = c, np.linalg.inv(axes), rgb, k
        packed |= {
            f"{kind}_center": center,
            f"{kind}_to_local": to_local,
            f"{kind}_color": color,
            f"{kind}_shape": shape,
            f"{kind}_count": np.array([len(scene.primitives[kind]) for scene in scenes], np.int32),
        }
    return packed


# ---- On turntables ----


class Scenes(NamedTuple):
    """B objects and the cameras around them, all that `procedural.render` needs: about 1 kB an object."""

    packed: dict[str, Num[np.ndarray, "B ..."]]  # as `pack` returns them
    w2c: Float[np.ndarray, "B K 4 4"]
    elevation_rad: Float[np.ndarray, " B"]
    captions: list[str]


def elevation_rad(seed: int, index: int) -> float:
    """The elevation of the cameras around object `index`, drawn from U[0, pi/4] (Sec. 3.1)."""
    return float(random_generator(seed + 2**32, index).uniform(0, np.pi / 4))


def on_turntables(
    seed: int,
    indices: Sequence[int],
    num_views: int = 16,
    azimuths_rad: Sequence[float] | Float[np.ndarray, " K"] | None = None,
    elevations_rad: Sequence[float] | Float[np.ndarray, " B"] | None = None,
) -> Scenes:
    """Makes objects and the cameras around them; `procedural.turntables` explains the arguments.

    It holds Python's lock all the time, so threads gain nothing; see `workers`.
    """
    scenes = [make_object(seed, int(i)) for i in indices]
    if elevations_rad is None:
        elevations_rad = [elevation_rad(seed, int(i)) for i in indices]
    elevations = np.asarray(elevations_rad, np.float32)
    if azimuths_rad is not None:
        azimuths_rad = np.asarray(azimuths_rad)
    orbits = [orbit(num_views, float(each), azimuths_rad=azimuths_rad).w2c for each in elevations]
    return Scenes(pack(scenes), np.stack(orbits), elevations, [scene.caption for scene in scenes])


def vocabulary() -> list[str]:
    """All words that captions are made of, sorted."""
    words = {"an", *COLORS}
    for category in CATEGORIES.values():
        words |= set(category.caption.format(first="", second="").split())
    return sorted(words)
