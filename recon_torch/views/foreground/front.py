"""Finding the object before a smooth backdrop, and saying what is doubtful about it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from recon_torch.views.foreground import backdrop, shadows, silhouette
from recon_torch.views.foreground.found import Found, with_border

LEAST_SHARE = 0.5  # of the picture's border that has to be backdrop; an object may touch the rest
CLEAR_SHARE = (
    0.8  # the same, less what the object touches: below it the backdrop is not as smooth as it seems
)
LEAST_LEVEL, LEAST_SURE = 2 / 255, 6 / 255  # differences of an even picture that count, and that count alone
MOST_NOISE = 0.12  # standard deviation of a pixel; what varies more is a pattern
MARGIN = 1.6  # by how much a difference has to exceed that of nine tenths of the border
SMOOTHED_NOISE = 0.005  # a picture is smoothed until its noise is about this
HALOS = ((17, 0.08), (33, 0.2))
"""JPEG spreads such a share of an edge's contrast over a window of two blocks: in light, and in colour, which
it stores at half the resolution."""
BLOCK_PX = 8  # of JPEG
WAVERS = 0.5 / 255  # least median of the light's Laplacian beside edges; JPEG of quality 95 has twice as much
STRONG = 10  # differences of so many levels spread beyond themselves
MOST_SHADOW = 0.8  # share of what differs that may be shadow; with more, the object itself was taken for one
FAINT_SHARE = 0.15  # share of the outline that may have hardly any contrast
EVEN_LIGHT = 0.06  # how little the light varies in a shadow with sharp edges
CAST_SHARE = 0.05  # share of the object that may be such a shadow without a word
LOW, SPREAD = 0.25, 0.05  # shares of the height and the width of the object, for the place of such a shadow
FULL_ROW = 0.9  # share of a frame's row that has the frame's colour; in the picture the rest has
MOST_FRAME = 0.05  # how much of a side a frame takes
CARD_FILLS, CARD_SHARE = 0.97, 0.6  # shares of its box and of the picture that a card behind an object fills


def before_backdrop(
    rgb: Float[np.ndarray, "H W 3"],
    valid: Bool[np.ndarray, "H W"],
    tolerance: float,
    edge_px: int = silhouette.EDGE_PX,
) -> Found | None:
    """The object before a smooth backdrop, which may have a frame or a card's margin around it.

    Args:
        valid: the pixels that belong to the picture.
        edge_px: how far the backdrop's colour reaches into the object; compression blurs.

    Returns None if there is no such backdrop.
    """
    frame = _frame(rgb) if valid.all() else ~valid
    found = _in_front(rgb, valid & ~frame, tolerance, edge_px)
    if frame.any() and found is not None and valid.all():
        found = found._replace(hints=(*found.hints, "has a frame around it, which was left out"))
    if found is None or not _is_card(found.mask, valid):
        return found
    within = _in_front(rgb, ndimage.binary_erosion(found.mask, iterations=3), tolerance, edge_px)
    if within is None or not within.mask.any():
        return found
    return within._replace(doubts=(*within.doubts, "lies on a rectangle, which was left out"))


def _in_front(
    rgb: Float[np.ndarray, "H W 3"],
    valid: Bool[np.ndarray, "H W"],
    tolerance: float,
    edge_px: int = silhouette.EDGE_PX,
) -> Found | None:
    behind = backdrop.fit(rgb, valid)
    if behind.share < LEAST_SHARE or behind.noise > MOST_NOISE:
        return None
    blur_px = _blur_px(behind.noise)
    smooth = ndimage.gaussian_filter(rgb, (blur_px, blur_px, 0)) if blur_px else rgb
    difference = (smooth - behind.color) * valid[..., None]
    usual = _usual(np.abs(difference).max(-1), valid, tolerance)
    level = float(np.clip(MARGIN * usual, LEAST_LEVEL, max(tolerance, LEAST_LEVEL)))
    strengths = _strengths(difference)
    noise = _noise(strengths, level, usual, blur_px)
    differs = _differing(strengths, noise, min(tolerance, max(3 * level, LEAST_SURE)))
    if not differs.any():
        return Found(rgb, np.zeros((*valid.shape, 1), np.float32), differs)
    seen = shadows.look(smooth, behind.color, noise, blur_px)
    holes = silhouette.holes(differs, difference, seen.edges, level)
    whole = ndimage.binary_fill_holes(differs) & ~holes.open
    solid = whole & ~shadows.find(whole, seen)
    lost = solid.sum() < (1 - MOST_SHADOW) * whole.sum()
    parts = silhouette.parts(whole if lost else solid)
    doubts = [
        *(["may be hollow: most of its inside has the colour of the backdrop"] if holes.hollow else []),
        *(["cannot be told from its shadow"] if lost else []),
        *_uneven(behind.share, parts.mask),
        *_faint(parts.mask, np.maximum(*strengths), seen, level),
        *_cast(parts.mask, seen),
        *parts.doubts,
    ]
    own, coverage = silhouette.soft_edges(rgb, smooth, parts.mask, edge_px)
    is_sharp = not blur_px and all(each.max() == level for each in noise)
    unsure = silhouette.unsure(parts.mask, differs, np.maximum(*strengths), edge_px, is_sharp)
    return with_border(Found(own, coverage, parts.mask, tuple(doubts), (), unsure, behind.color))


# ---- What differs from the backdrop ----


def _frame(rgb: Float[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """A thin frame of one colour around the whole picture, if there is one."""
    frame = np.zeros(rgb.shape[:2], bool)
    color = np.median(rgb[0], 0)
    alike = np.abs(rgb - color).max(-1) < backdrop.REACH
    for turns in range(4):
        shares = np.rot90(alike, turns)[: max(3, round(MOST_FRAME * min(alike.shape)))].mean(1)
        if shares[0] < FULL_ROW or shares.min() > 1 - FULL_ROW:
            return np.zeros_like(frame)
        # The row where the picture begins is mixed.
        np.rot90(frame, turns)[: (shares < FULL_ROW).argmax() + 2] = True
    return frame


def _blur_px(noise: float) -> float:
    """Standard deviation of a Gaussian s that leaves little of the noise: 1 / (2 sqrt(pi) s) of it."""
    needed = noise / SMOOTHED_NOISE / (2 * np.sqrt(np.pi))
    return float(np.clip(needed, 0.7, 2.5)) if noise > SMOOTHED_NOISE else 0.0


def _usual(strength: Float[np.ndarray, "H W"], valid: Bool[np.ndarray, "H W"], tolerance: float) -> float:
    """The difference of nine tenths of the border: noise, blocks and what the fit has missed."""
    ring = backdrop.border(valid, max(3, round(backdrop.RING_SHARE * min(valid.shape))))
    behind = strength[ring & (strength < tolerance)]
    return float(np.percentile(behind, 90)) if behind.size else 0.0


def _strengths(
    difference: Float[np.ndarray, "H W 3"],
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """How much the light of a pixel differs, and its colour."""
    light = difference.mean(-1, keepdims=True)
    return np.abs(light[..., 0]), np.abs(difference - light).max(-1)


def _noise(
    strengths: tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]],
    level: float,
    usual: float,
    blur_px: float,
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """The differences in light and in colour that say nothing, at each pixel."""
    light, color = strengths
    if not blur_px and _is_even_beside_edges(light, level):
        return np.full_like(light, level), np.full_like(color, level)
    least = 0.0 if blur_px else max(usual, backdrop.EIGHT_BITS / 2)  # a blur spreads what is beside, too
    return _with_halos(light, level, least, *HALOS[0]), _with_halos(color, level, least, *HALOS[1])


def _is_even_beside_edges(light: Float[np.ndarray, "H W"], level: float) -> bool:
    """Whether nothing wavers beside edges, as in a picture that was stored without losses."""
    beside = _beside(light > STRONG * level)
    return bool(beside.any() and np.median(np.abs(ndimage.laplace(light))[beside]) < WAVERS)


def _with_halos(
    strength: Float[np.ndarray, "H W"], level: float, least: float, window_px: int, share: float
) -> Float[np.ndarray, "H W"]:
    """The level of noise at each pixel, which is higher where JPEG has spread what is beside.

    least: differences beside edges up to this one are not JPEG's.
    """
    beside = _beside(strength > STRONG * level)
    if not beside.any() or np.quantile(strength[beside], 0.7) <= least:
        return np.full_like(strength, level)  # a picture that was stored without losses
    return np.maximum(level, share * ndimage.maximum_filter(strength, window_px))


def _beside(strong: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Where JPEG spreads what differs strongly: the rest of the blocks that have some of it."""
    return _in_blocks_of(strong) & ~ndimage.binary_dilation(strong, iterations=silhouette.EDGE_PX)


def _in_blocks_of(strong: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The pixels of JPEG's blocks that have such pixels. Blocks without any hold no trace of them."""
    height, width = strong.shape
    filled = np.pad(strong, ((0, -height % BLOCK_PX), (0, -width % BLOCK_PX)))
    rows, columns = (side // BLOCK_PX for side in filled.shape)
    blocks = filled.reshape(rows, BLOCK_PX, columns, BLOCK_PX).any((1, 3))
    return blocks.repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1)[:height, :width]


def _differing(
    strengths: tuple[Float[np.ndarray, "H W"], ...], noise: tuple[Float[np.ndarray, "H W"], ...], sure: float
) -> Bool[np.ndarray, "H W"]:
    """What differs more than by noise, and is joined to something that surely differs."""
    weak = (strengths[0] > noise[0]) | (strengths[1] > noise[1])
    return ndimage.binary_propagation(weak & (np.maximum(*strengths) > sure), mask=weak)


# ---- Doubts ----


def _is_card(mask: Bool[np.ndarray, "H W"], valid: Bool[np.ndarray, "H W"]) -> bool:
    """Whether this is a rectangle as large as the picture that an object may lie on."""
    if mask.sum() < CARD_SHARE * valid.sum():
        return False
    place = ndimage.find_objects(mask.astype(int))[0]
    return bool(mask[place].mean() > CARD_FILLS)


def _uneven(share: float, mask: Bool[np.ndarray, "H W"]) -> list[str]:
    touched = mask[backdrop.border(np.ones_like(mask), 1)].mean()
    if share + touched >= CLEAR_SHARE:
        return []
    return ["lies before a backdrop that is not even; cut it out as RGBA"]


def _faint(
    mask: Bool[np.ndarray, "H W"], strength: Float[np.ndarray, "H W"], seen: shadows.Look, level: float
) -> list[str]:
    """Whether much of the outline is no edge, though the object might be shadow there."""
    outline = backdrop.border(mask, 1)
    outline[[0, -1]] = outline[:, [0, -1]] = False
    near = 2 * silhouette.EDGE_PX + 1
    sharp = ndimage.maximum_filter(seen.edges, near) > 0.5
    own = ndimage.maximum_filter(strength * ~seen.like_shadow, near) > 3 * level
    share = 1 - (sharp | own)[outline].mean() if outline.any() else 0.0
    if share <= FAINT_SHARE:
        return []
    return [f"has an outline of which {share:.0%} is hard to tell from the backdrop or a shadow"]


def _cast(mask: Bool[np.ndarray, "H W"], seen: shadows.Look) -> list[str]:
    """Whether evenly dark parts that were taken along may be a shadow with sharp edges.

    Such a shadow lies low and spreads beside the rest.
    """
    shade = np.where(mask & seen.like_shadow, seen.light, 0)
    counts, edges = np.histogram(shade, np.arange(shadows.DARK, 0.95, EVEN_LIGHT / 2))
    even = np.abs(shade - edges[counts.argmax()] - EVEN_LIGHT / 4) < EVEN_LIGHT / 2
    labels, _ = ndimage.label(ndimage.binary_opening(even, iterations=silhouette.EDGE_PX))
    (whole,) = ndimage.find_objects(mask.astype(int))
    height, width = mask[whole].shape
    low = [
        number
        for number, (rows, _) in enumerate(ndimage.find_objects(labels), 1)
        if rows.start > whole[0].start + LOW * height and rows.stop > whole[0].stop - LOW * height
    ]
    cast = np.isin(labels, low)
    share = cast.sum() / mask.sum()
    if not CAST_SHARE < share < MOST_SHADOW:
        return []
    rest = mask & ~ndimage.binary_dilation(cast, iterations=2 * silhouette.EDGE_PX)
    ends = [
        np.flatnonzero(ndimage.binary_opening(each, iterations=silhouette.EDGE_PX).any(0))
        for each in (cast, rest)
    ]
    if not ends[1].size or max(ends[1][0] - ends[0][0], ends[0][-1] - ends[1][-1]) <= SPREAD * width:
        return []
    return [f"may be partly shadow: {share:.0%} of it looks like the backdrop in even shade"]
