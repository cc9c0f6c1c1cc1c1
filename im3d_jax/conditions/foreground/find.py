"""Finding the object in a user's picture, by alpha or before a smooth backdrop."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from im3d_jax.conditions.foreground import cutout
from recon_torch.views.foreground.found import Found, with_border
from recon_torch.views.foreground.front import before_backdrop


def find(picture: Float[np.ndarray, "H W C"], tolerance: float) -> Found | None:
    """The object in a picture; None if it has neither alpha that separates one, nor a smooth backdrop.

    Args:
        picture: RGB or RGBA in [0, 1].
        tolerance: a pixel that differs more than this from the backdrop is object or shadow in any picture.

    The mask of what is found is empty if there is nothing before the backdrop.
    """
    rgb, alpha = np.ascontiguousarray(picture[..., :3], np.float32), picture[..., 3:]
    if not alpha.size or alpha.min() == 1:
        return before_backdrop(rgb, np.ones(rgb.shape[:2], bool), tolerance)
    found = cutout.find(rgb, alpha)
    if found is not None:
        return with_border(found)
    opaque = alpha[..., 0] >= np.median(alpha) / 2
    inner = before_backdrop(rgb, ndimage.binary_erosion(opaque, border_value=1), tolerance)
    hint = "was sought in the picture, because its alpha separates nothing"
    if inner is not None and inner.mask.any():
        return inner._replace(hints=(*inner.hints, hint))
    if opaque.all():
        return inner
    return Found(rgb, alpha.astype(np.float32), opaque, ("fills the picture",))
