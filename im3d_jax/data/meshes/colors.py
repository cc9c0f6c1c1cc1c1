"""The transfer curve of sRGB (IEC 61966-2-1): colours of pictures and screens against linear ones."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def linear_from_srgb(srgb: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Linear values of sRGB ones in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, np.maximum((srgb + 0.055) / 1.055, 0.0) ** 2.4)


def srgb_from_linear(linear: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """sRGB values in [0, 1] of linear ones, which are clipped."""
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


LINEAR_OF_BYTE: Float[np.ndarray, "256"] = linear_from_srgb(np.arange(256) / 255).astype(np.float32)
"""The linear value of each value of an 8-bit picture."""
