"""A fit that sees some of the video's views, while renders are of all of them (Table 3)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from recon_torch.process import ReconstructionClient
from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings
from recon_torch.views.cameras import Cameras


def evenly(count: int, num_views: int) -> Int64[np.ndarray, " count"]:
    """The numbers of `count` views of an orbit, view 0 first, as even as whole numbers allow."""
    return np.arange(count) * num_views // count


class FewerViews:
    """A `ReconstructionClient` whose fit is another client's, of `count` views, evenly spaced.

    The others are not there for it: neither for its loss, nor for where it starts or what it prunes.
    """

    def __init__(self, client: ReconstructionClient, count: int) -> None:
        self._client, self._count = client, count
        self._cameras: Cameras | None = None
        self.views, self.masks = client.views, client.masks
        self.renders, self.alphas = client.renders, client.alphas

    def reset(self, cameras: Cameras | None = None, settings: FitSettings | None = None) -> None:
        cameras = cameras or self._cameras
        assert cameras is not None, "the first asset has cameras"
        self._cameras, self._chosen = cameras, evenly(self._count, len(cameras))
        self._client.reset(cameras[self._chosen], settings)
        shape = (len(cameras), cameras.height, cameras.width)
        device = self._client.views.device
        self.views, self.masks = (torch.zeros(*shape, channels, device=device) for channels in (3, 1))

    def set_targets(self, weights: Sequence[float] | None = None) -> None:
        index = torch.from_numpy(self._chosen).to(self.views.device)
        self._client.views.copy_(self.views[index])
        self._client.masks.copy_(self.masks[index])
        self._client.set_targets(None if weights is None else [weights[view] for view in self._chosen])

    def render(
        self, cameras: Cameras | None = None
    ) -> tuple[Float[Tensor, "K2 H2 W2 3"], Float[Tensor, "K2 H2 W2 1"]]:
        self.renders, self.alphas = self._client.render(cameras or self._cameras)
        return self.renders, self.alphas

    # ---- As the other client ----

    @property
    def step(self) -> int:
        return self._client.step

    @property
    def num_gaussians(self) -> int:
        return self._client.num_gaussians

    @property
    def notes(self) -> list[str]:
        return self._client.notes

    def fit(
        self, until_step: int, on_progress: Callable[[int, dict[str, float]], None] | None = None
    ) -> dict[str, float]:
        return self._client.fit(until_step, on_progress)

    def inspect(
        self,
        settings: GateSettings,
        around: Cameras | None = None,
        excursions: Float32[np.ndarray, " K"] | None = None,
    ) -> dict[str, Any]:
        return self._client.inspect(settings, around, excursions)

    def export(
        self,
        path: str | os.PathLike,
        settings: ExportSettings | None = None,
        mesh: MeshSettings | None = None,
    ) -> None:
        self._client.export(path, settings, mesh)

    def close(self) -> None:
        self._client.close()
