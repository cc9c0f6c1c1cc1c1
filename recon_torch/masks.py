"""Foreground masks of views (Sec. 3.3): from a known background, or by IS-Net (Qin et al. 2022)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.export import to_uint8

FLAT_CONTRAST = (
    0.02  # rembg stretches its prediction to [0, 1], so an empty view would come back as a full one
)


def threshold_masks(
    images: Float[np.ndarray, "K H W 3"], background: float = 1.0, tolerance: float = 0.04
) -> Float[np.ndarray, "K H W 1"]:
    """1 where any channel differs by more than the tolerance from the grey level of the background, else 0.

    What is as white as the background counts as background, inside the object too.
    """
    difference = np.abs(images - np.float32(background)).max(-1, keepdims=True)
    return (difference > tolerance).astype(np.float32)


def isnet_masks(
    images: Float[np.ndarray, "K H W 3"], weights_path: str | os.PathLike
) -> Float[np.ndarray, "K H W 1"]:
    """Masks in [0, 1] by IS-Net, through rembg.

    Args:
        weights_path: an .onnx file such as rembg's isnet-general-use.onnx.

    Raises:
        UserError: rembg is not installed, or the weights are missing or unusable.
    """
    path = Path(weights_path)
    if not path.is_file():
        raise UserError(f"IS-Net weights {path} do not exist; give rembg's isnet-general-use.onnx")
    try:
        import rembg
    except ImportError:
        raise UserError('masks by IS-Net need rembg; install it with pip install "im3d[masks]"') from None
    try:
        session = rembg.new_session("dis_custom", model_path=str(path))
    except Exception as error:  # onnxruntime's own types
        reason = (str(error).splitlines() or [""])[0][:80]
        raise UserError(f"IS-Net weights {path} cannot be loaded: {reason}") from None
    masks = np.zeros((*images.shape[:3], 1), np.float32)
    for image, mask in zip(images, masks, strict=True):
        if np.ptp(image) > FLAT_CONTRAST:
            predicted = rembg.remove(to_uint8(image), session=session, only_mask=True)
            mask[..., 0] = np.asarray(predicted, np.float32) / 255.0
    return masks
