"""Gaussians from formats that store scales and opacities as they are, not as logarithms and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float32

from recon_torch.formats.ply import PLY_NAMES, drawable
from recon_torch.raster.gaussians import Gaussians


def from_activated(
    path: Path,
    means: Float32[np.ndarray, "N 3"],
    quats: Float32[np.ndarray, "N 4"],
    scales: Float32[np.ndarray, "N 3"],
    opacities: Float32[np.ndarray, " N"],
    sh0: Float32[np.ndarray, "N 3"],
) -> tuple[Gaussians, list[str]]:
    """(those that can be drawn, what is left out). Raises UserError as `ply.drawable` does.

    quats: wxyz. opacities: clipped to [0, 1].
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 and 1 become infinite, which `drawable` knows
        opacities = opacities.clip(0, 1)
        logits = np.log(opacities) - np.log1p(-opacities)
        log_scales = np.log(scales)
    rows = np.zeros(len(means), [(name, "<f4") for name in PLY_NAMES])
    columns = np.concatenate([means, 0 * means, sh0, logits[:, None], log_scales, quats], 1)
    for name, column in zip(PLY_NAMES, columns.T, strict=True):
        rows[name] = column
    return drawable(path, rows, [])
