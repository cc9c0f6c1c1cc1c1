"""A fit in a process of its own: the contract of its client, the messages between the two, and the worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings
from recon_torch.views.cameras import Cameras


@runtime_checkable
class ReconstructionClient(Protocol):
    """What the diffusion side needs of the 3D side. `client.ReconClient` has it from a worker process.

    Calls block until they are done. One asset follows another: `reset`, write `views` and `masks`,
    `set_targets`, `fit`, `render`; then perhaps other targets and further steps; in the end `export`.

    Attributes:
        views, masks: the targets, float32 in [0, 1]; views are composited on the settings' background.
        renders, alphas: what the last `render` wrote. The next one may write into the same memory.
        step, num_gaussians: of the fit, as last heard.
        notes: what a report on this asset should mention.
    """

    views: Float[Tensor, "K H W 3"]
    masks: Float[Tensor, "K H W 1"]
    renders: Float[Tensor, "K2 H2 W2 3"]
    alphas: Float[Tensor, "K2 H2 W2 1"]

    @property
    def step(self) -> int: ...

    @property
    def num_gaussians(self) -> int: ...

    @property
    def notes(self) -> list[str]: ...

    def reset(self, cameras: Cameras | None = None, settings: FitSettings | None = None) -> None:
        """Begins a new asset; what is not given stays as it was. `views` and `masks` may be other tensors."""

    def set_targets(self, weights: Sequence[float] | None = None) -> None:
        """Makes the fit follow what `views` and `masks` hold now. Raises UserError if that is not finite.

        weights: of each view in the loss; None: all have 1.
        """

    def fit(
        self, until_step: int, on_progress: Callable[[int, dict[str, float]], None] | None = None
    ) -> dict[str, float]:
        """Optimises until the fit has done `until_step` steps in all.

        on_progress: called as on_progress(step, losses); steps may come again.
        Returns the agreement of the renders with the targets: psnr [dB], ssim, lpips ... (`Fit.metrics`).
        Raises UserError if the fit cannot go on.
        """

    def render(
        self, cameras: Cameras | None = None
    ) -> tuple[Float[Tensor, "K2 H2 W2 3"], Float[Tensor, "K2 H2 W2 1"]]:
        """Renders the fit's own or other cameras into `renders` and `alphas`, and returns these two."""

    def inspect(
        self,
        settings: GateSettings,
        around: Cameras | None = None,
        excursions: Float32[np.ndarray, " K"] | None = None,
    ) -> dict[str, Any]:
        """What the quality gates say of the fit (`recon_torch.fit.quality.inspect`).

        around: cameras on a closed orbit, view 0 first; default: the fit's own.
        excursions: of the masks that the object is judged by (`recon_torch.views.rigidity`); default: of the
            fit's targets.
        """

    def export(
        self,
        path: str | os.PathLike,
        settings: ExportSettings | None = None,
        mesh: MeshSettings | None = None,
    ) -> None:
        """Writes the object as a .ply in the layout of 3DGS, or as what else its kind of scene is kept in.

        settings, mesh: the defaults if None; the latter says how a scene is written that is a mesh.

        Raises UserError if it cannot be written.
        """

    def close(self) -> None:
        """Frees what the client holds. It cannot be used afterwards."""
