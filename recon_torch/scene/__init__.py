"""What a fit optimises: Gaussians (`splats.Splats`) or a radiance field (`nerf.RadianceField`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float
from torch import Tensor

from recon_torch.raster.rasterize import Render
from recon_torch.scene.parameters import Parameters
from recon_torch.views.cameras import Cameras

if TYPE_CHECKING:
    from recon_torch.views.world import World


class Scene(Protocol):
    """An object that can be rendered, and whose parameters follow the gradient of its renders.

    A step calls `render_together`, `watch`, then, after the backward pass, `parameters.step` and `refine`.

    Attributes:
        num_gaussians: 0 for what has none.
    """

    parameters: Parameters
    num_gaussians: int

    def start_on(self, masks: Float[Tensor, "K H W 1"]) -> list[str]:
        """Puts what has not been optimised yet where these views have the object. Returns notes."""

    def rates(self, progress: float) -> dict[str, float]:
        """The learning rate of each parameter when a share `progress` of the steps is done."""

    @staticmethod
    def render_together(
        scenes: Sequence[Scene], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """A render of each scene from its own cameras, all of one number and size.

        seeds: of what is drawn at random in rendering for a step; None is rendering for good.
        """

    def watch(self, step: int, info: dict[str, Any]) -> None:
        """Has the backward pass of a render with this `info` record what `refine` needs."""

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        """Adds and drops parts of the scene after a step (0 is the first), where its number says so.

        Raises:
            NoGaussiansLeft: nothing is left.
        """

    def save(self, path: str | os.PathLike, world: World | None = None) -> Path:
        """Writes the object to `path`, with the suffix of its kind of file; returns the path written.

        world: where it lies; None is the fit's own world.
        """

    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z)."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as tensors and numbers: torch.load needs no pickle."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()` of a scene with the same settings; other keys in it are ignored."""
