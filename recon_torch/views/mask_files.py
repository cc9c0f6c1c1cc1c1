"""Masks in files, read as their makers mean them.

White on black is coverage, in grey levels. Segmentation tools write something else: 0 and 1, the number of a
class or of an object, palettes (Pascal VOC, DAVIS), one colour on black, the picture itself with alpha. All
of these say which pixels are background, by 0 or black. Where that cannot be told, the file is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from scipy import ndimage

from recon_torch.errors import UserError
from recon_torch.views.images import OPAQUE, opened

VOID = 255  # the class of Pascal VOC that stands for the outline of objects
MOST_CLASSES = 40  # numbers up to this stand for classes, larger ones for grey levels
WHITE = 250  # the least grey level that is white, which JPEG makes of 255
FEW_LEVELS = 32  # a picture of no more grey levels or colours has no soft edges
FEW_LABELS = 8  # shades of one colour, of which a soft edge has more
LEAST_OF_VOID = 0.1  # pixels of a class for each pixel of its outline
BLACK = 12  # the largest channel of a colour that is black, which JPEG makes of 0
SAME_HUE = 0.1  # of 1: how far a soft edge may be from a shade of the one colour
SURROUNDS = 0.95  # the share of the border that an inverted mask covers


class Mask(NamedTuple):
    """A mask, and how its file was read where that is not grey levels."""

    coverage: Float[np.ndarray, "H W 1"]
    reading: str = ""


def read_mask(path: Path, width: int, height: int) -> Mask:
    """Reads the mask of an image of this size.

    Raises:
        UserError: the file cannot be read, has another size, or does not show what is background.
    """
    with opened(path) as image:
        image.load()
        if image.size != (width, height):
            image = ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise UserError(
                f"{path} is {image.width}x{image.height} px, its image is {width}x{height}; make them agree"
            )
        try:
            coverage, reading = _read(image)
        except UserError as error:
            raise UserError(f"{path} {error}; give white on black") from None
    if _is_inverted(coverage):
        raise UserError(f"{path} is white around a black object; invert it, because white is the object")
    return Mask(np.ascontiguousarray(coverage[..., None], np.float32), reading)


def _read(image: Image.Image) -> tuple[Float[np.ndarray, "H W"], str]:
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3] / 255.0
        if alpha.min() <= OPAQUE and np.ptp(alpha) > 0:
            return alpha, "an alpha channel, which is taken"
        image = image.convert("RGB")
    if image.mode == "P":
        return _of_palette(image)
    if image.mode == "1":
        return np.asarray(image).astype(float), ""
    if image.mode == "L" or image.mode.startswith("I"):
        return _of_levels(np.asarray(image).astype(np.int64))
    if image.mode == "F":
        raise UserError("has floating-point pixels, whose white is not known")
    rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    if np.ptp(rgb, axis=-1).max() <= BLACK:  # JPEG makes grey pixels a little coloured
        return _of_levels(rgb[..., 0] if np.ptp(rgb, axis=-1).max() == 0 else rgb.max(-1))
    return _of_colors(rgb)


def _of_palette(image: Image.Image) -> tuple[Float[np.ndarray, "H W"], str]:
    """A palette of grey levels is a grey picture; a coloured one numbers classes or objects from 1."""
    indices = np.asarray(image).astype(np.int64)
    palette = np.zeros((256, 3), np.int64)
    given = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    palette[: len(given)] = given
    used = palette[np.unique(indices)]
    if (used == used[:, :1]).all():
        return _of_levels(palette[indices, 0])
    if palette[0].any():
        raise UserError(f"has a palette whose first colour, the background, is {tuple(palette[0].tolist())}")
    return _of_classes(indices, "a palette")


def _of_levels(levels: Int[np.ndarray, "H W"]) -> tuple[Float[np.ndarray, "H W"], str]:
    """Coverage of grey levels, of 8 or 16 bits, which may be numbers of classes instead."""
    found, counts = np.unique(levels, return_counts=True)
    most = int(found[-1])
    if found[0] < 0:
        raise UserError("has negative values")
    if most == 0:
        return np.zeros(levels.shape), ""
    if most <= MOST_CLASSES:
        return _of_classes(levels, f"values up to {most}")
    classes = (found > 0) & (found < VOID)
    with_outlines = most == VOID and found[0] == 0 and classes.any() and found[classes][-1] <= MOST_CLASSES
    if with_outlines and counts[classes].sum() >= LEAST_OF_VOID * counts[-1]:
        return _of_classes(levels, f"classes up to {found[classes][-1]} and their outlines")
    white = 255 if most <= 255 else 65535
    if white >= most >= white * WHITE / 255:
        return levels / white, ""
    if found[0] == 0 and len(found) <= FEW_LEVELS:
        return _of_classes(levels, f"values up to {most}")
    if most > 255:
        raise UserError(f"has values from {found[0]} up to {most}, of 65535")
    return levels / white, f"a coverage of at most {most} of 255"


def _of_classes(indices: Int[np.ndarray, "H W"], what: str) -> tuple[Float[np.ndarray, "H W"], str]:
    """All that is not 0 is the object. An outline is object as far as its nearest classified pixel is."""
    if indices.min() > 0:
        raise UserError(f"has {what}, and no 0 for the background")
    outline = (indices == VOID) & ((indices > 0) & (indices < VOID)).any()
    if outline.any():
        rows, columns = ndimage.distance_transform_edt(outline, return_distances=False, return_indices=True)
        indices = indices[rows, columns]
    return (indices > 0).astype(float), f"{what}: all but 0 is the object"


def _of_colors(rgb: Int[np.ndarray, "H W 3"]) -> tuple[Float[np.ndarray, "H W"], str]:
    """Colours on black: labels with hard edges, or one colour with soft ones."""
    level = rgb.max(-1)
    if (level <= BLACK).mean() == 0:
        raise UserError("is coloured, and nothing of it is black")
    num_colors = len(np.unique(rgb.reshape(-1, 3), axis=0))
    color = rgb[level > 0.9 * level.max()].mean(0)
    share = rgb @ color / (color @ color)
    one_hue = np.abs(rgb - share[..., None] * color).max() <= SAME_HUE * 255
    if one_hue and num_colors > FEW_LABELS:
        return share.clip(0, 1), "shades of one colour, which are taken as coverage"
    if num_colors > FEW_LEVELS:
        raise UserError("has more colours than a mask")
    return (level > BLACK).astype(float), "colours: all but black is the object"


def _is_inverted(coverage: Float[np.ndarray, "H W"]) -> bool:
    """Whether what is covered surrounds what is not, which is large enough for an object."""
    outside = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
    return bool((outside > 0.5).mean() >= SURROUNDS and (coverage < 0.5).mean() > 0.002)
