"""Foreground masks of views (Sec. 3.3), from a plain background or by IS-Net (Qin et al. 2022).

IS-Net finds something in every image. Each of its masks is therefore checked; where one cannot be right and
the image has a plain background, the mask is made from the background.
"""

from __future__ import annotations

import enum
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from recon_torch.errors import UserError, first_line
from recon_torch.views.images import to_uint8

if TYPE_CHECKING:
    import onnxruntime

TOLERANCE = 0.04  # how far a channel in [0, 1] may be from the background's colour
EDGE_PX, VIDEO_EDGE_PX = 2, 3  # how deep the background's colour reaches into an object; compression blurs
SPECK_PX = 8  # pixels of the largest speck that does not belong to the object
PLAIN_BORDER = 0.95  # least share of the border that has one colour where the background is plain
LEAST_SHARE, MOST_SHARE = 0.002, 0.95  # shares of the image that an object may take
BORDER_SHARE = 0.02  # largest share of the border that an object may touch
ISNET_SIZE_PX, ISNET_MEAN = (1024, 1024), np.float32(0.5)  # what IS-Net takes


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


def background_masks(
    images: Float[np.ndarray, "K H W 3"], edge_px: int = EDGE_PX
) -> Float[np.ndarray, "K H W 1"]:
    """Coverage in [0, 1], from each image's own plain background, or from white where it has none.

    edge_px: how deep the background's colour reaches into the object.
    """
    return np.stack([_background_mask(image, plain_background(image), edge_px) for image in images])


def over_white(
    images: Float[np.ndarray, "K H W 3"], masks: Float[np.ndarray, "K H W 1"]
) -> Float[np.ndarray, "K H W 3"]:
    """The foreground on white. The colour of a plain background is removed from the edges."""
    return np.stack([_over_white(image, mask) for image, mask in zip(images, masks, strict=True)])


def plain_background(
    image: Float[np.ndarray, "H W 3"], tolerance: float = TOLERANCE, share: float = PLAIN_BORDER
) -> Float[np.ndarray, "3"] | None:
    """The colour that at least this share of the image's border has; None if there is no such colour."""
    border = _border(image)
    color = np.median(border, 0)
    alike = np.abs(border - color).max(-1) <= tolerance
    return color if alike.mean() >= share else None


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
    return Problem.CUT_OFF if (_border(mask) > 0.5).mean() > BORDER_SHARE else None


def isnet_masks(
    images: Float[np.ndarray, "K H W 3"], weights_path: str | os.PathLike
) -> Float[np.ndarray, "K H W 1"]:
    """Masks in [0, 1] by IS-Net, or from a plain background where IS-Net's mask cannot be right.

    Warns of each of IS-Net's masks that has a `problem`, and says which of the two masks was taken.

    Args:
        weights_path: an .onnx file such as rembg's isnet-general-use.onnx.

    Raises:
        UserError: onnxruntime is not installed, or the weights are missing or unusable.
    """
    session = _isnet_session(Path(weights_path))
    found = [_predict(session, image) for image in images]
    if not np.isfinite(found).all():
        raise UserError(f"IS-Net weights {weights_path} predict NaN or infinity; fetch them again")
    return np.stack(
        [_checked(image, mask, k) for k, (image, mask) in enumerate(zip(images, found, strict=True))]
    )


def _isnet_session(path: Path) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise UserError(f"IS-Net weights {path} do not exist; give rembg's isnet-general-use.onnx")
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
    image: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W 1"], index: int
) -> Float[np.ndarray, "H W 1"]:
    """The mask, or the one from the image's plain background if only that one has no problem."""
    wrong = problem(mask)
    if wrong is None:
        return mask
    color = plain_background(image)
    by_background = _background_mask(image, color)
    better = color is not None and problem(by_background) is None
    choice = "the mask by its plain background is taken" if better else "there is none better; look at it"
    warnings.warn(f"IS-Net's mask of picture {index} {wrong}: {choice}", stacklevel=3)
    return by_background if better else mask


def _background_mask(
    image: Float[np.ndarray, "H W 3"], color: Float[np.ndarray, "3"] | None, edge_px: int = EDGE_PX
) -> Float[np.ndarray, "H W 1"]:
    if color is None:
        return threshold_masks(image[None])[0]
    mask = _without_specks(threshold_masks(image[None], color)[0])
    inside = ndimage.binary_erosion(mask[..., 0], iterations=edge_px)
    if not inside.any():
        return mask
    # The colour of an edge's pixel lies between that of the background and that of the object next to it.
    distance, (rows, columns) = ndimage.distance_transform_edt(~inside, return_indices=True)
    contrast = image[rows, columns] - color
    squared = (contrast**2).sum(-1)
    share = ((image - color) * contrast).sum(-1) / np.maximum(squared, 1e-6)
    depth = ndimage.distance_transform_edt(mask[..., 0])
    edge = (depth < edge_px) & (distance <= 2 * edge_px) & (squared > (2 * TOLERANCE) ** 2)
    return np.where(edge[..., None], np.clip(share, 0, 1)[..., None], 1).astype(np.float32) * mask


def _without_specks(mask: Float[np.ndarray, "H W 1"]) -> Float[np.ndarray, "H W 1"]:
    """The mask without the specks that the noise of a video leaves, which a fit would turn into floaters."""
    parts, _ = ndimage.label(mask[..., 0], np.ones((3, 3)))
    large = np.bincount(parts.ravel()) > SPECK_PX
    return mask * large[parts][..., None]


def _over_white(
    image: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W 1"]
) -> Float[np.ndarray, "H W 3"]:
    color = plain_background(image)
    if color is None:
        return image * mask + 1 - mask
    return np.where(mask > 0, np.clip(image + (1 - mask) * (1 - color), 0, 1), 1).astype(np.float32)


def _border(image: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "B C"]:
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
