"""The direct fit of a scene to views (Sec. 3.3, A.1): 5000 Gaussians, 1200 steps, densify and prune every 50.

The loss is 10 LPIPS + 0.2 (1 - MS-SSIM) + 1 mask loss + 5 L1, without LPIPS where it has no trained weights:
with random ones it takes six sevenths of the time and gains nothing (docs/quality.md). The views may change
in mid-fit: the method renders the fit, lets the video model mend the renders, and fits on. Several fits may
take their steps together, each as it would alone.

Paper: there is no pixel loss. Here: there is, for the reason that `splats` gives for its own departures. The
paper's: `start="ball", w_l1=0, prune_unseen=0`.

Every random choice is a pure function of (seed, step), so a fit restored from its snapshot goes on bit for
bit as the one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.losses.lpips import PerceptualDistance, perceptual_distance
from recon_torch.losses.metrics import psnr, silhouette_iou, ssim
from recon_torch.losses.pixel import l1_loss, mask_loss, rgb_loss
from recon_torch.losses.ssim import ms_ssim
from recon_torch.raster.rasterize import Render
from recon_torch.scene.nerf import RadianceField
from recon_torch.scene.splats import Splats
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras

if TYPE_CHECKING:
    from recon_torch.scene import Scene

VIEW_STREAM, SCENE_STREAM, SETBACK_STREAM = 1, 2, 3  # what random numbers are for
TERMS = ("lpips", "ssim", "mask", "rgb", "l1")  # of the loss
SETBACK_RATE = 0.5  # of learning after a setback
VIEWS_AT_ONCE = 8  # bounds the memory of metrics
SMALLEST_SIDE_PX = 32  # of what the LPIPS networks can pool
RANDOM_LPIPS_STAGES = 3  # five cost 2.5 times as much and give the same PSNR and SSIM on held-out views


class Fit:
    """The state of one optimisation of a scene, and what it has been given.

    Attributes:
        scene: what is optimised, of the kind that `settings.representation` names.
        step: steps done so far.
        notes: what a report should say about this fit.
        weights: of the terms of the loss. LPIPS without trained weights has 0, unless settings ask for it.
        setbacks: why `recon_torch.fit.recovery` took it back to an earlier state, each time.
        caution: how often the learning rates were halved, and the random numbers changed, because of that.
    """

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device | str | None = None):
        """Raises UserError for views that are too small, and for settings of LPIPS that cannot be had."""
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
        self.weights = {name: getattr(settings, f"w_{name}") for name in TERMS}
        if self._perceptual.random_weights:
            self.notes.append(f"LPIPS runs on {settings.lpips_net} with random weights")
            if settings.lpips_weights != "random" and settings.w_lpips > 0:
                self.weights["lpips"] = 0.0
                self.notes[-1] += ": a score, no term of the loss"
        dtype = _lpips_dtype(settings, self.device)
        self._lpips = self._perceptual.rounded(dtype, _lpips_stages(settings, self._perceptual))
        self.scene = _new_scene(cameras, settings, self.device)

    @property
    def num_gaussians(self) -> int:
        return self.scene.num_gaussians

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
        self._target_features: list[Tensor] | None = None
        if self.step == 0:
            notes = self.scene.start_on(self._masks)
            self.notes += [note for note in notes if note not in self.notes]

    @property
    def targets(self) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"]]:
        """The views and masks that are fitted."""
        return self._views, self._masks

    def run(self, until_step: int, on_step: Callable[[int, dict[str, Tensor]], None] | None = None) -> None:
        """Optimises to the given step; on_step gets the steps done and the step's losses (unweighted)."""
        run_together([self], until_step, on_step and (lambda fit, losses: on_step(fit.step, losses)))

    def _choose_views(self) -> Int64[np.ndarray, " V"]:
        """The step's views: the next ones of an endless row of shuffles, so each is seen equally often."""
        num_views, count = len(self.cameras), self.settings.views_per_step
        chosen = []
        for index in range(self.step * count, (self.step + 1) * count):
            epoch, place = divmod(index, num_views)
            shuffle = np.random.default_rng([self._seed, VIEW_STREAM, epoch]).permutation(num_views)
            chosen.append(shuffle[place])
        return np.array(chosen)

    @property
    def _seed(self) -> int:
        seed = self.settings.seed
        return fold_in(seed, SETBACK_STREAM, self.caution) if self.caution else seed

    @property
    def _seed_of_scene(self) -> int:
        """Of what the scene draws at random in this step."""
        return fold_in(self._seed, SCENE_STREAM, self.step)

    def _features_of(self, chosen: Int64[np.ndarray, " V"]) -> list[Tensor]:
        """LPIPS's of the views."""
        if self._target_features is None:
            with torch.no_grad():
                parts = [self._lpips.features(part) for part in self._views.split(VIEWS_AT_ONCE)]
            self._target_features = [torch.cat(stage) for stage in zip(*parts, strict=True)]
        if len(chosen) == 1:  # a slice costs no copy of these large arrays
            return [stage.narrow(0, int(chosen[0]), 1) for stage in self._target_features]
        return [stage[torch.from_numpy(chosen)] for stage in self._target_features]

    def _update(self, info: dict[str, Any]) -> None:
        """What a step does after the backward pass."""
        share = SETBACK_RATE**self.caution
        rates = self.scene.rates(min(self.step / self.settings.num_steps, 1.0))
        self.scene.parameters.step({name: rate * share for name, rate in rates.items()})
        self.scene.refine(self.step, info, self._seed_of_scene)
        self.step += 1

    @torch.no_grad()
    def render(self, cameras: Cameras) -> Render:
        """The object as it is now, over the settings' background."""
        (render,) = self.scene.render_together([self.scene], [cameras], [None])
        return render

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
        state = {"step": self.step, "caution": self.caution, "setbacks": list(self.setbacks)}
        return state | self.scene.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()` of a fit with the same settings and cameras.

        Where `caution` or `max_gaussians` were changed in it, the learning rates and the number of Gaussians
        (the faintest go) follow.
        """
        self.step, self.caution, self.setbacks = state["step"], state["caution"], list(state["setbacks"])
        self.scene.load_state_dict(state)


def run_together(
    fits: Sequence[Fit],
    until_step: int,
    on_step: Callable[[Fit, dict[str, Tensor]], None] | None = None,
) -> None:
    """Optimises several fits to the given step: each ends as it would alone, up to rounding.

    A step renders all of them in one call on a GPU, and has one pass of LPIPS and MS-SSIM for all.

    Args:
        fits: on one device, with views of one size and settings that differ in seeds at most.
        on_step: gets a fit after each of its steps, and the step's losses (unweighted).

    Raises:
        ValueError: fits that do not go together.
        FloatingPointError, NoGaussiansLeft: in one of the fits; the others may be a step ahead or not.
    """
    _check_alike(fits)
    while behind := [fit for fit in fits if fit.step < until_step]:
        for fit, losses in zip(behind, _step_together(behind), strict=True):
            if on_step is not None:
                on_step(fit, losses)


def _check_alike(fits: Sequence[Fit]) -> None:
    def kind(fit: Fit) -> tuple:
        settings = dataclasses.replace(fit.settings, seed=0)
        return fit.cameras.width, fit.cameras.height, fit.device, settings

    for fit in fits[1:]:
        if kind(fit) != kind(fits[0]):
            raise ValueError(f"fits that differ do not run together: {kind(fit)} and {kind(fits[0])}")


def _step_together(fits: Sequence[Fit]) -> list[dict[str, Tensor]]:
    settings = fits[0].settings
    chosen = [fit._choose_views() for fit in fits]
    renders = fits[0].scene.render_together(
        [fit.scene for fit in fits],
        [fit.cameras[views] for fit, views in zip(fits, chosen, strict=True)],
        [fit._seed_of_scene for fit in fits],
    )
    losses = _losses(fits, renders, chosen)
    totals = sum(fits[0].weights[name] * loss for name, loss in losses.items())
    for fit, render in zip(fits, renders, strict=True):
        fit.scene.watch(fit.step, render.info)
    totals.sum().backward()
    if fits[0].step % settings.refine_every == 0 and not torch.isfinite(totals).all():
        raise FloatingPointError(f"the loss is {totals.sum().item()} at step {fits[0].step}")
    for fit, render in zip(fits, renders, strict=True):
        fit._update(render.info)
    losses = {name: loss.detach() for name, loss in losses.items()} | {"loss": totals.detach()}
    return [{name: loss[index] for name, loss in losses.items()} for index in range(len(fits))]


def _losses(
    fits: Sequence[Fit], renders: Sequence[Render], chosen: Sequence[Int64[np.ndarray, " V"]]
) -> dict[str, Float[Tensor, " B"]]:
    """The terms of the loss that have a weight, for each of B fits with V views."""
    settings, lpips = fits[0].settings, fits[0]._lpips
    rgb, alpha = _join([render.rgb for render in renders]), _join([render.alpha for render in renders])
    pairs = list(zip(fits, chosen, strict=True))
    views = _join([fit._views[torch.from_numpy(which)] for fit, which in pairs])
    masks = _join([fit._masks[torch.from_numpy(which)] for fit, which in pairs])

    def features() -> list[Tensor]:
        stages = zip(*(fit._features_of(which) for fit, which in pairs), strict=True)
        return [_join(stage) for stage in stages]

    terms = {
        "lpips": lambda: lpips.distance(rgb, features()),
        "ssim": lambda: 1 - ms_ssim(rgb, views),
        "mask": lambda: mask_loss(alpha, masks),
        "rgb": lambda: rgb_loss(rgb, views),
        "l1": lambda: l1_loss(rgb, alpha, views, masks, settings.background),
    }
    return {name: terms[name]().view(len(fits), -1).mean(1) for name in TERMS if fits[0].weights[name] > 0}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _new_scene(cameras: Cameras, settings: FitSettings, device: torch.device) -> Scene:
    if settings.representation == "nerf":
        return RadianceField(settings, device)
    return Splats(cameras, settings, device)


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
