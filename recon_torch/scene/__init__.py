"""What a fit optimises: the contract `Scene`, and its three kinds, Gaussians, a radiance field and a mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recon_torch.raster import Render
from recon_torch.scene.mesh import MeshScene
from recon_torch.scene.nerf import RadianceField
from recon_torch.scene.parameters import Parameters
from recon_torch.scene.splats import Splats
from recon_torch.settings import FitSettings, MeshSettings, Representation
from recon_torch.views import axes
from recon_torch.views.axes import Axes
from recon_torch.views.cameras import Cameras
from recon_torch.views.world import World

S = TypeVar("S", bound="Scene")


@runtime_checkable
class Scene(Protocol):
    """An object that can be rendered, and whose parameters follow the gradient of its renders.

    A step of a fit calls `render_together`, `penalty` and `watch`, then, after the backward pass,
    `parameters.step` and `refine`. The scene is in the fit's own world: the object in the ball of radius 0.5
    at the origin.

    Attributes:
        parameters: what is optimised.
        num_gaussians: 0 for a scene that has none.
    """

    parameters: Parameters

    @property
    def num_gaussians(self) -> int: ...

    def start_on(self, masks: Float[Tensor, "K H W 1"] | None) -> list[str]:
        """Places a scene that has not been optimised yet where these views of the fit show the object.

        masks: None for views without.

        Returns notes for the report. Raises UserError where such a scene needs masks.
        """

    def rates(self, progress: float) -> dict[str, float]:
        """The learning rate of each parameter when a share `progress` of the steps is done."""

    @classmethod
    def render_together(
        cls: type[S], scenes: Sequence[S], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """A render of each scene from its own cameras, which all have one number and one size.

        seeds: of what a render for a step draws at random; None asks for a render without such noise.
        """

    def penalty(self, info: dict[str, Any]) -> Float[Tensor, ""] | float:
        """What the scene adds to the loss of the render with this `info`, weighted; 0 for nothing."""

    def watch(self, step: int, info: dict[str, Any]) -> None:
        """Has the backward pass of the render with this `info` record what `refine` needs."""

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        """Adds and drops parts of the scene after a step (the first is 0), at the steps meant for that.

        Raises:
            NoGaussiansLeft: nothing is left of the scene.
        """

    def limit(self, max_gaussians: int) -> None:
        """Keeps the scene at no more than so many Gaussians from now on, and drops the faintest beyond."""

    def save(
        self,
        path: str | os.PathLike,
        world: World | None = None,
        file_axes: Axes = axes.UPRIGHT,
        *,
        up: Float[np.ndarray, "3"] = axes.UP,
        mesh: MeshSettings | None = None,
    ) -> Path:
        """Writes the object to `path`, with the suffix of its own kind of file. Returns the path written.

        A mesh is in files called "mesh" instead, in the same directory; the first one's path is returned.

        Args:
            world: where the object lies in the views' world, in which it is then written; default: the fit's
                own.
            file_axes: for a file that viewers show; others keep the world's axes.
            up: the axis of either world that is up, for a file that has an axis of its own for that.
            mesh: how a scene that is one is written; the defaults if None.

        Raises:
            UserError: it cannot be written, as its settings or a package that is missing say.
        """

    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z)."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as tensors and numbers: torch.load needs no pickle."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()` of a scene with the same settings; other keys in it are ignored."""


def new_scene(cameras: Cameras, settings: FitSettings, device: torch.device) -> Scene:
    """A scene of the kind that `settings.representation` names, for a fit to views from these cameras."""
    if settings.representation == Representation.MESH:
        return MeshScene(cameras, settings, device)
    if settings.representation == Representation.NERF:
        return RadianceField(settings, device)
    return Splats(cameras, settings, device)
