"""Gaussians as a fit optimises them: where they start, their learning rates, densification and pruning.

Paper (A.1): the points start in a ball at the centre, and only faint Gaussians are pruned. Here: those
outside of the masks' visual hull are left out, and what no view sees is pruned, too, because true views of
meshes from elsewhere then agree better (docs/quality.md).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from gsplat.strategy.ops import remove
from jaxtyping import Float
from torch import Tensor

from recon_torch.errors import NoGaussiansLeft
from recon_torch.formats.ply import save_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.rasterize import Render, rasterize_together
from recon_torch.scene.densify import CappedStrategy
from recon_torch.scene.parameters import Parameters
from recon_torch.scene.visibility import seen_px
from recon_torch.settings import FitSettings
from recon_torch.views import hull
from recon_torch.views.cameras import Cameras

if TYPE_CHECKING:
    from recon_torch.views.world import World

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


INITIAL_OPACITY = 0.1

MOST_POINTS = 4096  # for one Gaussian in `opacity_grid`


def init_ball(
    num: int,
    radius: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Gaussians:
    """Grey Gaussians spread evenly over a ball around the origin (Sec. A.1: 5000 points at the centre).

    Each is a sphere with a standard deviation of half the mean distance between neighbours. The random
    numbers are drawn on the CPU, so a seed gives the same start on every device.
    """
    direction = torch.randn(num, 3, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    distance = radius * torch.rand(num, 1, generator=generator) ** (1 / 3)
    spacing = radius * (4 / 3 * math.pi / num) ** (1 / 3)
    gaussians = Gaussians(
        means=direction * distance,
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(num, 1),
        log_scales=torch.full((num, 3), math.log(0.5 * spacing)),
        opacity_logits=torch.full((num,), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))),
        sh0=torch.zeros(num, 3),
    )
    return Gaussians(*(tensor.to(device) for tensor in gaussians))


def opacity_grid(gaussians: Gaussians, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
    """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z).

    Each Gaussian strews its opacity times its mean shadow over as many points, drawn from itself, as its
    shadow has cells. What lies outside of the cube counts for the nearest cell of its surface.
    """
    cell = 2 * half_width / num_cells
    x, y, z = gaussians.scales.unbind(-1)
    shadows = 2 * math.pi / 3 * (x * y + y * z + z * x) / cell**2
    counts = shadows.ceil().clamp(1, MOST_POINTS).long()
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    draws = (
        torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0)).to(x) * gaussians.scales[index]
    )
    axis = F.normalize(gaussians.quats, dim=-1)[index]
    real, imaginary = axis[:, :1], axis[:, 1:]
    turned = torch.linalg.cross(imaginary, draws)
    points = gaussians.means[index] + draws + 2 * (real * turned + torch.linalg.cross(imaginary, turned))
    cells = ((points + half_width) / cell).long().clamp(0, num_cells - 1)
    flat = (cells * cells.new_tensor([num_cells**2, num_cells, 1])).sum(-1)
    grid = torch.zeros(num_cells**3, device=x.device)
    grid.index_add_(0, flat, (gaussians.opacities * shadows / counts)[index])
    return grid.clamp_max(1).view(num_cells, num_cells, num_cells)
