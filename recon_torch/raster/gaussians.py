"""The parameters of the asset (Sec. 3.3), and the Gaussians that they stand for.

Colour does not depend on the view (spherical harmonics of degree 0): the paper's short fits need no more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

SH_C0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic


class Activated(NamedTuple):
    """N Gaussians as they are rendered."""

    means: Float[Tensor, "N 3"]  # world coordinates
    quats: Float[Tensor, "N 4"]  # wxyz, of any length but 0
    scales: Float[Tensor, "N 3"]  # standard deviations along the axes, in world units
    opacities: Float[Tensor, " N"]  # in [0, 1]
    colors: Float[Tensor, "N 3"]  # RGB, usually in [0, 1]


class Gaussians(NamedTuple):
    """N Gaussians as they are optimised: unconstrained numbers. The properties are what is rendered."""

    means: Float[Tensor, "N 3"]
    quats: Float[Tensor, "N 4"]  # wxyz, not normalised
    log_scales: Float[Tensor, "N 3"]
    opacity_logits: Float[Tensor, " N"]
    sh0: Float[Tensor, "N 3"]

    @property
    def scales(self) -> Float[Tensor, "N 3"]:
        """Standard deviations along the axes, in world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Float[Tensor, " N"]:
        """In (0, 1)."""
        return self.opacity_logits.sigmoid()

    @property
    def colors(self) -> Float[Tensor, "N 3"]:
        """RGB, at least 0; not bounded above, as in 3DGS."""
        return (0.5 + SH_C0 * self.sh0).clamp_min(0)

    def activated(self) -> Activated:
        """These Gaussians as they are rendered, differentiable by the parameters."""
        return Activated(self.means, self.quats, self.scales, self.opacities, self.colors)


def turned(gaussians: Gaussians, rotation: Float[np.ndarray, "3 3"]) -> Gaussians:
    """Gaussians after a rotation about the origin. One that takes axes to axes rounds no mean."""
    x, y, z, w = Rotation.from_matrix(rotation).as_quat(canonical=True)
    # The quaternion product with the rotation's own on the left, as a matrix.
    product = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    means, quats = _times(gaussians.means, rotation), _times(gaussians.quats, product)
    return gaussians._replace(means=means, quats=quats)


def _times(rows: Float[Tensor, "N n"], by: Float[np.ndarray, "n n"]) -> Float[Tensor, "N n"]:
    """`by` times each row, computed in float64."""
    return (rows.double() @ torch.from_numpy(by).to(rows.device).T).to(rows.dtype)
