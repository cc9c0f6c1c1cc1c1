"""Variants of a mesh that are whole 3D objects again: stretched, turned, with other colours and light.

The paper trains on 100k assets (Sec. 3.1) and names no augmentation; a smaller collection goes further with
some. Nothing is done to single views, so that the views of a variant show one object, as those of any other.

Exchanging the channels of RGB commutes with rendering, because light, blending and the transfer of sRGB treat
all channels alike. So it is done to the renders, and the colours in the caption are exchanged with it: by the
hues of the pixels that a word may mean. Where that is not certain, the colours stay as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from im3d_jax.data.procedural import LIGHT

STRETCH = 1.25
"""Each axis is stretched by a factor from 1 / STRETCH to STRETCH, uniformly in its logarithm."""

LIGHT_ELEVATION_DEG = (30.0, 80.0)
"""The light stands from and to these angles above the horizon, at any azimuth."""

CHANNELS = ("rgb", "rbg", "grb", "gbr", "brg", "bgr")
"""Where a variant's red, green and blue come from."""

SATURATED = 0.25  # pixels below have no hue that a word would name
MEANT = 0.01  # the least share of an object that a colour word in its caption must mean
AGREED = 0.9  # the least share of the pixels that a word means that must get one name

NAMES = {"red": 18, "orange": 45, "yellow": 70, "green": 165, "cyan": 195, "blue": 255, "purple": 290}
"""Name of a hue -> where its range ends in degrees. From 290 to 345 it is magenta, and then red again."""

MEANING = {
    "red": (340, 20),
    "orange": (10, 50),
    "brown": (0, 50),
    "yellow": (40, 75),
    "green": (65, 170),
    "teal": (155, 205),
    "turquoise": (155, 205),
    "cyan": (155, 205),
    "blue": (185, 262),
    "purple": (250, 320),
    "violet": (250, 320),
    "magenta": (285, 345),
    "pink": (300, 20),
}
"""Colour word -> the range of hues, in degrees, of the pixels that it may mean."""

# fmt: off
UNCERTAIN = frozenset((
    *("amber", "beige", "bronze", "brass", "copper", "coral", "cream", "crimson", "gold"),
    *("golden", "indigo", "ivory", "khaki", "lavender", "lime", "maroon", "mint", "navy"),
    *("ochre", "olive", "peach", "rainbow", "colorful", "colourful", "multicolored", "reddish", "greenish"),
    *("bluish", "yellowish", "brownish", "rose", "rusty", "rust", "salmon", "scarlet", "silver"),
    *("tan", "wood", "wooden"),
))
# fmt: on
"""Words for colours, or for what has one, that are not exchanged. Captions with one keep their colours."""

NO_COLOR_BEFORE = frozenset(["slice", "slices", "juice", "half", "halves", "peel", "tree", "trees"])
"""Before these, and at the end of a phrase, "orange" is a fruit."""


class Variant(NamedTuple):
    """How a variant differs from its object.

    Attributes:
        channels: one of `CHANNELS`.
        scale: factors along x, y and z, before the turn.
        yaw_rad: the turn about the upright axis, counter-clockwise seen from above.
        light: a unit vector to the light.
    """

    channels: str
    scale: tuple[float, float, float]
    yaw_rad: float
    light: tuple[float, float, float]

    def said(self) -> dict[str, Any]:
        """The variant as its metadata.json says it."""
        yaw_deg = round(float(np.rad2deg(self.yaw_rad)), 3)
        rounded = {"scale": np.round(self.scale, 4).tolist(), "light": np.round(self.light, 4).tolist()}
        return {"channels": self.channels, "yaw_deg": yaw_deg, **rounded}


def draw(seed: int, name: str) -> Variant:
    """The variant of a name such as "mug~2", which depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    scale = STRETCH ** rng.uniform(-1, 1, 3)
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(*LIGHT_ELEVATION_DEG))
    flat = np.cos(elevation)
    light = flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)
    channels, yaw_rad = CHANNELS[rng.integers(len(CHANNELS))], float(rng.uniform(0, 2 * np.pi))
    return Variant(channels, _triple(scale), yaw_rad, _triple(light))


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


# ---- Geometry ----


def reshape(
    corners: Float[np.ndarray, "F 3 3"], normals: Float[np.ndarray, "F 3 3"], variant: Variant
) -> tuple[Float[np.ndarray, "F 3 3"], Float[np.ndarray, "F 3 3"]]:
    """Stretches and turns a mesh, and fits it into the ball of radius 0.5 again; its type stays.

    Args:
        corners: of triangles, inside the ball of radius 0.5, with +Z up.
        normals: unit vectors at the corners.

    Returns the corners, and normals that `LIGHT` shades as the variant's light would: see `turned_to_light`.
    """
    scale, turn = np.array(variant.scale), yaw(variant.yaw_rad)
    stretched = corners.astype(np.float64) * scale @ turn.T
    centred = stretched - (stretched.min((0, 1)) + stretched.max((0, 1))) / 2
    fitted = centred * (0.5 / np.linalg.norm(centred, axis=-1).max())
    # Normals are covectors: a direction in which a surface is stretched counts less in them.
    across = normals.astype(np.float64) / scale @ turn.T
    across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), 1e-20)
    shaded = across @ turned_to_light(np.array(variant.light)).T
    return fitted.astype(corners.dtype), shaded.astype(normals.dtype)


def yaw(angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """The rotation about +Z."""
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def turned_to_light(light: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation that takes a unit vector to `LIGHT`.

    The renderer's light is fixed, and it uses normals for nothing but the light. Turning them is turning the
    light the other way.
    """
    axis, cos = np.cross(light, LIGHT), float(light @ LIGHT)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + cross + cross @ cross / (1 + cos)  # both stand above the horizon: cos > -1


# ---- Colours ----


def exchange(rgba: Float[np.ndarray, "*N 4"], channels: str) -> Float[np.ndarray, "*N 4"]:
    """Exchanges the channels of RGB; alpha stays."""
    return rgba[..., ["rgb".index(channel) for channel in channels] + [3]]


def exchange_words(caption: str, rgba: Float[np.ndarray, "*N 4"], channels: str) -> str | None:
    """A caption with the names of the colours that it has once the channels are exchanged.

    Args:
        rgba: renders of the object before, which say what hue each word means.

    Returns None if that is not certain: the caption names no hue, or one by an `UNCERTAIN` word, or one that
    is hardly seen, or one that gets several names, or two hues that get one name.
    """
    words = re.findall(r"[a-z]+", caption.lower())
    named = [word for word in dict.fromkeys(words) if word in MEANING]
    if not named or UNCERTAIN & set(words) or _is_fruit(caption):
        return None
    pixels = rgba[rgba[..., 3] > 0.9]
    new = {word: _new_name(word, pixels, channels) for word in named}
    found = {word: name for word, name in new.items() if name}
    if len(found) < len(named) or len(set(found.values())) < len(named):
        return None
    return _replace_words(caption, found)


def _is_fruit(caption: str) -> bool:
    after = re.findall(r"\boranges?\b[\s-]*([a-z]*)", caption.lower())
    return any(not word or word in NO_COLOR_BEFORE for word in after) or "oranges" in caption.lower()


def _new_name(word: str, pixels: Float[np.ndarray, "N 4"], channels: str) -> str:
    """What becomes of a colour word; "" if it is not certain."""
    hue_deg, saturation = _hues(pixels)
    first, last = MEANING[word]
    inside = (
        (hue_deg >= first) & (hue_deg <= last) if first < last else (hue_deg >= first) | (hue_deg <= last)
    )
    meant = pixels[inside & (saturation >= SATURATED)]
    if len(meant) < max(1, MEANT * len(pixels)):
        return ""
    new_deg, _ = _hues(exchange(meant, channels))
    ends = np.array([*NAMES.values(), 345])
    names = np.array([*NAMES, "magenta", "red"])[np.searchsorted(ends, new_deg, side="right")]
    values, counts = np.unique(names, return_counts=True)
    if counts.max() < AGREED * len(meant):
        return ""
    name = str(values[counts.argmax()])
    # Brown is a dark orange or red, and pink a light red or magenta: they stay what they are near there.
    stays = {"brown": ("orange", "red"), "pink": ("magenta", "red")}.get(word, ())
    return word if name in stays else name


def _hues(pixels: Float[np.ndarray, "N 4"]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Hue in degrees, from 0 to 360, and saturation, from 0 to 1, as in HSV."""
    rgb = pixels[:, :3].astype(np.float64)
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = np.maximum(high - low, 1e-9)
    red, green, blue = rgb.T
    sectors = np.select(
        [high == red, high == green],
        [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
        (red - green) / chroma + 4,
    )
    return 60 * sectors, np.where(high > 0, (high - low) / np.maximum(high, 1e-9), 0.0)


def _replace_words(caption: str, new: Mapping[str, str]) -> str:
    """Replaces words, and "a" or "an" before them."""

    def replace(match: re.Match[str]) -> str:
        article, space, word = match[1] or "", match[2] or "", new[match[3].lower()]
        if article:
            an = "an" if word[0] in "aeiou" else "a"
            article = an.capitalize() if article[0].isupper() else an
        return article + space + (word.capitalize() if match[3][0].isupper() else word)

    return re.sub(rf"\b(?:(an?)(\s+))?({'|'.join(new)})\b", replace, caption, flags=re.IGNORECASE)
