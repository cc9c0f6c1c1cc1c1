"""A user's pictures as views: the object is found, cut out, centred and scaled (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from im3d_jax.conditions.foreground.find import find
from recon_torch.errors import UserError
from recon_torch.files import check_regular
from recon_torch.views import masks
from recon_torch.views.foreground import silhouette
from recon_torch.views.foreground.backdrop import shrink
from recon_torch.views.foreground.found import Found
from recon_torch.views.images import read_image

SMALLEST_SIDE_PX, MOST_ELONGATED = 8, 100
"""Of a picture: its shorter side, and how many times as long the longer one is at most."""

WORKING_PX = (512, 1024)
"""The longer side of the picture in which the object is sought: twice the view's, within these bounds."""

AROUND = 0.5
"""An object that is small in its picture is sought again with so much around it, by its longer side."""

SMALLEST_OBJECT_PX = 24
"""Objects with a smaller longer side have no detail to speak of."""


class Placed(NamedTuple):
    """View 0, over white, and what its foreground leaves open.

    Attributes:
        rgb, alpha: in [0, 1].
        doubts: why this may not be the object; each goes on after "the object" in a sentence.
        hints: what else is to be known, in the same way.
    """

    rgb: Float[np.ndarray, "size size 3"]
    alpha: Float[np.ndarray, "size size 1"]
    doubts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


class Sought(NamedTuple):
    """An object that was found in a picture, before it is cut out.

    Attributes:
        premultiplied: the picture, or the part of it where the object is, RGBA with colours times alpha.
        middle: (row, column) of the object's box in it.
        box: height and width of that box in pixels.
        doubts, hints: see `Placed`.
    """

    premultiplied: Float[np.ndarray, "H W 4"]
    middle: Float[np.ndarray, "2"]
    box: Float[np.ndarray, "2"]
    doubts: tuple[str, ...]
    hints: tuple[str, ...]


def load_image(
    path: str | Path, size: int, fill: float, background_tolerance: float, mask_weights: str = ""
) -> Placed:
    """Reads a picture and makes it view 0, see `place`. Raises UserError also for what cannot be read."""
    [placed] = load_images([path], size, fill, background_tolerance, mask_weights)
    return placed


def load_images(
    paths: Sequence[str | Path], size: int, fill: float, background_tolerance: float, mask_weights: str = ""
) -> list[Placed]:
    """Reads pictures of one object from several sides, and makes them views at one scale.

    From cameras of one elevation an object is about equally high in all pictures, whatever it is wide. So all
    get one height, at which `fill` of a view's side is the longest side that the object has in any of them.

    Raises UserError also for what cannot be read.
    """
    sought = []
    for path in paths:
        check_regular(path)
        sought.append(_seek(read_image(path), str(path), size, fill, background_tolerance, mask_weights))
    longest = max(sought, key=lambda each: each.box.max() / each.box[0])
    sides = [longest.box.max() * (each.box[0] / longest.box[0]) / fill for each in sought]
    return [_cut(each, side, size) for each, side in zip(sought, sides, strict=True)]


def place(
    picture: Float[np.ndarray, "H W C"],
    name: str,
    size: int,
    fill: float,
    background_tolerance: float,
    mask_weights: str = "",
) -> Placed:
    """Makes a picture view 0: its object over white, centred, as large as the objects of training views.

    The object is what alpha shows, where alpha separates something. Otherwise it is what stands out from a
    backdrop that is even or changes smoothly, without its shadow. Where there is no such backdrop, or the
    foreground is doubtful, it is what IS-Net finds. See `conditions.foreground`.

    Args:
        picture: RGB or RGBA in [0, 1].
        name: what errors call the picture.
        size: side of the square result in pixels.
        fill: share of the result's side that the object's longer side gets.
        background_tolerance: difference from the backdrop, in [0, 1], from which a pixel is never taken for
            noise.
        mask_weights: IS-Net's .onnx file, see `masks.isnet_masks`; "" for none.

    Raises UserError if the picture is too small or too thin, if it shows no object, or if it has neither
    alpha nor a smooth backdrop and there are no mask weights.
    """
    sought = _seek(picture, name, size, fill, background_tolerance, mask_weights)
    return _cut(sought, sought.box.max() / fill, size)


def _seek(
    picture: Float[np.ndarray, "H W C"],
    name: str,
    size: int,
    fill: float,
    background_tolerance: float,
    mask_weights: str,
) -> Sought:
    """Finds the object of a picture; the arguments are those of `place`."""
    height, width = picture.shape[:2]
    if min(height, width) < SMALLEST_SIDE_PX or max(height, width) > MOST_ELONGATED * min(height, width):
        raise UserError(
            f"{name} has {width} x {height} pixels; give a picture of at least {SMALLEST_SIDE_PX} x"
            f" {SMALLEST_SIDE_PX} that is not more than {MOST_ELONGATED} times as long as wide"
        )
    working_px = int(np.clip(2 * size, *WORKING_PX))
    found, scale = _look_closer(picture, working_px, size * fill, background_tolerance)
    if mask_weights and (found is None or found.doubts):
        found = _by_network(_at_most(picture, working_px)[..., :3], mask_weights, found)
    if found is None:
        raise UserError(f"{name} has neither a plain background nor alpha; cut the object out as RGBA")
    if not found.mask.any():
        raise UserError(f"{name} shows no object; give one with alpha or on a plain background")
    middle, box = _box(found)
    doubts = found.doubts
    if box.max() / scale < SMALLEST_OBJECT_PX:
        doubts += (f"is only {round(box.max() / scale)} pixels large in the picture",)
    premultiplied = np.concatenate([found.rgb * found.coverage, found.coverage], -1)
    return Sought(premultiplied, middle, box, doubts, found.hints)


def _cut(sought: Sought, side: float, size: int) -> Placed:
    """An object over white, from a square of `side` pixels around it, in `size` pixels."""
    cut = _cut_square(sought.premultiplied, sought.middle, side, size)
    return Placed(cut[..., :3] + 1 - cut[..., 3:], cut[..., 3:], sought.doubts, sought.hints)


def _look_closer(
    picture: Float[np.ndarray, "H W C"], working_px: int, wanted_px: float, tolerance: float
) -> tuple[Found | None, float]:
    """The object in a picture at the working size, and that size by the picture's.

    A small object of a large picture is sought again in the part of the picture where it is.

    wanted_px: how large the object will be shown.
    """
    small = _at_most(picture, working_px)
    found, scale = find(small, tolerance), len(small) / len(picture)
    if found is None or not found.mask.any() or scale == 1:
        return found, scale
    middle, box = _box(found)
    side = float(box.max())
    if side >= wanted_px:
        return found, scale
    reach = (0.5 + AROUND) * side
    first = np.maximum(np.floor((middle - reach) / scale), 0).astype(int)
    last = np.ceil((middle + reach) / scale).astype(int)
    part = picture[first[0] : last[0], first[1] : last[1]]
    small = _at_most(part, working_px)
    closer = find(small, tolerance)
    if closer is None or not closer.mask.any():
        return found, scale
    doubts = tuple(dict.fromkeys(closer.doubts + found.doubts))
    return closer._replace(doubts=doubts), len(small) / len(part)


def _at_most(picture: Float[np.ndarray, "H W C"], longer_px: int) -> Float[np.ndarray, "h w C"]:
    """The picture, made smaller if it is larger. Invisible pixels do not mix with visible ones."""
    factor = longer_px / max(picture.shape[:2])
    if factor >= 1:
        return picture.astype(np.float32)
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    if picture.shape[-1] == 3 or np.ptp(picture[..., 3]) == 0:
        return shrink(picture, height, width)
    alpha = picture[..., 3:]
    weighted = shrink(np.concatenate([picture[..., :3] * alpha, alpha], -1), height, width)
    return np.concatenate([weighted[..., :3] / np.maximum(weighted[..., 3:], 1e-4), weighted[..., 3:]], -1)


def _by_network(rgb: Float[np.ndarray, "H W 3"], weights: str, other: Found | None) -> Found:
    """What IS-Net finds, or what was found without it, if only that one is an object."""
    coverage = masks.isnet_masks(rgb[None], weights)[0]
    inside = coverage[..., 0] > 0.5
    problem = masks.problem(coverage)
    if other is not None and other.mask.any() and problem is not None:
        return other
    if not inside.any():
        return Found(rgb, coverage, inside)
    parts = silhouette.parts(inside)
    doubts = parts.doubts if problem is None else (f"{problem} in the mask that IS-Net makes", *parts.doubts)
    reach = ndimage.binary_dilation(parts.mask, iterations=silhouette.EDGE_PX)
    return Found(rgb, coverage * reach[..., None], parts.mask, doubts, ("was found by IS-Net",))


def _box(found: Found) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """Middle (row, column) and sides of what is half covered, or transparent and not just an edge."""
    wide = ndimage.binary_opening(found.mask, iterations=silhouette.EDGE_PX)
    shown = (found.coverage[..., 0] > 0.5) | wide
    shown = shown if shown.any() else found.mask
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    middle = np.array([rows[0] + rows[-1] + 1, columns[0] + columns[-1] + 1]) / 2
    return middle, np.array([np.ptp(rows), np.ptp(columns)]) + 1.0


def _cut_square(
    picture: Float[np.ndarray, "H W C"], middle: Float[np.ndarray, " 2"], side: float, size: int
) -> Float[np.ndarray, "{size} {size} C"]:
    """Cuts out a square of `side` pixels around `middle` (row, column) and scales it to `size`.

    What lies beyond the picture is empty.
    """
    corner = np.floor(middle - side / 2).astype(int)
    extent = int(np.ceil(side)) + 1
    first, last = np.maximum(corner, 0), np.minimum(corner + extent, picture.shape[:2])
    window = np.zeros((extent, extent, picture.shape[-1]), np.float32)
    inside = tuple(slice(a, b) for a, b in zip(first - corner, last - corner, strict=True))
    window[inside] = picture[first[0] : last[0], first[1] : last[1]]
    top, left = middle - side / 2 - corner
    box = (left, top, left + side, top + side)
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BOX, box=box))
        for channel in np.moveaxis(window, -1, 0)
    ]
    return np.stack(channels, -1).clip(0, 1)
