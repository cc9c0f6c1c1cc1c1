"""Silhouettes that are known in closed form."""

from collections.abc import Callable

import numpy as np
import pytest

from recon_torch.views.cameras import Cameras


@pytest.fixture(scope="session")
def ball_masks() -> Callable[[Cameras, np.ndarray, float], np.ndarray]:
    """A function of cameras, centre and radius: masks [K,H,W,1] of a ball, by each pixel's distance to it."""

    def paint(cameras: Cameras, center: np.ndarray, radius: float) -> np.ndarray:
        ticks_x, ticks_y = np.arange(cameras.width) + 0.5, np.arange(cameras.height) + 0.5
        columns, rows = np.meshgrid(ticks_x, ticks_y)
        masks = []
        for w2c, intrinsics in zip(
            cameras.w2c.astype(float), cameras.intrinsics_px.astype(float), strict=True
        ):
            rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(intrinsics).T
            rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
            local = w2c[:3, :3] @ center + w2c[:3, 3]
            masks.append(np.linalg.norm(np.cross(rays, local), axis=-1) < radius)
        return np.stack(masks)[..., None].astype(np.float32)

    return paint
