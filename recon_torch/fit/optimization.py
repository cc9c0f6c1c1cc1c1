"""The direct fit of a scene to views (Sec. 3.3, A.1): 5000 Gaussians, 1200 steps, densify and prune every 50.

The views may change in mid-fit: the method renders the fit, lets the video model mend the renders, and fits
on. Several fits may take their steps together; each ends as it would alone.

Every random choice is a pure function of (seed, step), so a fit restored from its snapshot goes on bit for
bit as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.fit.loss import Loss, Targets, join
from recon_torch.losses.metrics import psnr, silhouette_iou, ssim
from recon_torch.raster import Render
from recon_torch.scene import Scene, new_scene
from recon_torch.seeds import fold_in
from recon_torch.settings import SMALLEST_SIDE_PX, FitSettings
from recon_torch.views.cameras import Cameras

VIEW_STREAM, SCENE_STREAM, SETBACK_STREAM = 1, 2, 3  # what random numbers are for
SETBACK_RATE = 0.5  # by which a setback multiplies the learning rates
VIEWS_AT_ONCE = 8  # bounds the memory of metrics


class Fit:
    """One optimisation of a scene: its state and what it has been given.

    Attributes:
        scene: what is optimised, of the kind that `settings.representation` names.
        targets: the views that are fitted; `set_targets` makes them.
        loss: the terms of the loss and their weights.
        step: steps done so far.
        notes: what a report should say about this fit.
        setbacks: why `recon_torch.fit.recovery` took it back to an earlier state, each time.
        caution: how often such a setback has halved the learning rates and changed the random numbers.
    """

    targets: Targets

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device | str | None = None):
        """Raises UserError for views that are too small, and for settings of LPIPS that cannot be had."""
        self.cameras = cameras
        self.settings = settings
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.step = 0
        self.setbacks: list[str] = []
        self.caution = 0
        if min(cameras.width, cameras.height) < SMALLEST_SIDE_PX:
            raise UserError(
                f"views of {cameras.width}x{cameras.height} px are too small; give at least 32x32"
            )
        self.loss = Loss(settings, self.device)
        self.notes = list(self.loss.notes)
        self.scene: Scene = new_scene(cameras, settings, self.device)

    @property
    def num_gaussians(self) -> int:
        return self.scene.num_gaussians

    def set_targets(
        self,
        views: Float[Tensor, "K H W 3"],
        masks: Float[Tensor, "K H W 1"] | None,
        weights: Sequence[float] | None = None,
        unsure: Bool[Tensor, "K H W 1"] | None = None,
    ) -> None:
        """The views to fit from now on, composited on the settings' background, and their foreground masks.

        Without masks the views alone say what is opaque, and the scene starts in a ball.

        Args:
            weights: of each view in the loss; None: all have 1.
            unsure: the pixels whose mask is a guess; there the views alone say what is opaque.

        Raises:
            UserError: values that are not finite, no foreground in any view, or no masks for a mesh.
            ValueError: shapes that are not those of the cameras.
        """
        shape = (len(self.cameras), self.cameras.height, self.cameras.width)
        given = [views] if masks is None else [views, masks]
        if any(each.shape != (*shape, size) for each, size in zip(given, (3, 1), strict=False)):
            raise ValueError(f"views and masks {[tuple(each.shape) for each in given]} for cameras {shape}")
        finite = torch.stack([torch.isfinite(each).flatten(1).all(1) for each in given]).all(0)
        if not finite.all():
            bad = torch.nonzero(~finite)[:, 0].tolist()
            raise UserError(f"views {bad} or their masks have values that are not finite; make them anew")
        if masks is not None and masks.max() < 0.5:
            raise UserError("the masks of all views are empty: there is no foreground to fit")
        if weights is not None and len(weights) != len(self.cameras):
            raise ValueError(f"{len(weights)} weights for {len(self.cameras)} views")
        self.targets = Targets(views, masks, self.device, self.loss.features, weights, unsure)
        if self.step == 0:
            opacity = self.targets.opacity
            notes = self.scene.start_on(None if opacity is None else opacity.nan_to_num(1.0))
            self.notes += [note for note in notes if note not in self.notes]

    def run(self, until_step: int, on_step: Callable[[int, dict[str, Tensor]], None] | None = None) -> None:
        """Optimises to the given step; on_step gets the steps done and the step's losses (unweighted)."""
        run_together([self], until_step, on_step and (lambda fit, losses: on_step(fit.step, losses)))

    def views_of_step(self) -> Int64[np.ndarray, " V"]:
        """The views that the next step renders.

        They come from an endless row of shuffles of all views, so each view is seen equally often.
        """
        num_views, count = len(self.cameras), self.settings.views_per_step
        chosen = []
        for index in range(self.step * count, (self.step + 1) * count):
            epoch, place = divmod(index, num_views)
            shuffle = np.random.default_rng([self._seed, VIEW_STREAM, epoch]).permutation(num_views)
            chosen.append(shuffle[place])
        return np.array(chosen)

    @property
    def scene_seed(self) -> int:
        """The seed of what the scene draws at random in the next step."""
        return fold_in(self._seed, SCENE_STREAM, self.step)

    @property
    def _seed(self) -> int:
        seed = self.settings.seed
        return fold_in(seed, SETBACK_STREAM, self.caution) if self.caution else seed

    def finish_step(self, info: dict[str, Any]) -> None:
        """What a step does after the backward pass of the render that gave `info`."""
        share = SETBACK_RATE**self.caution
        rates = self.scene.rates(min(self.step / self.settings.num_steps, 1.0))
        self.scene.parameters.step({name: rate * share for name, rate in rates.items()})
        self.scene.refine(self.step, info, self.scene_seed)
        self.step += 1

    def slow_down(self, caution: int) -> None:
        """Goes on with other random numbers, at learning rates that are halved `caution` times in all."""
        self.caution = caution

    def limit(self, max_gaussians: int) -> None:
        """Goes on with at most so many Gaussians; the faintest of those that are too many are dropped."""
        self.scene.limit(max_gaussians)

    @torch.no_grad()
    def render(self, cameras: Cameras) -> Render:
        """The object as it is now, over the settings' background."""
        (render,) = self.scene.render_together([self.scene], [cameras], [None])
        return render

    def metrics(self) -> dict[str, float]:
        """`compare` with the targets."""
        return self.compare(self.cameras, self.targets.views, self.targets.masks)

    @torch.no_grad()
    def compare(
        self, cameras: Cameras, views: Float[Tensor, "K H W 3"], masks: Float[Tensor, "K H W 1"] | None
    ) -> dict[str, float]:
        """Agreement of renders with views, as means over the views.

        Returns psnr in dB, ssim and lpips, and where there are masks, psnr_foreground and silhouette_iou.
        """
        rows = []
        for part in torch.arange(len(cameras)).split(VIEWS_AT_ONCE):
            render = self.render(cameras[part.numpy()])
            rgb, view = render.rgb.clamp(0, 1), views[part].to(self.device)
            scores = {
                "psnr": psnr(rgb, view),
                "ssim": ssim(rgb, view),
                "lpips": self.loss.score.distance(rgb, self.loss.score.features(view)),
            }
            if masks is not None:
                mask = masks[part].to(self.device)
                scores["psnr_foreground"] = psnr(rgb, view, mask)
                scores["silhouette_iou"] = silhouette_iou(render.alpha, mask)
            rows.append(scores)
        return {name: torch.cat([row[name] for row in rows]).nanmean().item() for name in rows[0]}

    def state_dict(self) -> dict[str, Any]:
        """All but settings, cameras and targets, as tensors and numbers: torch.load needs no pickle."""
        state = {"step": self.step, "caution": self.caution, "setbacks": list(self.setbacks)}
        return state | self.scene.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a `state_dict()` of a fit with the same settings and cameras."""
        self.step, self.caution, self.setbacks = state["step"], state["caution"], list(state["setbacks"])
        self.scene.load_state_dict(state)


def run_together(
    fits: Sequence[Fit],
    until_step: int,
    on_step: Callable[[Fit, dict[str, Tensor]], None] | None = None,
) -> None:
    """Optimises several fits to the given step: each ends as it would alone, up to rounding.

    Args:
        fits: on one device, with views of one size and settings that differ in seeds at most.
        on_step: gets a fit after each of its steps, and the step's losses (unweighted).

    Raises:
        ValueError: fits that do not go together.
        FloatingPointError, NoGaussiansLeft: in one of the fits; the others may be a step ahead or not.
    """
    _check_alike(fits)
    while behind := [fit for fit in fits if fit.step < until_step]:
        for fit, losses in zip(behind, step_together(behind), strict=True):
            if on_step is not None:
                on_step(fit, losses)


def step_together(fits: Sequence[Fit]) -> list[dict[str, Float[Tensor, ""]]]:
    """One step of fits that go together. Returns the losses of each (unweighted), and their weighted "loss".

    All scenes are rendered in one call on a GPU, and there is one pass of LPIPS and MS-SSIM for all.
    """
    chosen = [fit.views_of_step() for fit in fits]
    renders = fits[0].scene.render_together(
        [fit.scene for fit in fits],
        [fit.cameras[views] for fit, views in zip(fits, chosen, strict=True)],
        [fit.scene_seed for fit in fits],
    )
    losses = _losses(fits, renders, chosen)
    totals = sum(fits[0].loss.weights[name] * loss for name, loss in losses.items())
    for fit, render in zip(fits, renders, strict=True):
        fit.scene.watch(fit.step, render.info)
    own = sum(fit.scene.penalty(render.info) for fit, render in zip(fits, renders, strict=True))
    (totals.sum() + own).backward()
    if fits[0].step % fits[0].settings.refine_every == 0 and not torch.isfinite(totals).all():
        raise FloatingPointError(f"the loss is {totals.sum().item()} at step {fits[0].step}")
    for fit, render in zip(fits, renders, strict=True):
        fit.finish_step(render.info)
    losses = {name: loss.detach() for name, loss in losses.items()} | {"loss": totals.detach()}
    return [{name: loss[index] for name, loss in losses.items()} for index in range(len(fits))]


def _losses(
    fits: Sequence[Fit], renders: Sequence[Render], chosen: Sequence[Int64[np.ndarray, " V"]]
) -> dict[str, Float[Tensor, " B"]]:
    """The terms of the loss that have a weight, for each of B fits with V views."""
    pairs = [(fit.targets, views) for fit, views in zip(fits, chosen, strict=True)]
    taken = [targets.take(which) for targets, which in pairs]
    views = join([view for view, _ in taken])
    opacity = [each for _, each in taken if each is not None]

    def features() -> list[Tensor]:
        stages = zip(*(targets.features(which) for targets, which in pairs), strict=True)
        return [join(stage) for stage in stages]

    rgb, alpha = join([render.rgb for render in renders]), join([render.alpha for render in renders])
    terms = fits[0].loss.terms(rgb, alpha, views, join(opacity) if opacity else None, features)
    if any(targets.weights is not None for targets, _ in pairs):
        weights = join([targets.weights_of(which) for targets, which in pairs])
        terms = {name: weights * values for name, values in terms.items()}
    return {name: values.view(len(fits), -1).mean(1) for name, values in terms.items()}


def _check_alike(fits: Sequence[Fit]) -> None:
    def kind(fit: Fit) -> tuple:
        settings = dataclasses.replace(fit.settings, seed=0)
        return fit.cameras.width, fit.cameras.height, fit.device, settings

    for fit in fits[1:]:
        if kind(fit) != kind(fits[0]):
            raise ValueError(f"fits that differ do not run together: {kind(fit)} and {kind(fits[0])}")
        if (fit.targets.masks is None) != (fits[0].targets.masks is None):
            raise ValueError("fits with and without masks do not run together")
