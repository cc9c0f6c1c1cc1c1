"""What the tests of scenes share."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def balls(ball_masks):
    """Maps cameras that look from above to views and masks of a red ball below and behind a blue one."""

    def paint(cameras):
        lower, upper = (ball_masks(cameras, np.array([0, 0, z]), r) for z, r in ((-0.15, 0.25), (0.22, 0.14)))
        masks = np.maximum(lower, upper)
        rgb = np.where(upper > 0, [0.2, 0.3, 0.8], np.where(masks > 0, [0.8, 0.2, 0.2], 1.0))
        return torch.from_numpy(rgb).float(), torch.from_numpy(masks)

    return paint
