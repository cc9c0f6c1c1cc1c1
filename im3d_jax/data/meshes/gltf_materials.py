"""The materials of a glTF file: base colour, alpha, emission, and textures (glTF 2.0, Sec. 3.8 and 3.9)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num

from im3d_jax.data.meshes.accessors import Accessors, item
from im3d_jax.data.meshes.parts import AlphaMode, Material, Texture, Wrap
from im3d_jax.data.meshes.pictures import TexelBudget, UnreadablePicture, decode_picture
from recon_torch.errors import UserError

WRAPS = {10497: Wrap.REPEAT, 33071: Wrap.CLAMP, 33648: Wrap.MIRROR}
NEAREST = 9728
BASISU = "KHR_texture_basisu"
PICTURES = ("EXT_texture_webp", "EXT_texture_avif")
"""Extensions of textures whose pictures Pillow reads."""

SPECULAR_GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
UNLIT, STRENGTH = "KHR_materials_unlit", "KHR_materials_emissive_strength"
TRANSFORM = "KHR_texture_transform"


class TextureUse(NamedTuple):
    """A texture of the file as a material uses it.

    texture: its index in the textures of the scene.
    uv_set: n of TEXCOORD_n.
    transform: texture coordinates are multiplied with it, from the left and after a 1.
    """

    texture: int
    uv_set: int
    transform: Float[np.ndarray, "2 3"]

    def place(self, uvs: Num[np.ndarray, "V 2"]) -> Float[np.ndarray, "V 2"]:
        """Where in the texture the file's coordinates are."""
        return uvs @ self.transform[:, :2].T + self.transform[:, 2]


class Look(NamedTuple):
    """A material of the file. factor: linear RGBA. base, emission: the two textures, where it has them."""

    material: Material
    factor: tuple[float, ...]
    base: TextureUse | None
    emission: TextureUse | None


class Materials:
    """Reads the materials that are used, and the textures that these use.

    textures: those read until now.

    Args:
        left_out: gets what the materials ask for and the renders do not show.
    """

    def __init__(
        self, document: Mapping[str, Any], accessors: Accessors, budget: TexelBudget, left_out: set[str]
    ):
        self._document, self._accessors = document, accessors
        self._budget, self._left_out = budget, left_out
        self._looks: dict[int, Look] = {}
        self._indices: dict[tuple[int, int | None], int | None] = {}
        self.textures: list[Texture] = []

    def look(self, index: int) -> Look:
        """Material `index` of the file."""
        if index not in self._looks:
            self._looks[index] = self._read(item(self._document, "materials", index))
        return self._looks[index]

    def _read(self, material: Mapping[str, Any]) -> Look:
        extensions = material.get("extensions", {})
        unlit = UNLIT in extensions
        self._left_out.update(_not_shown(material, unlit))
        if SPECULAR_GLOSSINESS in extensions:
            pbr = extensions[SPECULAR_GLOSSINESS]
            factor, base = pbr.get("diffuseFactor"), pbr.get("diffuseTexture")
        else:
            pbr = material.get("pbrMetallicRoughness", {})
            factor, base = pbr.get("baseColorFactor"), pbr.get("baseColorTexture")
        strength = extensions.get(STRENGTH, {}).get("emissiveStrength", 1.0)
        emission = [strength * each for each in material.get("emissiveFactor", (0.0, 0.0, 0.0))]
        glows = any(emission) and not unlit
        emissive = material.get("emissiveTexture") if glows else None
        base_use, emission_use = self._texture_use(base), self._texture_use(emissive)
        return Look(
            Material(
                -1 if base_use is None else base_use.texture,
                AlphaMode(material.get("alphaMode", "OPAQUE")),
                float(material.get("alphaCutoff", 0.5)),
                unlit,
                (float(emission[0]), float(emission[1]), float(emission[2])) if glows else (0.0, 0.0, 0.0),
                -1 if emission_use is None else emission_use.texture,
            ),
            tuple(map(float, factor or (1.0, 1.0, 1.0, 1.0))),
            base_use,
            emission_use,
        )

    def _texture_use(self, info: Mapping[str, Any] | None) -> TextureUse | None:
        if info is None:
            return None
        index = self._texture(info["index"])
        if index is None:
            return None
        transform = info.get("extensions", {}).get(TRANSFORM, {})
        uv_set = transform.get("texCoord", info.get("texCoord", 0))
        return TextureUse(index, uv_set, _matrix(transform))

    def _texture(self, number: int) -> int | None:
        """The index in `textures` of a texture; None, and a line in `left_out`, if it is missing."""
        texture = item(self._document, "textures", number)
        extensions = texture.get("extensions", {})
        sources = [extensions[name].get("source") for name in PICTURES if name in extensions]
        sources = [each for each in [*sources, texture.get("source")] if each is not None]
        if not sources:
            if BASISU in extensions:
                raise UserError(
                    f"it needs {BASISU}, which is not read; save its textures as PNG, JPEG or WebP"
                )
            self._left_out.add("unreadable texture: " + ", ".join(extensions or ["it has no source"]))
            return None
        for source in sources:  # the first that can be read; others are there for readers that know less
            key = (source, texture.get("sampler"))
            if key not in self._indices:
                self._indices[key] = self._load(source, texture.get("sampler"))
            if self._indices[key] is not None:
                return self._indices[key]
        return None

    def _load(self, source: int, sampler: int | None) -> int | None:
        image = item(self._document, "images", source)
        if "uri" in image:
            name = "in the file" if image["uri"].startswith("data:") else image["uri"]
            try:
                content = self._accessors.resource(image["uri"])
            except UserError:
                self._left_out.add(f"missing texture: {name[:200]}")
                return None
        else:
            name, content = (
                image.get("name") or f"image {source}",
                self._accessors.view(image["bufferView"])[0],
            )
        try:
            pixels = decode_picture(bytes(content), self._budget)
        except UnreadablePicture:
            self._left_out.add(f"unreadable texture: {name[:200]}")
            return None
        settings = {} if sampler is None else item(self._document, "samplers", sampler)
        wrap = WRAPS[settings.get("wrapS", 10497)], WRAPS[settings.get("wrapT", 10497)]
        self.textures.append(Texture(pixels, wrap, settings.get("magFilter") == NEAREST))
        return len(self.textures) - 1


def _matrix(transform: Mapping[str, Any]) -> Float[np.ndarray, "2 3"]:
    """Scale, then rotation, then offset. With v downwards, counter-clockwise turns +u towards -v."""
    (x, y), (scale_u, scale_v) = transform.get("offset", (0, 0)), transform.get("scale", (1, 1))
    cos, sin = math.cos(transform.get("rotation", 0.0)), math.sin(transform.get("rotation", 0.0))
    return np.array([[cos * scale_u, sin * scale_v, x], [-sin * scale_u, cos * scale_v, y]])


def _not_shown(material: Mapping[str, Any], unlit: bool) -> set[str]:
    """What a material asks for and the renders do not show; extensions are named by the document's reader."""
    if unlit:
        return set()
    pbr, has = material.get("pbrMetallicRoughness", {}), set()
    if "normalTexture" in material:
        has.add("normal map")
    if "occlusionTexture" in material:
        has.add("occlusion map")
    if SPECULAR_GLOSSINESS in material.get("extensions", {}):
        return has | {"specular colour and glossiness"}
    if pbr.get("metallicFactor", 1.0) > 0:
        has.add("metalness")
    if pbr.get("roughnessFactor", 1.0) < 1 or "metallicRoughnessTexture" in pbr:
        has.add("roughness")
    return has
