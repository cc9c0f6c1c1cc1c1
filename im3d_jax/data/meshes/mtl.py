"""Materials of .obj files: what is read of a .mtl file, and the pictures that this names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.parts import GREY, AlphaMode, Material, Texture, Wrap
from im3d_jax.data.meshes.pictures import TexelBudget, UnreadablePicture, decode_picture, find_beside

Pixels = UInt8[np.ndarray, "height width 4"]

NOT_SHOWN = {
    **dict.fromkeys(("map_bump", "bump", "norm", "disp", "map_disp"), "normal map"),
    **dict.fromkeys(("map_ks", "map_ns", "refl", "map_refl"), "specular highlights"),
    **dict.fromkeys(("map_pm", "map_pr", "map_ps", "map_ka", "decal", "map_ao"), "other maps"),
}
"""Lines of a .mtl file that name what the renders do not show."""

NUMBER, WORD = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", r"\S+"
OPTION_ARGUMENTS = {
    **dict.fromkeys(("-blendu", "-blendv", "-cc", "-clamp", "-imfchan", "-texres", "-type"), (WORD, 1)),
    **dict.fromkeys(("-bm", "-boost"), (NUMBER, 1)),
    **{"-mm": (NUMBER, 2), "-o": (NUMBER, 3), "-s": (NUMBER, 3), "-t": (NUMBER, 3)},
}
"""The options of a texture: what their arguments look like, and how many there are at most."""

NOT_READ = ("-mm", "-cc", "-imfchan", "-boost", "-t")
"""Options that change what a texture looks like, and are not read."""


class Reference(NamedTuple):
    """A texture as a .mtl file names it.

    scale, offset: texture coordinates are multiplied with the one, then the other is added. In .obj files v
        grows upwards.
    options: the names of all options, such as "-clamp".
    """

    name: str
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    clamp: bool = False
    options: frozenset[str] = frozenset()


class Look(NamedTuple):
    """A material. factor: linear RGBA. base, emission: the two textures, where they could be read."""

    material: Material
    factor: Float[np.ndarray, "4"]
    base: Reference | None
    emission: Reference | None


Lines = dict[str, str]
"""The lines of a material: the first word in lower case, and what follows it."""


def lines_of(text: str) -> Iterator[tuple[str, str]]:
    """First word and rest of all lines that are neither empty nor comments; a backslash joins two lines.

    A # starts a comment at the beginning of a line only, because names of materials have it too.
    """
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        word, *rest = line.split(None, 1) or [""]
        if word and word[0] != "#":
            yield word, rest[0].strip() if rest else ""


def decode_text(content: bytes) -> str:
    """Text in UTF-8, or else in the one-byte encoding of Western Windows."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def read_library(content: bytes) -> dict[str, Lines]:
    """Name -> lines of each material of a .mtl file."""
    materials: dict[str, Lines] = {}
    lines: Lines = {}
    for word, rest in lines_of(decode_text(content)):
        if word.lower() == "newmtl":
            lines = materials.setdefault(rest, {})
        else:
            lines[word.lower()] = rest
    return materials


def read_reference(text: str) -> Reference:
    """The texture of a line such as `-s 2 2 1 -clamp on my wood.png`. The name may have spaces."""
    values: dict[str, list[str]] = {}
    while (option := re.match(r"(-[A-Za-z]+)\s+(?=\S)", text)) and option[1].lower() in OPTION_ARGUMENTS:
        pattern, most = OPTION_ARGUMENTS[option[1].lower()]
        text = text[option.end() :]
        given: list[str] = []
        while len(given) < most and (value := re.match(rf"({pattern})\s+(?=\S)", text)):
            text, given = text[value.end() :], [*given, value[1]]
        values[option[1].lower()] = given
    scale = [*map(float, values.get("-s", [])), 1.0, 1.0]
    offset = [*map(float, values.get("-o", [])), 0.0, 0.0]
    clamp = values.get("-clamp", ["off"])[0].lower() == "on"
    return Reference(text, (scale[0], scale[1]), (offset[0], offset[1]), clamp, frozenset(values))


class Materials:
    """The looks of the materials of an .obj file.

    textures: those read until now.

    Args:
        folder: of the .mtl files, in which textures are looked for.
        left_out: gets what the materials ask for and the renders do not show.
    """

    def __init__(self, folder: Path, budget: TexelBudget, left_out: set[str]):
        self._folder, self._budget, self._left_out = folder, budget, left_out
        self._pixels: dict[str, Pixels | None] = {}
        self._indices: dict[tuple, int] = {}
        self.textures: list[Texture] = []

    def look(self, lines: Lines) -> Look:
        """What the lines of a material say. Colours of .mtl files are taken as sRGB."""
        self._left_out.update(kind for word, kind in NOT_SHOWN.items() if word in lines)
        if any(_numbers(lines.get("ks", ""), 3)):
            self._left_out.add("specular highlights")
        base, texture, see_through = self._base(lines)
        emission, emission_texture = self._emission(lines)
        alpha = self._alpha(lines)
        color = _numbers(lines.get("kd", ""), 3) or ([1.0] * 3 if base else [GREY] * 3)
        if self._picture(lines.get("map_kd")) and not any(color):
            color = [1.0] * 3  # exporters write a black Kd beside a texture, which is not meant to be black
        glow = _numbers(lines.get("ke", ""), 3)
        if emission and not glow:
            glow = [1.0] * 3
        red, green, blue = linear_from_srgb(np.clip(glow or [0.0] * 3, 0, 1)).tolist()
        return Look(
            Material(
                texture,
                AlphaMode.BLEND if see_through or alpha < 1 else AlphaMode.OPAQUE,
                emission=(red, green, blue),
                emission_texture=emission_texture,
            ),
            np.append(linear_from_srgb(np.clip(color, 0, 1)), alpha),
            base,
            emission,
        )

    def _alpha(self, lines: Lines) -> float:
        """The opacity: d, or else 1 - Tr. An opacity of 0 is not believed: exporters confuse the two."""
        opacity = _numbers(lines.get("d", "").removeprefix("-halo"), 1)
        transparency = _numbers(lines.get("tr", ""), 1)
        alpha = opacity[0] if opacity else 1 - transparency[0] if transparency else 1.0
        if alpha <= 0:
            self._left_out.add("opacity of 0")
        return float(alpha) if 0 < alpha < 1 else 1.0

    def _base(self, lines: Lines) -> tuple[Reference | None, int, bool]:
        """map_Kd, its index in `textures`, and whether a map_d makes it see-through."""
        diffuse, opacity = (self._picture(lines.get(word)) for word in ("map_kd", "map_d"))
        found = diffuse or opacity
        if found is None:
            return None, -1, False
        reference = found[0]
        if diffuse and opacity and opacity[0]._replace(name="") != reference._replace(name=""):
            self._left_out.add("texture options of map_d")
        key = tuple(each and each[0].name for each in (diffuse, opacity)) + (reference.clamp,)
        if key not in self._indices:
            pixels = self._with_alpha(diffuse and diffuse[1], opacity and opacity[1])
            self._indices[key] = self._add(pixels, reference)
        return reference, self._indices[key], opacity is not None

    def _with_alpha(self, diffuse: Pixels | None, opacity: Pixels | None) -> Pixels:
        """The colours of map_Kd, or white, with the alpha of map_d, or none."""
        if diffuse is not None and opacity is None and (diffuse[..., 3] < 255).any():
            self._left_out.add("alpha channel of map_Kd")
        like = opacity if diffuse is None else diffuse
        assert like is not None
        pixels = np.full_like(like, 255)
        if diffuse is not None:
            pixels[..., :3] = diffuse[..., :3]
        if opacity is not None:
            pixels[..., 3] = _opacity(opacity, pixels.shape[:2])
        return pixels

    def _emission(self, lines: Lines) -> tuple[Reference | None, int]:
        found = self._picture(lines.get("map_ke"))
        if not found:
            return None, -1
        key = ("emission", found[0].name, found[0].clamp)
        if key not in self._indices:
            self._indices[key] = self._add(found[1], found[0])
        return found[0], self._indices[key]

    def _add(self, pixels: Pixels, reference: Reference) -> int:
        wrap = Wrap.CLAMP if reference.clamp else Wrap.REPEAT
        self.textures.append(Texture(pixels, (wrap, wrap)))
        return len(self.textures) - 1

    def _picture(self, line: str | None) -> tuple[Reference, Pixels] | None:
        """A texture and its pixels; None, and a line in `left_out`, if it is missing or broken."""
        if not line:
            return None
        reference = read_reference(line)
        self._left_out.update(f"texture option: {each}" for each in reference.options & set(NOT_READ))
        if reference.name not in self._pixels:
            self._pixels[reference.name] = self._load(reference.name)
        pixels = self._pixels[reference.name]
        return None if pixels is None else (reference, pixels)

    def _load(self, name: str) -> Pixels | None:
        path = find_beside(self._folder, name)
        if path is None:
            self._left_out.add(f"missing texture: {name[:200]}")
            return None
        try:
            return decode_picture(path.read_bytes(), self._budget)
        except (UnreadablePicture, OSError):
            self._left_out.add(f"unreadable texture: {name[:200]}")
            return None


def _opacity(pixels: Pixels, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """The alpha of a picture, or its brightness if it has no alpha, at a size in rows and columns."""
    picture = Image.fromarray(pixels)
    channel = picture.getchannel("A") if (pixels[..., 3] < 255).any() else picture.convert("L")
    return np.asarray(channel.resize(size[::-1], Image.Resampling.BILINEAR))


def _numbers(text: str, count: int) -> list[float]:
    """The first numbers of a line, the last repeated up to `count`; nothing if there are none."""
    try:
        found = [float(word) for word in text.split()[:count]]
    except ValueError:
        return []
    return found + found[-1:] * (count - len(found))
