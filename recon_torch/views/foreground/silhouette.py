"""From the pixels that differ from the backdrop to a silhouette: specks, parts, holes, and soft edges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

SPECK = 0.002  # share of the largest part's area below which something is dust, wherever it lies
PART = 0.03  # share from which a part belongs to the object at any distance, as a handle that seems detached
LARGE = 0.25  # share from which a part may be another object
NEAR = 0.15  # how far away a smaller part may be, by the side of a square as large as the object
SMALL_HOLE = 0.003  # share of the silhouette below which a hole is a glint or noise
MOST_HOLLOW = 0.5  # share of the silhouette that may be open; what has less left is an outline
SHARP_RIM = 0.5  # share of an opening's rim that is sharp; the rest may be a shadow's
LEAST_MISFIT = 2.5 / 255  # of a fitted backdrop in an opening, by the median; 3 / 255 are a white object's
BESIDE_PX = 10  # how far from the object the backdrop is looked at that openings should show
EDGE_PX = 2  # how far the backdrop's colour reaches into the object and the other way round
LEAST_CONTRAST = 0.08  # of object and backdrop, from which a pixel's colour tells how much of it is covered
CROSS = np.ones((3, 3))


class Holes(NamedTuple):
    """open: where the backdrop is seen. hollow: so much of the object is open that all was closed."""

    open: Bool[np.ndarray, "H W"]
    hollow: bool


class Parts(NamedTuple):
    """The object, and what is doubtful about it (see `Found.doubts`)."""

    mask: Bool[np.ndarray, "H W"]
    doubts: tuple[str, ...]


def parts(mask: Bool[np.ndarray, "H W"]) -> Parts:
    """The object without specks and small things that lie apart from it. `mask` is not empty."""
    labels, count = ndimage.label(mask, CROSS)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    area[0] = 0
    largest = area.argmax()
    from_largest = ndimage.distance_transform_edt(labels != largest)
    distance = np.array(ndimage.minimum(from_largest, labels, np.arange(count + 1)))
    share = area / area[largest]
    near = distance < NEAR * np.sqrt(area[largest])
    kept = (share > 0) & ((share >= PART) | ((share >= SPECK) & near))
    num_large = int((share > LARGE).sum())
    doubts = (f"is {num_large} things of about the same size",) if num_large > 1 else ()
    return Parts(kept[labels], doubts)


def holes(
    mask: Bool[np.ndarray, "H W"],
    difference: Float[np.ndarray, "H W 3"],
    edges: Float[np.ndarray, "H W"],
    level: float,
) -> Holes:
    """The holes of a mask through which the backdrop is seen; the others are the object's own light parts.

    A hole is open if its median colour is the backdrop's, as that is seen beside the object, and most of its
    rim is sharp: a glint fades into the object, an opening does not.

    Args:
        difference: from the backdrop.
        edges: how sharp the picture is, from 0 to 1.
        level: differences up to this one are noise.
    """
    filled = ndimage.binary_fill_holes(mask)
    labels, count = ndimage.label(filled & ~mask)
    opened = np.zeros_like(mask)
    size, sharp = filled.sum(), ndimage.maximum_filter(edges, 2 * EDGE_PX + 1) > 0.5
    beside = ndimage.binary_dilation(filled, iterations=BESIDE_PX) & ~ndimage.binary_dilation(
        filled, iterations=EDGE_PX
    )
    usual = np.median(difference[beside], 0) if beside.any() else np.zeros(3)
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in place)
        hole = labels[around] == number
        inside = ndimage.binary_erosion(hole, iterations=EDGE_PX)
        if hole.sum() < SMALL_HOLE * size or not inside.any():
            continue
        rim = ndimage.binary_dilation(hole) & ~hole
        like_backdrop = np.abs(np.median(difference[around][inside], 0) - usual).max() <= max(
            level, LEAST_MISFIT
        )
        if like_backdrop and sharp[around][rim].mean() > SHARP_RIM:
            opened[around] |= hole
    hollow = bool(opened.sum() > MOST_HOLLOW * size)
    return Holes(opened & (not hollow), hollow)


def unsure(
    mask: Bool[np.ndarray, "H W"],
    differs: Bool[np.ndarray, "H W"],
    strength: Float[np.ndarray, "H W"],
    edge_px: int,
    is_sharp: bool,
) -> Bool[np.ndarray, "H W"]:
    """The pixels that are perhaps none or only partly the object's. One picture does not tell; others do.

    The colour of a thin or light part at the edge can be the mixture of another colour and the backdrop; a
    pixel beside it that was left out can be a light part or a shadow; and one inside that looks more like the
    backdrop than those around it can be in an opening.

    Args:
        differs: from the backdrop.
        strength: how much.
        edge_px: how far the backdrop's colour reaches into the object and the other way round.
        is_sharp: whether it reaches one pixel at most, as neither noise nor compression blurs the edges.
    """
    clear = strength > ndimage.maximum_filter(strength, 2 * edge_px + 1) / 2
    surely = ndimage.binary_erosion(mask & differs & clear, CROSS, 1 if is_sharp else edge_px, border_value=1)
    beside = ndimage.binary_dilation(mask, CROSS, iterations=edge_px) & differs
    return (mask | beside) & ~surely


def soft_edges(
    rgb: Float[np.ndarray, "H W 3"],
    smooth: Float[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"],
    edge_px: int = EDGE_PX,
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W 1"]]:
    """Colours and coverage: at the edges, both follow from the colours of object and backdrop to either side.

    Args:
        smooth: the picture without much noise.
        edge_px: how far the backdrop's colour reaches into the object and the other way round.
    """
    coverage = mask.astype(np.float32)[..., None]
    inside = ndimage.binary_erosion(mask, iterations=edge_px, border_value=1)
    outside = ~ndimage.binary_dilation(mask, iterations=edge_px)
    if not inside.any() or not outside.any():
        return rgb, coverage
    depth, (row, column) = ndimage.distance_transform_edt(~inside, return_indices=True)
    edge = ~inside & ~outside & (depth <= 2 * edge_px + 1)
    beside = ndimage.distance_transform_edt(~outside, return_distances=False, return_indices=True)[:, edge]
    behind = smooth[beside[0], beside[1]]
    contrast = smooth[row[edge], column[edge]] - behind
    squared = (contrast**2).sum(-1)
    share = ((rgb[edge] - behind) * contrast).sum(-1) / np.maximum(squared, 1e-6)
    share = np.where(squared > LEAST_CONTRAST**2, np.clip(share, 0, 1), coverage[edge, 0])[:, None]
    coverage[edge] = share
    rgb = rgb.copy()
    rgb[edge] = np.clip((rgb[edge] - (1 - share) * behind) / np.maximum(share, 0.05), 0, 1)
    return rgb, coverage
