"""Gaussians as a fit optimises them: where they start, their learning rates, densification and pruning.

Paper (A.1): the points start in a ball at the centre, and only faint Gaussians are pruned. Here: the start
leaves out those outside of the masks' visual hull, and what no view sees is pruned as well, because true
views of meshes from elsewhere then agree better (docs/quality.md). Some steps see their views as at twice
the size, because needles that are thinner than a pixel show as soon as a viewer comes nearer.
`start="ball", prune_unseen=0, zoomed=0` is the paper's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gsplat.strategy.ops import remove
from jaxtyping import Float
from torch import Tensor

from recon_torch.errors import NoGaussiansLeft
from recon_torch.formats.ply import save_ply
from recon_torch.raster import LOW_PASS_PX2, Render
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render_together
from recon_torch.scene.densify import CappedStrategy
from recon_torch.scene.opacity_grid import opacity_grid
from recon_torch.scene.parameters import Parameters
from recon_torch.scene.start import init_ball, near_hull
from recon_torch.scene.visibility import seen_px
from recon_torch.settings import Engine, FitSettings, MeshSettings, Start
from recon_torch.views import axes
from recon_torch.views.axes import Axes
from recon_torch.views.cameras import Cameras
from recon_torch.views.world import World

PARAM_NAMES = ("means", "quats", "scales", "opacities", "sh0")  # gsplat's names of the fields of Gaussians
ZOOM = 2.0  # how many times as large the zoomed steps see their views
ZOOMED_EARLY, EARLY = 5.0, 0.7  # zoomed steps are so many times as frequent in this first share of the steps
LARGEST_LOGIT = 6.0  # of an opacity that a fit starts from: larger ones have hardly a gradient
UNSEEN_EVERY = 200  # steps between the prunings of what no view sees; there is one after the last step, too


class Splats:
    """A `Scene` of Gaussians, seen by the cameras of its fit."""

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device):
        self.settings, self.device = settings, device
        self._cameras = cameras
        self._strategy = CappedStrategy.of(settings, (cameras.width * cameras.height) ** 0.5)
        self._strategy_state = self._strategy.initialize_state()
        self._is_early = True
        self._put(self._ball())

    def _ball(self) -> Gaussians:
        generator = torch.Generator().manual_seed(self.settings.seed)
        return init_ball(self.settings.num_gaussians, self.settings.init_radius, generator, self.device)

    def _put(self, gaussians: Gaussians) -> None:
        self.parameters = Parameters(dict(zip(PARAM_NAMES, gaussians, strict=True)), self.device)

    @property
    def gaussians(self) -> Gaussians:
        """The Gaussians as they are now, without gradients."""
        return Gaussians(*(tensor.detach() for tensor in self.optimized))

    @property
    def optimized(self) -> Gaussians:
        """The Gaussians as the parameters themselves, whose gradients the optimiser follows."""
        return Gaussians(*(self.parameters.tensors[name] for name in PARAM_NAMES))

    @property
    def num_gaussians(self) -> int:
        return len(self.parameters.tensors["means"])

    def start_on(self, masks: Float[Tensor, "K H W 1"] | None) -> list[str]:
        """See `Scene`. What the masks rule out is left out of the ball, if they agree on any place."""
        if masks is None or self.settings.start != Start.HULL:
            return []
        ball = self._ball()
        start = near_hull(ball, self._cameras, masks)
        if len(start.means) == 0:
            self._put(ball)
            return ["the masks agree on no place for the object, so the Gaussians start in a ball"]
        self._put(start)
        return []

    def start_from(self, gaussians: Gaussians) -> None:
        """Begins with these, in the fit's world, before the first step. Beyond the limit the faintest go."""
        logits = gaussians.opacity_logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        self._put(Gaussians(*(each.to(self.device) for each in gaussians._replace(opacity_logits=logits))))
        self.limit(self.settings.max_gaussians)

    def rates(self, progress: float) -> dict[str, float]:
        settings = self.settings
        decay = (settings.lr_means_final / settings.lr_means) ** progress
        return {
            "means": settings.lr_means * decay,
            "quats": settings.lr_quats,
            "scales": settings.lr_scales,
            "opacities": settings.lr_opacities,
            "sh0": settings.lr_sh0,
        }

    @classmethod
    def render_together(
        cls, scenes: Sequence[Splats], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """See `Scene`. What a render for a step draws at random is whether it is zoomed."""
        settings, device = scenes[0].settings, scenes[0].device
        low_passes = [scene.low_pass_px2_of(seed) for scene, seed in zip(scenes, seeds, strict=True)]
        renders: dict[int, Render] = {}
        for low_pass_px2 in set(low_passes):
            alike = [index for index, each in enumerate(low_passes) if each == low_pass_px2]
            together = render_together(
                [scenes[index].optimized for index in alike],
                [cameras[index] for index in alike],
                background=torch.full((3,), settings.background, device=device),
                engine=Engine(settings.engine),
                low_pass_px2=low_pass_px2,
            )
            renders.update(zip(alike, together, strict=True))
        return [renders[index] for index in range(len(scenes))]

    def low_pass_px2_of(self, seed: int | None) -> float:
        """What viewers add to the variances of splats; less in the zoomed ones of the steps.

        A view at twice its size, made smaller again, shows splats thinner than at its own size: there, a
        pixel is half as wide.
        """
        share = self.settings.zoomed * (ZOOMED_EARLY if self._is_early else 1.0)
        is_zoomed = seed is not None and np.random.default_rng(seed).random() < share
        return LOW_PASS_PX2 / ZOOM**2 if is_zoomed else LOW_PASS_PX2

    def penalty(self, info: dict[str, Any]) -> float:
        return 0.0

    def watch(self, step: int, info: dict[str, Any]) -> None:
        self._strategy.step_pre_backward(*self._state_of_strategy(), step, info)

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        """See `Scene`. gsplat densifies and prunes; what no view sees is dropped, too."""
        # gsplat draws the places of split Gaussians from the global generator.
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            # torch.manual_seed would take a millisecond to keep a traceback for each absent kind of device.
            (torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed)(seed)
            self._strategy.step_post_backward(*self._state_of_strategy(), step, info)
        self._is_early = step + 1 < EARLY * self.settings.num_steps
        if (step + 1) % UNSEEN_EVERY == 0 or step + 1 == self.settings.num_steps:
            self._prune_unseen()
        if self.num_gaussians == 0:
            raise NoGaussiansLeft(
                "the fit has pruned every Gaussian; do the views and the cameras belong together?"
            )

    def _state_of_strategy(self) -> tuple[dict, dict, dict]:
        return self.parameters.tensors, self.parameters.optimizers, self._strategy_state

    def _prune_unseen(self) -> None:
        """Drops what hardly any view sees: no view corrects it, and it shows as specks from elsewhere."""
        if self.settings.prune_unseen > 0:
            seen = seen_px(self.gaussians, self._cameras, Engine(self.settings.engine))
            remove(*self._state_of_strategy(), seen < self.settings.prune_unseen * seen.mean())

    def save(
        self,
        path: str | os.PathLike,
        world: World | None = None,
        file_axes: Axes = axes.UPRIGHT,
        *,
        up: Float[np.ndarray, "3"] = axes.UP,
        mesh: MeshSettings | None = None,
    ) -> Path:
        path = Path(path).with_suffix(".ply")
        save_ply(moved_back(self.gaussians, world) if world else self.gaussians, path, file_axes)
        return path

    @torch.no_grad()
    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        return opacity_grid(self.gaussians, half_width, num_cells)

    def state_dict(self) -> dict[str, Any]:
        return self.parameters.state_dict() | {
            "strategy": copy.deepcopy(self._strategy_state),
            "max_gaussians": self._strategy.max_gaussians,
            "is_early": self._is_early,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters = Parameters.from_state_dict(state, self.device)
        self._strategy_state = {
            name: value.to(self.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in state["strategy"].items()
        }
        self._strategy.max_gaussians = state["max_gaussians"]
        self._is_early = state["is_early"]

    def limit(self, max_gaussians: int) -> None:
        self._strategy.max_gaussians = max_gaussians
        order = self.gaussians.opacity_logits.argsort()
        gone = torch.zeros(len(order), dtype=torch.bool, device=self.device)
        gone[order[: max(self.num_gaussians - max_gaussians, 0)]] = True
        remove(*self._state_of_strategy(), gone)


def moved_back(gaussians: Gaussians, world: World) -> Gaussians:
    """Gaussians of the fit's world, in the views' world."""
    means = gaussians.means / world.scale + torch.from_numpy(world.center).to(gaussians.means)
    return gaussians._replace(means=means, log_scales=gaussians.log_scales - np.log(world.scale))
