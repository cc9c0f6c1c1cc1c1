"""Pictures at another size. It is apart from `images`, which whoever has no torch can import."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def resize(picture: Float[np.ndarray, "H W C"], width: int, height: int) -> Float[np.ndarray, "h w C"]:
    """An image at another size, bilinear and filtered against aliasing."""
    if picture.shape[:2] == (height, width):
        return picture
    import torch  # slow to import, and pictures that have the right size do without it

    channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels_first, (height, width), mode="bilinear", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()
