"""Gaussians as a fit optimises them: where they start, their learning rates, densification and pruning.

Paper (A.1): the points start in a ball at the centre, and only faint Gaussians are pruned. Here: those
outside of the masks' visual hull are left out, and what no view sees is pruned, too, because true views of
meshes from elsewhere then agree better (docs/quality.md).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gsplat.strategy.ops import remove
from jaxtyping import Float
from torch import Tensor

from recon_torch import hull
from recon_torch.cameras import Cameras
from recon_torch.densify import CappedStrategy
from recon_torch.errors import NoGaussiansLeft
from recon_torch.gaussians import Gaussians, init_ball, opacity_grid, save_ply
from recon_torch.rasterize import Render, rasterize_together
from recon_torch.scene import Parameters
from recon_torch.settings import FitSettings
from recon_torch.visibility import seen_px

if TYPE_CHECKING:
    from recon_torch.world import World

PARAM_NAMES = ("means", "quats", "scales", "opacities", "sh0")  # gsplat's names of the fields of Gaussians
HULL_REACH = 0.0135  # world units within which a Gaussian may begin beside the visual hull
UNSEEN_EVERY = 200  # steps, and after the last


class Splats:
    """A `scene.Scene` of Gaussians, seen by the cameras of its fit."""

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device):
        self._cameras, self._settings, self._device = cameras, settings, device
        self._strategy = CappedStrategy.of(settings, (cameras.width * cameras.height) ** 0.5)
        self._strategy_state = self._strategy.initialize_state()
        self._put(self._ball())

    def _ball(self) -> Gaussians:
        generator = torch.Generator().manual_seed(self._settings.seed)
        return init_ball(self._settings.num_gaussians, self._settings.init_radius, generator, self._device)

    def _put(self, gaussians: Gaussians) -> None:
        self.parameters = Parameters(dict(zip(PARAM_NAMES, gaussians, strict=True)), self._device)

    @property
    def gaussians(self) -> Gaussians:
        return Gaussians(*(self.parameters.tensors[name].detach() for name in PARAM_NAMES))

    @property
    def num_gaussians(self) -> int:
        return len(self.parameters.tensors["means"])

    def start_on(self, masks: Float[Tensor, "K H W 1"]) -> list[str]:
        """See `Scene`: of the ball, what the masks do not rule out, if they agree on any place."""
        if self._settings.start != "hull":
            return []
        ball = self._ball()
        places = ball.means.cpu().numpy().astype(np.float64)
        inside = hull.nearly_inside(places, self._cameras, masks.cpu().numpy(), HULL_REACH)
        if not inside.any():
            self._put(ball)
            return ["the masks agree on no place for the object, so the Gaussians start in a ball"]
        self._put(Gaussians(*(tensor[torch.from_numpy(inside).to(self._device)] for tensor in ball)))
        return []

    def rates(self, progress: float) -> dict[str, float]:
        settings = self._settings
        decay = (settings.lr_means_final / settings.lr_means) ** progress
        return {
            "means": settings.lr_means * decay,
            "quats": settings.lr_quats,
            "scales": settings.lr_scales,
            "opacities": settings.lr_opacities,
            "sh0": settings.lr_sh0,
        }

    @staticmethod
    def render_together(
        scenes: Sequence[Splats], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """See `Scene`; nothing is drawn at random."""
        settings, device = scenes[0]._settings, scenes[0]._device
        return rasterize_together(
            [Gaussians(*(scene.parameters.tensors[name] for name in PARAM_NAMES)) for scene in scenes],
            [torch.from_numpy(each.w2c).to(device, torch.float32) for each in cameras],
            [torch.from_numpy(each.intrinsics_px).to(device, torch.float32) for each in cameras],
            cameras[0].width,
            cameras[0].height,
            background=torch.full((3,), settings.background, device=device),
            engine=settings.engine,
        )

    def watch(self, step: int, info: dict[str, Any]) -> None:
        self._strategy.step_pre_backward(*self._state_of_strategy(), step, info)

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        """See `Scene`: gsplat's densification and pruning, and what no view sees is dropped."""
        # gsplat draws the places of split Gaussians from the global generator.
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if on_gpu else []):
            # torch.manual_seed takes a millisecond to note a traceback for each kind of device not there.
            (torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
            self._strategy.step_post_backward(*self._state_of_strategy(), step, info)
        if (step + 1) % UNSEEN_EVERY == 0 or step + 1 == self._settings.num_steps:
            self._prune_unseen()
        if self.num_gaussians == 0:
            raise NoGaussiansLeft(
                "the fit has pruned every Gaussian; do the views and the cameras belong together?"
            )

    def _state_of_strategy(self) -> tuple[dict, dict, dict]:
        return self.parameters.tensors, self.parameters.optimizers, self._strategy_state

    def _prune_unseen(self) -> None:
        """Drops what hardly any view sees: nothing holds it, and other directions would show it as specks."""
        if self._settings.prune_unseen > 0:
            seen = seen_px(self.gaussians, self._cameras, self._settings.engine)
            remove(*self._state_of_strategy(), seen < self._settings.prune_unseen * seen.mean())

    def save(self, path: str | os.PathLike, world: World | None = None) -> Path:
        path = Path(path).with_suffix(".ply")
        save_ply(world.back(self.gaussians) if world else self.gaussians, path)
        return path

    @torch.no_grad()
    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        return opacity_grid(self.gaussians, half_width, num_cells)

    def state_dict(self) -> dict[str, Any]:
        return self.parameters.state_dict() | {
            "strategy": copy.deepcopy(self._strategy_state),
            "max_gaussians": self._strategy.max_gaussians,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Scene`. Where `max_gaussians` was lowered in it, the faintest go."""
        self.parameters = Parameters.from_state_dict(state, self._device)
        self._strategy_state = {
            name: value.to(self._device, copy=True) if isinstance(value, Tensor) else value
            for name, value in state["strategy"].items()
        }
        self._strategy.max_gaussians = state["max_gaussians"]
        if self._strategy.max_gaussians < self._settings.max_gaussians:
            self._drop_faintest(self.num_gaussians - self._strategy.max_gaussians)

    def _drop_faintest(self, count: int) -> None:
        order = self.gaussians.opacity_logits.argsort()
        gone = torch.zeros(len(order), dtype=torch.bool, device=self._device)
        gone[order[: max(count, 0)]] = True
        remove(*self._state_of_strategy(), gone)
