"""Pictures and grids of pictures as views [K,H,W,C]. Nothing here needs torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from im3d_jax.evaluate.outputs.finding import MethodOutputs
from im3d_jax.evaluate.outputs.layouts import IN_3D, Kind, Layout
from recon_torch.errors import UserError
from recon_torch.views.images import OPAQUE, read_image, to_uint8

NUM_VIEWS = 16
NUMBER = re.compile(r"\d+")

Views = UInt8[np.ndarray, "K H W C"]


class OtherCount(UserError):
    """A row has another number of views than it should."""


def expected_views(outputs: MethodOutputs, num_views: int = 0) -> int:
    """The number of views that a row must have: what the layout states, or what most rows have.

    Of two numbers that are equally frequent it is the greater one.

    num_views: of videos and 3D objects, where the layout states none; 0 is `NUM_VIEWS`.
    """
    layout = outputs.layout
    if layout.stated_views:
        return layout.stated_views
    if layout.kind in (Kind.VIDEO, *IN_3D):
        return num_views or NUM_VIEWS
    counts = Counter(len(row.paths) for row in outputs.rows.values())
    return max(counts, key=lambda count: (counts[count], count), default=0)


def evenly(count: int, num: int) -> list[int]:
    """`num` of `count` numbers, evenly spaced from 0."""
    return [place * count // num for place in range(num)]


def read(layout: Layout, paths: Sequence[Path], num_views: int) -> Views:
    """The views of a row of pictures or of a grid: RGBA where all have alpha that means something, else RGB.

    num_views: see `expected_views`.

    Raises OtherCount for another number of pictures, and UserError for what cannot be read, for pictures of
    several sizes, and for such as are not views alone.
    """
    if layout.kind == Kind.GRID:
        found = _tiles(paths[0], layout)
    else:
        _check_names(paths)
        if len(paths) != num_views:
            raise OtherCount(f"{len(paths)} pictures, not {num_views}")
        found = [squared(to_uint8(read_image(path)), layout) for path in paths]
    sizes = {picture.shape[:2] for picture in found}
    if len(sizes) > 1:
        raise UserError(f"its pictures have {len(sizes)} sizes")
    has_alpha = all(picture.shape[-1] == 4 for picture in found)
    if has_alpha and min(picture[..., 3].min() for picture in found) < 255 * OPAQUE:
        return np.stack(found)
    return np.stack([over_white(picture) for picture in found])


def _check_names(paths: Sequence[Path]) -> None:
    """Raises UserError if pictures of several kinds are mixed, such as 000.png and 000_mask.png.

    Views are numbered, so that their names have one form, or each has a name of its own, such as front.png.
    """
    forms = {NUMBER.sub("0", path.stem): path.name for path in reversed(paths)}
    counts = Counter(path.stem for path in paths)
    doubles = [path.name for path in paths if counts[path.stem] > 1]
    mixed = sorted(forms.values()) if 1 < len(forms) <= len(paths) / 2 else doubles
    if len(mixed) > 1:
        raise UserError(
            f"it has pictures of several kinds, such as {mixed[0]} and {mixed[1]}; name one kind by a path in"
            " a YAML file, such as {name}/{view}.png"
        )


def over_white(pictures: UInt8[np.ndarray, "*N C"]) -> UInt8[np.ndarray, "*N 3"]:
    """RGB over white of RGB or RGBA pictures."""
    if pictures.shape[-1] == 3:
        return pictures
    alpha = pictures[..., 3:].astype(np.float32) / 255
    return np.rint(pictures[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def squared(picture: UInt8[np.ndarray, "*N W C"], layout: Layout) -> UInt8[np.ndarray, "*N w C"]:
    """The leftmost square of what is wider than high, where the layout says so."""
    return picture[..., : picture.shape[-3], :] if layout.square else picture


def _tiles(path: Path, layout: Layout) -> list[UInt8[np.ndarray, "H W C"]]:
    picture, (rows, columns) = to_uint8(read_image(path)), layout.grid
    height, width = picture.shape[:2]
    if height % rows or width % columns:
        raise OtherCount(f"{width} x {height} pixels do not part into {rows} rows of {columns}")
    tiles = [part for row in np.split(picture, rows) for part in np.split(row, columns, axis=1)]
    return [tiles[place] for place in layout.tiles or range(len(tiles))]
