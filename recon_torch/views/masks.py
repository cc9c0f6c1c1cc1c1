"""Foreground masks of views (Sec. 3.3), from a smooth backdrop or by IS-Net (Qin et al. 2022).

IS-Net finds something in every image. Each of its masks is therefore checked; where one cannot be right and
the image has a smooth backdrop, the mask is made from the backdrop.
"""

from __future__ import annotations

import enum
import functools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image

from recon_torch.errors import UserError, first_line
from recon_torch.views.foreground import backdrop
from recon_torch.views.foreground.found import Found
from recon_torch.views.foreground.front import before_backdrop
from recon_torch.views.foreground.silhouette import EDGE_PX
from recon_torch.views.images import to_uint8

if TYPE_CHECKING:
    import onnxruntime

TOLERANCE = 0.04  # how far a channel in [0, 1] may be from the background's colour
FAR = 0.1  # a pixel that differs more than this from the backdrop is object or shadow in any picture
VIDEO_EDGE_PX = 3  # how far the backdrop's colour reaches into an object in a video
MOST_THREADS = 8  # each needs about 100 bytes a pixel
PLAIN_BORDER = 0.95  # least share of the border that looks like a backdrop which is removed from edges
LEAST_SHARE, MOST_SHARE = 0.002, 0.95  # shares of the image that an object may take
MOST_BORDER = 0.5  # share of the border that may stand out from what was fitted to the border
BORDER_SHARE = 0.02  # largest share of the border that an object may touch
ISNET_SIZE_PX, ISNET_MEAN = (1024, 1024), np.float32(0.5)  # what IS-Net takes


class Segmented(NamedTuple):
    """Images of an object, and where it is in each.

    Attributes:
        images: over white; as they were where the object cannot be told from what is around it.
        masks: coverage in [0, 1]; NaN throughout where it cannot be told.
        unsure: the pixels whose coverage is a guess.
        doubts: on each mask; each goes on after "the object" in a sentence.
    """

    images: Float[np.ndarray, "K H W 3"]
    masks: Float[np.ndarray, "K H W 1"]
    unsure: Bool[np.ndarray, "K H W 1"]
    doubts: list[tuple[str, ...]]


Segment = Callable[[Float[np.ndarray, "K H W 3"]], Segmented]
"""Finds the object in RGB images in [0, 1]."""


class Problem(enum.StrEnum):
    """What speaks against a mask."""

    EMPTY = "shows nothing"
    FULL = "covers everything"
    CUT_OFF = "touches the border"


def threshold_masks(
    images: Float[np.ndarray, "K H W 3"],
    background: float | Float[np.ndarray, "3"] = 1.0,
    tolerance: float = TOLERANCE,
) -> Float[np.ndarray, "K H W 1"]:
    """1 where a channel differs by more than the tolerance from the background, 0 elsewhere.

    Parts of the object that have the background's colour count as background.

    background: a colour, or a grey level.
    """
    difference = np.abs(images - np.asarray(background, np.float32)).max(-1, keepdims=True)
    return (difference > tolerance).astype(np.float32)


def by_backdrop(images: Float[np.ndarray, "K H W 3"], edge_px: int = EDGE_PX) -> Segmented:
    """What stands out from each image's own backdrop, which is even or changes smoothly, less its shadow.

    It is untold where there is no such backdrop, or where most of the border stands out from it.

    edge_px: how deep the backdrop's colour reaches into the object.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        found = list(threads.map(lambda image: _before_backdrop(image, edge_px), images))
    cut = [
        _unknown(image) if each is None else _cut(image, each)
        for image, each in zip(images, found, strict=True)
    ]
    rgb, masks, unsure = np.split(np.stack(cut), [3, 4], -1)
    return Segmented(rgb, masks, unsure > 0, [() if each is None else each.doubts for each in found])


def by_white(images: Float[np.ndarray, "K H W 3"]) -> Segmented:
    """What is not white, see `threshold_masks`."""
    masks = threshold_masks(images)
    return Segmented(images * masks + 1 - masks, masks, np.zeros_like(masks, bool), [()] * len(images))


def by_isnet(images: Float[np.ndarray, "K H W 3"], weights_path: str | os.PathLike) -> Segmented:
    """What IS-Net finds, see `isnet_masks`. The colour of a smooth backdrop is removed from the edges."""
    masks, wrong = _checked_isnet(images, weights_path)
    rgb = np.stack([_over_white(image, mask) for image, mask in zip(images, masks, strict=True)])
    doubts: list[tuple[str, ...]] = [(f"has a mask by IS-Net that {each}",) if each else () for each in wrong]
    return Segmented(rgb, masks, np.zeros_like(masks, bool), doubts)


def covered_share(mask: Float[np.ndarray, "H W 1"]) -> float:
    """The share of the image that a mask covers."""
    return float((mask > 0.5).mean())


def problem(mask: Float[np.ndarray, "H W 1"]) -> Problem | None:
    """What speaks against a mask, if anything does."""
    covered = covered_share(mask)
    if covered < LEAST_SHARE:
        return Problem.EMPTY
    if covered > MOST_SHARE:
        return Problem.FULL
    return Problem.CUT_OFF if (border(mask) > 0.5).mean() > BORDER_SHARE else None


def isnet_masks(
    images: Float[np.ndarray, "K H W 3"], weights_path: str | os.PathLike
) -> Float[np.ndarray, "K H W 1"]:
    """Masks in [0, 1] by IS-Net, or from a smooth backdrop where IS-Net's mask cannot be right.

    Warns of each of IS-Net's masks that has a `problem`, and says which of the two masks was taken.

    Args:
        weights_path: an .onnx file such as rembg's isnet-general-use.onnx.

    Raises:
        UserError: onnxruntime is not installed, or the weights are missing or unusable.
    """
    found, wrong = _checked_isnet(images, weights_path)
    for index, each in enumerate(wrong):
        if each:
            warnings.warn(f"IS-Net's mask of picture {index} {each}", stacklevel=2)
    return found


def _checked_isnet(
    images: Float[np.ndarray, "K H W 3"], weights_path: str | os.PathLike
) -> tuple[Float[np.ndarray, "K H W 1"], list[str]]:
    """The masks of `isnet_masks`, and of each what was wrong with IS-Net's; "" for nothing."""
    session = _isnet_session(Path(weights_path))
    found = [_predict(session, image) for image in images]
    if not np.isfinite(found).all():
        raise UserError(f"IS-Net weights {weights_path} predict NaN or infinity; fetch them again")
    chosen, wrong = zip(*map(_checked, images, found), strict=True)
    return np.stack(chosen), list(wrong)


def check_isnet_file(path: Path) -> None:
    """Raises UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"IS-Net weights {path} do not exist; give rembg's isnet-general-use.onnx")


@functools.lru_cache(maxsize=1)  # pictures may come one by one, and loading takes longer than one of them
def _isnet_session(path: Path) -> onnxruntime.InferenceSession:
    check_isnet_file(path)
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            'masks by IS-Net need onnxruntime; install it with pip install "im3d[masks]"'
        ) from None
    try:
        return onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime has exception types of its own
        raise UserError(f"IS-Net weights {path} cannot be loaded: {first_line(error, 80)}") from None


def _predict(
    session: onnxruntime.InferenceSession, image: Float[np.ndarray, "H W 3"]
) -> Float[np.ndarray, "H W 1"]:
    """The mask, stretched to [0, 1] as IS-Net's authors do; all 0 or all 1 if the network is undecided."""
    picture = Image.fromarray(to_uint8(image))
    pixels = np.asarray(picture.resize(ISNET_SIZE_PX, Image.Resampling.LANCZOS), np.float32)
    pixels = pixels / max(pixels.max(), 1.0) - ISNET_MEAN
    (name,) = (given.name for given in session.get_inputs())
    predicted = np.squeeze(session.run(None, {name: pixels.transpose(2, 0, 1)[None]})[0])
    least, most = predicted.min(), predicted.max()
    # Stretching the prediction for an empty image would turn its noise into an object.
    if least > 0.5 or most < 0.5:
        return np.full((*image.shape[:2], 1), least > 0.5, np.float32)
    stretched = Image.fromarray((predicted - least) / (most - least))
    return np.asarray(stretched.resize(picture.size, Image.Resampling.BILINEAR), np.float32)[..., None]


def _checked(
    image: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W 1"]
) -> tuple[Float[np.ndarray, "H W 1"], str]:
    """The mask, or the one from the image's smooth backdrop if only that one has no problem; and why."""
    wrong = problem(mask)
    if wrong is None:
        return mask, ""
    found = _before_backdrop(image)
    better = found is not None and problem(found.coverage) is None
    choice = "the mask by its plain background is taken" if better else "there is none better; look at it"
    return found.coverage if found is not None and better else mask, f"{wrong}: {choice}"


def _before_backdrop(image: Float[np.ndarray, "H W 3"], edge_px: int = EDGE_PX) -> Found | None:
    found = before_backdrop(image, np.ones(image.shape[:2], bool), FAR, edge_px)
    return None if found is None or border(found.mask[..., None]).mean() > MOST_BORDER else found


def _cut(image: Float[np.ndarray, "H W 3"], found: Found) -> Float[np.ndarray, "H W 5"]:
    """Over white, with the coverage as the fourth channel and where that is a guess as the fifth.

    There the picture stays as it is, but for its backdrop, whose share is as large as the guess says.
    """
    rgb, coverage = found.rgb * found.coverage + 1 - found.coverage, found.coverage
    if found.unsure is None or found.behind is None:
        return np.concatenate([rgb, coverage, np.zeros_like(coverage)], -1)
    unsure = found.unsure[..., None]
    rgb = np.where(unsure, np.clip(image + (1 - coverage) * (1 - found.behind), 0, 1), rgb)
    return np.concatenate([rgb, coverage, unsure], -1).astype(np.float32)


def _unknown(image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 5"]:
    return np.concatenate([image, np.full_like(image[..., :1], np.nan), np.zeros_like(image[..., :1])], -1)


def _over_white(
    image: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W 1"]
) -> Float[np.ndarray, "H W 3"]:
    behind = backdrop.fit(image, np.ones(image.shape[:2], bool))
    if behind.share < PLAIN_BORDER:
        return image * mask + 1 - mask
    return np.where(mask > 0, np.clip(image + (1 - mask) * (1 - behind.color), 0, 1), 1).astype(np.float32)


def border(image: Shaped[np.ndarray, "H W C"]) -> Shaped[np.ndarray, "B C"]:
    """The outermost pixels of an image."""
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
