"""Which of what differs from the backdrop is shadow: a minimum cut (Greig, Porteous and Seheult 1989).

A shadow is the backdrop, darker. So may be a grey object before white, but a shadow fades towards the
backdrop and ends sharply at the object, while an object is sharp where the backdrop begins. The cut between
backdrop and object therefore follows sharp edges; where these have gaps it goes straight across.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

GRID_PX = 256  # the longer side of the grid that is cut; the costs below are meant for it
WINDOW_PX = 11  # an edge is sharp if most of the change across this window happens within two pixels
SOFT, SHARP = 0.25, 0.45  # the share of that: 0.2 for an even ramp, 0.8 for a step
LEAST_STEP = 6 / 255  # a smaller change is no edge
COST_OF_SHARP = 0.02  # of cutting between two pixels at a sharp edge; elsewhere it is 1
COST_OF_SHADOW = 0.04  # of calling a pixel shadow: an object's area outweighs the gaps in its outline
COST_OF_BLACK = 0.12  # the same where it is almost black, as shadows seldom are
DARK = 0.35  # the share of the backdrop's light from which on a shadow becomes unlikely
DARKEST, BRIGHTEST = 0.12, 1.25  # shares of the backdrop's light that a shadow or a glow leaves
TINT = 0.035  # how far a shadow's colour may be from the darker backdrop's: light from the object tints it
BLACK = 0.1  # a backdrop below this brightness shows no shadows
GREY, COLORED = 0.15, 0.35  # saturation of a backdrop from which on its hue alone tells a shadow
LARGE, MOST_SHARP = 0.02, 0.4  # shares, of what differs and of its outline, from which a shadow is none
CERTAIN = 1e3


class Look(NamedTuple):
    """How a picture looks beside its backdrop.

    Attributes:
        light: the share of the backdrop's light that a pixel has.
        like_shadow: whether its colour is that of the backdrop in a shadow.
        edges: how sharp the picture is, from 0 to 1, by its light, and by its colour.
    """

    light: Float[np.ndarray, "H W"]
    like_shadow: Bool[np.ndarray, "H W"]
    edges: Float[np.ndarray, "H W"]


def look(
    rgb: Float[np.ndarray, "H W 3"],
    backdrop: Float[np.ndarray, "H W 3"],
    noise: tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]],
    blur_px: float,
) -> Look:
    """Compares a picture with its backdrop.

    Args:
        rgb: the picture, without much noise.
        noise: differences in light and in colour that say nothing, at each pixel.
        blur_px: standard deviation of the Gaussian that has removed the noise.
    """
    squared = np.maximum((backdrop**2).sum(-1), 1e-4)
    brightness = np.sqrt(squared / 3)
    light = (rgb * backdrop).sum(-1) / squared
    tint = np.abs(rgb - light[..., None] * backdrop).max(-1)
    like = (tint < TINT + noise[0].min()) & (light > DARKEST) & (light < BRIGHTEST) & (brightness > BLACK)
    saturation = 1 - backdrop.min(-1) / np.maximum(backdrop.max(-1), 1e-3)
    # What is almost black has no hue.
    by_hue = np.clip((saturation - GREY) / (COLORED - GREY), 0, 1) * np.clip(light / DARK - 0.5, 0, 1)
    by_light = sharpness(light * brightness, noise[0], blur_px) * (1 - by_hue)
    return Look(light, like, np.maximum(by_light, sharpness(tint, noise[1], blur_px)))


def sharpness(
    values: Float[np.ndarray, "H W"], noise: Float[np.ndarray, "H W"], blur_px: float = 0.0
) -> Float[np.ndarray, "H W"]:
    """0 where values change gradually or by no more than noise, 1 at the edges of things."""
    smooth = ndimage.gaussian_filter(values, 1.0)
    width = np.hypot(1, blur_px)  # of a step by now, so all lengths are in this unit
    step = width * np.hypot(ndimage.sobel(smooth, 0), ndimage.sobel(smooth, 1)) / 4
    window = round(WINDOW_PX * width) | 1
    across = ndimage.maximum_filter(smooth, window) - ndimage.minimum_filter(smooth, window)
    sharp = (step / np.maximum(across, 1e-6) - SOFT) / (SHARP - SOFT)
    certain = 2 * across / np.maximum(LEAST_STEP, 3 * noise) - 1
    return np.clip(sharp, 0, 1) * np.clip(certain, 0, 1)


def find(differs: Bool[np.ndarray, "H W"], seen: Look) -> Bool[np.ndarray, "H W"]:
    """The pixels that are shadow, of those that differ from the backdrop."""
    factor = -(-max(differs.shape) // GRID_PX)
    outside = ~_blocks(differs, factor, np.max)
    certain = _blocks((differs & ~seen.like_shadow).astype(np.float32), factor, np.mean) > 0.5
    dark = np.clip(1 - _blocks(seen.light, factor, np.mean) / DARK, 0, 1)
    ends = np.where(certain, CERTAIN, COST_OF_SHADOW + (COST_OF_BLACK - COST_OF_SHADOW) * dark)
    pass_costs = 1 - (1 - COST_OF_SHARP) * _blocks(seen.edges, factor, np.max)
    cut = _reached(np.where(outside, CERTAIN, 0), np.where(outside, 0, ends), pass_costs)
    shadow = cut.repeat(factor, 0).repeat(factor, 1)[: len(differs), : differs.shape[1]] & differs
    return _fading(shadow, differs, seen.edges)


def _fading(
    shadow: Bool[np.ndarray, "H W"], differs: Bool[np.ndarray, "H W"], edges: Float[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"]:
    """The shadows without large parts that are sharp where the backdrop begins: those are the object's."""
    labels, count = ndimage.label(shadow)
    to_backdrop = np.where(shadow & ndimage.binary_dilation(~differs, iterations=2), labels, 0)
    sharp = ndimage.mean(ndimage.maximum_filter(edges, 5) > 0.5, to_backdrop, np.arange(count + 1))
    large = np.bincount(labels.ravel(), minlength=count + 1) > LARGE * differs.sum()
    return shadow & ~(large & (np.nan_to_num(sharp) > MOST_SHARP))[labels]


def _blocks(values: np.ndarray, factor: int, reduce) -> np.ndarray:
    """The values of blocks of factor x factor pixels; those at the end are filled up with their last ones."""
    padded = np.pad(values, [(0, -side % factor) for side in values.shape], mode="edge")
    height, width = padded.shape
    return reduce(padded.reshape(height // factor, factor, width // factor, factor), axis=(1, 3))


def _reached(
    from_source: Float[np.ndarray, "h w"], to_sink: Float[np.ndarray, "h w"], costs: Float[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """The nodes of a grid on the source's side of the minimum cut.

    costs: of each node; an edge costs the less of its two nodes' costs.
    """
    nodes = np.arange(costs.size).reshape(costs.shape)
    source, sink = costs.size, costs.size + 1
    tails, heads = [np.full(costs.size, source), nodes.ravel()], [nodes.ravel(), np.full(costs.size, sink)]
    capacities = [from_source.ravel(), to_sink.ravel()]
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        cost = np.minimum(costs[first], costs[second]).ravel()
        one, other = nodes[first].ravel(), nodes[second].ravel()
        tails += [one, other]
        heads += [other, one]
        capacities += [cost, cost]
    whole = np.rint(1000 * np.concatenate(capacities)).astype(np.int32)
    ends = np.concatenate(tails), np.concatenate(heads)
    graph = coo_array((whole, ends), shape=(costs.size + 2, costs.size + 2)).tocsr()
    graph.eliminate_zeros()
    left = graph - maximum_flow(graph, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = np.zeros(costs.size + 2, bool)
    reached[breadth_first_order(left, source, return_predecessors=False)] = True
    return reached[: costs.size].reshape(costs.shape)
