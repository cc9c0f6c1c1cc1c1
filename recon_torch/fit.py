"""The direct fit of Gaussians to views (Sec. 3.3, A.1): 5000 points, 1200 steps, densify and prune every 50.

The loss is 10 LPIPS + 0.2 (1 - MS-SSIM) + 1 mask loss + 5 L1. The views may change in mid-fit: the method
renders the fit, lets the video model mend the renders, and fits on.

Paper: the points start at the centre, there is no pixel loss, and only faint Gaussians are pruned. Here: they
start on the visual hull of the masks, and what no view sees is pruned, too, because true views of meshes from
elsewhere then agree better, by 1.2 dB for a milk truck (docs/quality.md). The paper's: `start="ball", w_l1=0,
prune_unseen=0`.

Every random choice is a pure function of (seed, step), so a fit restored from its snapshot goes on bit for
bit as the one that was never interrupted.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from gsplat.strategy.ops import remove
from jaxtyping import Float
from torch import Tensor

from recon_torch import hull
from recon_torch.cameras import Cameras
from recon_torch.densify import CappedStrategy
from recon_torch.errors import NoGaussiansLeft, UserError
from recon_torch.gaussians import Gaussians, init_ball, init_cells, opacity_grid, save_ply
from recon_torch.losses import PerceptualDistance, l1_loss, mask_loss, ms_ssim, perceptual_distance, rgb_loss
from recon_torch.metrics import psnr, silhouette_iou, ssim
from recon_torch.rasterize import Engine, Render, rasterize
from recon_torch.visibility import seen_px

if TYPE_CHECKING:
    from recon_torch.world import World

PARAM_NAMES = ("means", "quats", "scales", "opacities", "sh0")  # gsplat's names of the fields of Gaussians
VIEW_STREAM, SPLIT_STREAM, SETBACK_STREAM = 1, 2, 3  # what random numbers are for
SETBACK_RATE = 0.5  # of learning after a setback
HULL_CELLS = 64  # along each side of the grid on which the visual hull is found
UNSEEN_EVERY = 200  # steps, and after the last
VIEWS_AT_ONCE = 8  # bounds the memory of metrics
SMALLEST_SIDE_PX = 32  # of what the LPIPS networks can pool
RANDOM_LPIPS_STAGES = 3  # five cost 2.5 times as much and give the same PSNR and SSIM on held-out views


@dataclass(frozen=True)
class FitSettings:
    """Paper: 5000 Gaussians, 1200 steps, refinement every 50, weights 10, 0.2, 1. Unspecified: the rest.

    Learning rates: DreamGaussian's, but the means move three times and the scales twice as fast, which
    gives 0.4 dB more on held-out views.
    """

    num_gaussians: int = 5000
    num_steps: int = 1200
    views_per_step: int = 1
    init_radius: float = 0.5
    start: Literal["hull", "ball"] = "hull"  # "ball" is the paper's, of that radius

    w_lpips: float = 10.0
    w_ssim: float = 0.2
    w_mask: float = 1.0
    w_rgb: float = 0.0  # Table 2's ablation sets this and w_lpips=0
    w_l1: float = 5.0  # the paper's is 0
    lpips_net: str = "vgg"
    lpips_stages: int | None = None  # from the first; None: all, or 3 where the weights are random
    lpips_weights: str | None = None
    lpips_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the loss; metrics are float32
    background: float = 1.0  # grey level behind the views

    lr_means: float = 3e-3
    lr_means_final: float = 6e-5
    lr_sh0: float = 1e-2
    lr_opacities: float = 5e-2
    lr_scales: float = 1e-2
    lr_quats: float = 5e-3

    refine_every: int = 50
    grow_grad2d: float = 0.002
    grow_scale3d: float = 0.01
    prune_opacity: float = 0.03  # at 0.01 (DreamGaussian) a haze of faint Gaussians stays around the object
    prune_unseen: float = 0.06  # what fills less pixels than this share of the mean; the paper's is 0
    max_gaussians: int = 20000

    representation: Literal["gaussians", "nerf"] = "gaussians"  # Table 2's last row is the other
    nerf_cells: int = 64  # along each side of its grid
    nerf_samples: int = 64  # along each of its rays
    lr_nerf: float = 0.2

    engine: Engine = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.representation not in ("gaussians", "nerf"):
            raise UserError(f"representation is {self.representation!r}; choose gaussians or nerf")


class Fit:
    """The state of one optimisation: the loop, and the Gaussians that it fits.

    All that it knows of Gaussians is in `_start`, `_start_on_hull`, `_rates`, `_render`, `_watch`, `_refine`,
    `save` and `opacity_grid`. Another representation, such as `nerf.NerfFit`, has its own of these.

    Attributes:
        step: steps done so far.
        notes: what a report should say about this fit.
        setbacks: why `recon_torch.recovery` took it back to an earlier state, each time.
        caution: how often the learning rates were halved, and the random numbers changed, because of that.
    """

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device | str | None = None):
        self.cameras = cameras
        self.settings = settings
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step = 0
        self.notes: list[str] = []
        self.setbacks: list[str] = []
        self.caution = 0
        if min(cameras.width, cameras.height) < SMALLEST_SIDE_PX:
            raise UserError(
                f"views of {cameras.width}x{cameras.height} px are too small; give at least 32x32"
            )
        self._perceptual = perceptual_distance(settings.lpips_net, settings.lpips_weights, self.device)
        if self._perceptual.random_weights:
            self.notes.append(f"LPIPS runs on {settings.lpips_net} with random weights")
        dtype = _lpips_dtype(settings, self.device)
        self._lpips = self._perceptual.rounded(dtype, _lpips_stages(settings, self._perceptual))

        generator = torch.Generator().manual_seed(settings.seed)
        self._strategy = CappedStrategy.of(settings)
        self._strategy_state = self._strategy.initialize_state()
        self._params: dict[str, torch.nn.Parameter] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._set_params(self._start(generator))

    def _start(self, generator: torch.Generator) -> dict[str, Tensor]:
        start = init_ball(self.settings.num_gaussians, self.settings.init_radius, generator, self.device)
        return dict(zip(PARAM_NAMES, start, strict=True))

    def _set_params(self, tensors: dict[str, Tensor]) -> None:
        self._params = {
            name: torch.nn.Parameter(tensor.to(self.device, copy=True)) for name, tensor in tensors.items()
        }
        self._optimizers = {
            name: torch.optim.Adam([self._params[name]], lr=rate, eps=1e-15, fused=True)
            for name, rate in self._rates().items()
        }

    def _rates(self) -> dict[str, float]:
        """The learning rate of each parameter at this step."""
        settings, share = self.settings, SETBACK_RATE**self.caution
        progress = min(self.step / settings.num_steps, 1.0)
        decay = (settings.lr_means_final / settings.lr_means) ** progress
        return {
            "means": settings.lr_means * share * decay,
            "quats": settings.lr_quats * share,
            "scales": settings.lr_scales * share,
            "opacities": settings.lr_opacities * share,
            "sh0": settings.lr_sh0 * share,
        }

    @property
    def _seed(self) -> int:
        seed = self.settings.seed
        return fold_in(seed, SETBACK_STREAM, self.caution) if self.caution else seed

    @property
    def gaussians(self) -> Gaussians:
        return Gaussians(*(self._params[name].detach() for name in PARAM_NAMES))

    @property
    def num_gaussians(self) -> int:
        return len(self._params["means"])

    def set_targets(self, views: Float[Tensor, "K H W 3"], masks: Float[Tensor, "K H W 1"]) -> None:
        """The views to fit from now on, composited on the settings' background, and their foreground masks.

        Raises:
            UserError: values that are not finite, or no foreground in any view.
            ValueError: shapes that are not those of the cameras.
        """
        shape = (len(self.cameras), self.cameras.height, self.cameras.width)
        if views.shape != (*shape, 3) or masks.shape != (*shape, 1):
            raise ValueError(f"views {tuple(views.shape)}, masks {tuple(masks.shape)} for cameras {shape}")
        finite = torch.isfinite(views).flatten(1).all(1) & torch.isfinite(masks).flatten(1).all(1)
        if not finite.all():
            bad = torch.nonzero(~finite)[:, 0].tolist()
            raise UserError(f"views {bad} or their masks have values that are not finite; make them anew")
        if masks.max() < 0.5:
            raise UserError("the masks of all views are empty: there is no foreground to fit")
        # Copies, as the caller's tensors may be shared memory that is written again.
        self._views = views.to(self.device, torch.float32, copy=True)
        self._masks = masks.to(self.device, torch.float32, copy=True)
        self._target_features = None
        if self.step == 0 and self.settings.start == "hull":
            self._start_on_hull()

    def _start_on_hull(self) -> None:
        """Puts the Gaussians where the masks say that the object's surface is, if they agree on any place."""
        settings, views, masks = self.settings, self._views.cpu().numpy(), self._masks.cpu().numpy()
        half_width = settings.init_radius
        centers = hull.surface(self.cameras, masks, half_width, HULL_CELLS)
        if not len(centers):
            self.notes.append("the masks agree on no place for the object, so the Gaussians start in a ball")
            return
        colors = hull.mean_colors(centers, self.cameras, views, masks)
        generator = torch.Generator().manual_seed(settings.seed)
        places = (torch.from_numpy(array).float() for array in (centers, colors))
        width = 2 * half_width / HULL_CELLS
        start = init_cells(settings.num_gaussians, *places, width, generator, self.device)
        self._set_params(dict(zip(PARAM_NAMES, start, strict=True)))

    def run(self, until_step: int, on_step: Callable[[int, dict[str, Tensor]], None] | None = None) -> None:
        """Optimises to the given step; on_step gets the steps done and the step's losses (unweighted)."""
        while self.step < until_step:
            losses = self._optimise_once()
            self.step += 1
            if on_step is not None:
                on_step(self.step, losses)

    def _optimise_once(self) -> dict[str, Tensor]:
        chosen = self._choose_views()
        render = self._render(self.cameras[chosen])
        losses = self._losses(render, torch.from_numpy(chosen))
        total = sum(getattr(self.settings, f"w_{name}") * loss for name, loss in losses.items())
        self._watch(render.info)
        total.backward()
        if self.step % self.settings.refine_every == 0 and not torch.isfinite(total):
            raise FloatingPointError(f"the loss is {total.item()} at step {self.step}")
        self._update(render.info)
        return {name: loss.detach() for name, loss in losses.items()} | {"loss": total.detach()}

    def _losses(self, render: Render, chosen: Tensor) -> dict[str, Tensor]:
        """The terms of the loss that have a weight."""
        settings, views, masks = self.settings, self._views[chosen], self._masks[chosen]
        terms = {
            "lpips": lambda: self._lpips.distance(render.rgb, self._features_of(chosen)).mean(),
            "ssim": lambda: 1 - ms_ssim(render.rgb, views).mean(),
            "mask": lambda: mask_loss(render.alpha, masks),
            "rgb": lambda: rgb_loss(render.rgb, views),
            "l1": lambda: l1_loss(render.rgb, render.alpha, views, masks, settings.background),
        }
        return {name: term() for name, term in terms.items() if getattr(settings, f"w_{name}") > 0}

    def _features_of(self, chosen: Tensor) -> list[Tensor]:
        if self._target_features is None:
            with torch.no_grad():
                parts = [self._lpips.features(part) for part in self._views.split(VIEWS_AT_ONCE)]
            self._target_features = [torch.cat(stage) for stage in zip(*parts, strict=True)]
        if len(chosen) == 1:  # a slice costs no copy of these large arrays
            return [stage.narrow(0, int(chosen), 1) for stage in self._target_features]
        return [stage[chosen] for stage in self._target_features]

    def _watch(self, info: dict[str, Any]) -> None:
        """Between rendering and the backward pass: has what `_refine` needs recorded."""
        self._strategy.step_pre_backward(
            self._params, self._optimizers, self._strategy_state, self.step, info
        )

    def _update(self, info: dict[str, Any]) -> None:
        for name, rate in self._rates().items():
            self._optimizers[name].param_groups[0]["lr"] = rate
            self._optimizers[name].step()
            self._optimizers[name].zero_grad()
        self._refine(info)

    def _refine(self, info: dict[str, Any]) -> None:
        """gsplat's bookkeeping after a step: densify and prune where the step number says so."""
        # gsplat draws the places of split Gaussians from the global generator.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            # torch.manual_seed takes a millisecond to note a traceback for each kind of device not there.
            on_gpu = self.device.type == "cuda"
            seed = torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed
            seed(fold_in(self._seed, SPLIT_STREAM, self.step))
            self._strategy.step_post_backward(
                self._params, self._optimizers, self._strategy_state, self.step, info
            )
        if (self.step + 1) % UNSEEN_EVERY == 0 or self.step + 1 == self.settings.num_steps:
            self._prune_unseen()
        if self.num_gaussians == 0:
            raise NoGaussiansLeft(
                "the fit has pruned every Gaussian; do the views and the cameras belong together?"
            )

    def _prune_unseen(self) -> None:
        """Drops what hardly any view sees: nothing holds it, and other directions would show it as specks."""
        if self.settings.prune_unseen > 0:
            seen = seen_px(self.gaussians, self.cameras, self.settings.engine)
            unseen = seen < self.settings.prune_unseen * seen.mean()
            remove(self._params, self._optimizers, self._strategy_state, unseen)

    def _choose_views(self) -> np.ndarray:
        """The step's views: the next ones of an endless row of shuffles, so each is seen equally often."""
        num_views, count = len(self.cameras), self.settings.views_per_step
        chosen = []
        for index in range(self.step * count, (self.step + 1) * count):
            epoch, place = divmod(index, num_views)
            shuffle = np.random.default_rng([self._seed, VIEW_STREAM, epoch]).permutation(num_views)
            chosen.append(shuffle[place])
        return np.array(chosen)

    def _render(self, cameras: Cameras) -> Render:
        gaussians = Gaussians(*(self._params[name] for name in PARAM_NAMES))
        return rasterize(
            gaussians.means,
            gaussians.quats,
            gaussians.scales,
            gaussians.opacities,
            gaussians.colors,
            torch.from_numpy(cameras.w2c).to(self.device),
            torch.from_numpy(cameras.intrinsics_px).to(self.device),
            cameras.width,
            cameras.height,
            background=torch.full((3,), self.settings.background, device=self.device),
            engine=self.settings.engine,
        )

    @torch.no_grad()
    def render(self, cameras: Cameras) -> Render:
        """The object as it is now, over the settings' background."""
        return self._render(cameras)

    def save(self, path: str | os.PathLike, world: World | None = None) -> Path:
        """Writes the object to `path`, with the suffix of its kind of file; returns the path written.

        world: where it lies; None is the fit's own world.
        """
        path = Path(path).with_suffix(".ply")
        save_ply(world.back(self.gaussians) if world else self.gaussians, path)
        return path

    @torch.no_grad()
    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z)."""
        return opacity_grid(self.gaussians, half_width, num_cells)

    def is_finite(self) -> bool:
        return all(bool(param.isfinite().all()) for param in self._params.values())

    @property
    def targets(self) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"]]:
        """The views and masks that are fitted."""
        return self._views, self._masks

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Agreement of the renders with the targets, as means over the views."""
        return self.compare(self.cameras, self._views, self._masks)

    @torch.no_grad()
    def compare(
        self, cameras: Cameras, views: Float[Tensor, "K H W 3"], masks: Float[Tensor, "K H W 1"]
    ) -> dict[str, float]:
        """psnr, psnr_foreground (dB), ssim, lpips, silhouette_iou of renders against views: means over K."""
        rows = []
        for part in torch.arange(len(cameras)).split(VIEWS_AT_ONCE):
            render = self.render(cameras[part.numpy()])
            rgb, view, mask = render.rgb.clamp(0, 1), views[part].to(self.device), masks[part].to(self.device)
            rows.append(
                {
                    "psnr": psnr(rgb, view),
                    "psnr_foreground": psnr(rgb, view, mask),
                    "ssim": ssim(rgb, view),
                    "lpips": self._perceptual.distance(rgb, self._perceptual.features(view)),
                    "silhouette_iou": silhouette_iou(render.alpha, mask),
                }
            )
        return {name: torch.cat([row[name] for row in rows]).nanmean().item() for name in rows[0]}

    def state_dict(self) -> dict[str, Any]:
        """All but settings, cameras and targets, as tensors and numbers: torch.load needs no pickle."""
        return {
            "step": self.step,
            "params": {name: param.detach().clone() for name, param in self._params.items()},
            "optimizers": {
                name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in self._optimizers.items()
            },
            "strategy": copy.deepcopy(self._strategy_state),
            "max_gaussians": self._strategy.max_gaussians,
            "caution": self.caution,
            "setbacks": list(self.setbacks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()` of a fit with the same settings and cameras.

        Where `caution` or `max_gaussians` were changed in it, the learning rates and the number of Gaussians
        (the faintest go) follow.
        """
        self.step, self.caution, self.setbacks = state["step"], state["caution"], list(state["setbacks"])
        self._set_params(state["params"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
            optimizer.param_groups[0]["lr"] = self._rates()[name]
        self._strategy_state = {
            name: value.to(self.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in state["strategy"].items()
        }
        self._strategy.max_gaussians = state["max_gaussians"]
        if self._strategy.max_gaussians < self.settings.max_gaussians:
            self._drop_faintest(self.num_gaussians - self._strategy.max_gaussians)

    def _drop_faintest(self, count: int) -> None:
        order = self._params["opacities"].detach().argsort()
        gone = torch.zeros(len(order), dtype=torch.bool, device=self.device)
        gone[order[: max(count, 0)]] = True
        remove(self._params, self._optimizers, self._strategy_state, gone)


def make_fit(cameras: Cameras, settings: FitSettings, device: torch.device | str | None = None) -> Fit:
    """The fit of `settings.representation`."""
    from recon_torch.nerf import NerfFit  # which builds on this module

    return {"gaussians": Fit, "nerf": NerfFit}[settings.representation](cameras, settings, device)


def _lpips_stages(settings: FitSettings, perceptual: PerceptualDistance) -> int:
    if settings.lpips_stages is None:
        return RANDOM_LPIPS_STAGES if perceptual.random_weights else perceptual.num_stages
    if not 1 <= settings.lpips_stages <= perceptual.num_stages:
        raise UserError(
            f"lpips_stages is {settings.lpips_stages}; {settings.lpips_net} has 1 to {perceptual.num_stages}"
        )
    return settings.lpips_stages


def _lpips_dtype(settings: FitSettings, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it takes half the time and the fit ends as good, else float32."""
    name = settings.lpips_dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "float32"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"lpips_dtype is {name!r}; choose auto, float32 or bfloat16")
    return getattr(torch, name)


def fold_in(seed: int, *names: int) -> int:
    """The seed of a named use of random numbers."""
    return int(np.random.SeedSequence([seed, *names]).generate_state(1, np.uint64)[0] >> np.uint64(1))
