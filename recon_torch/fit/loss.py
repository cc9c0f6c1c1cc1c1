"""The loss of a fit (Sec. 3.3): 10 LPIPS + 0.2 (1 - MS-SSIM) + 1 mask loss + 5 L1, against its target views.

LPIPS is left out where it has no trained weights: with random ones it takes six sevenths of the time and
gains nothing (docs/quality.md).

Paper: there is no pixel loss. Here: there is an L1 loss, because true views of meshes from elsewhere then
agree better (docs/quality.md). `w_l1=0` is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.losses.lpips import PerceptualDistance, perceptual_distance
from recon_torch.losses.pixel import l1_loss, mask_loss, rgb_loss
from recon_torch.losses.ssim import ms_ssim
from recon_torch.settings import FitSettings, LpipsDtype

TERMS = ("lpips", "ssim", "mask", "rgb", "l1")
VIEWS_AT_ONCE = 8  # bounds the memory of features
RANDOM_LPIPS_STAGES = 3  # five cost 2.5 times as much and give the same PSNR and SSIM on held-out views


class Loss:
    """The terms of the loss and their weights.

    Attributes:
        weights: of each term. LPIPS without trained weights has 0, unless the settings ask for it.
        score: LPIPS with all stages in float32, for metrics; the loss may use fewer stages and bfloat16.
        notes: what a report should say about the loss.
    """

    def __init__(self, settings: FitSettings, device: torch.device):
        """Raises UserError for settings of LPIPS that cannot be had."""
        self.score = perceptual_distance(settings.lpips_net, settings.lpips_weights, device)
        self.weights = {name: getattr(settings, f"w_{name}") for name in TERMS}
        self.notes: list[str] = []
        if self.score.random_weights:
            self.notes.append(f"LPIPS runs on {settings.lpips_net} with random weights")
            if settings.lpips_weights != "random" and settings.w_lpips > 0:
                self.weights["lpips"] = 0.0
                self.notes[-1] += ": a score, no term of the loss"
        self._background = settings.background
        self._lpips = self.score.rounded(_lpips_dtype(settings, device), _lpips_stages(settings, self.score))

    @torch.no_grad()
    def features(self, views: Float[Tensor, "K H W 3"]) -> list[Tensor]:
        """What LPIPS compares renders of these views with: [K,C,h,w] of each of its stages."""
        parts = [self._lpips.features(part) for part in views.split(VIEWS_AT_ONCE)]
        return [torch.cat(stage) for stage in zip(*parts, strict=True)]

    def terms(
        self,
        rgb: Float[Tensor, "V H W 3"],
        alpha: Float[Tensor, "V H W 1"],
        views: Float[Tensor, "V H W 3"],
        opacity: Float[Tensor, "V H W 1"] | None,
        features: Callable[[], list[Tensor]],
    ) -> dict[str, Float[Tensor, " V"]]:
        """The terms that have a weight, unweighted, for each of V renders and its target view.

        Args:
            opacity: of the views, NaN where it is free; None for views without masks, where all of it is.
            features: gives `self.features(views)`; called only if LPIPS has a weight.
        """
        compute = {
            "lpips": lambda: self._lpips.distance(rgb, features()),
            "ssim": lambda: 1 - ms_ssim(rgb, views),
            "rgb": lambda: rgb_loss(rgb, views),
            "l1": lambda: l1_loss(rgb, alpha, views, opacity, self._background),
        }
        if opacity is not None:
            compute["mask"] = lambda: mask_loss(alpha, opacity)
        return {name: compute[name]() for name in TERMS if name in compute and self.weights[name] > 0}


class Targets:
    """The views that a fit follows, with their foreground masks and LPIPS features, on the fit's device.

    Attributes:
        masks: None where the views have none.
        weights: of each view in the loss; None where all have 1.
        opacity: what renders should be; the masks, or NaN where these are a guess.
    """

    def __init__(
        self,
        views: Float[Tensor, "K H W 3"],
        masks: Float[Tensor, "K H W 1"] | None,
        device: torch.device,
        features_of: Callable[[Float[Tensor, "K H W 3"]], list[Tensor]],
        weights: Sequence[float] | None = None,
        unsure: Bool[Tensor, "K H W 1"] | None = None,
    ):
        """Copies the tensors, which may be shared memory that is written again.

        features_of: `Loss.features`; called once, when features are first asked for.
        """
        self.views = views.to(device, torch.float32, copy=True)
        self.masks = None if masks is None else masks.to(device, torch.float32, copy=True)
        self.weights = None if weights is None else torch.tensor(list(weights), device=device)
        self.opacity = self.masks
        if self.masks is not None and unsure is not None:
            self.opacity = torch.where(unsure.to(device), torch.nan, self.masks)
        self._features_of = features_of
        self._features: list[Tensor] | None = None

    def take(
        self, chosen: Int64[np.ndarray, " V"]
    ) -> tuple[Float[Tensor, "V H W 3"], Float[Tensor, "V H W 1"] | None]:
        """The chosen views and their opacity."""
        index = torch.from_numpy(chosen)
        return self.views[index], None if self.opacity is None else self.opacity[index]

    def weights_of(self, chosen: Int64[np.ndarray, " V"]) -> Float[Tensor, " V"]:
        """The weights of the chosen views in the loss."""
        if self.weights is None:
            return torch.ones(len(chosen), device=self.views.device)
        return self.weights[torch.from_numpy(chosen)]

    def features(self, chosen: Int64[np.ndarray, " V"]) -> list[Tensor]:
        """The LPIPS features of the chosen views, one tensor [V,C,h,w] for each stage."""
        if self._features is None:
            self._features = self._features_of(self.views)
        if len(chosen) == 1:  # a slice needs no copy of these large arrays
            return [stage.narrow(0, int(chosen[0]), 1) for stage in self._features]
        return [stage[torch.from_numpy(chosen)] for stage in self._features]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first axis, without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def _lpips_stages(settings: FitSettings, lpips: PerceptualDistance) -> int:
    if settings.lpips_stages is None:
        return RANDOM_LPIPS_STAGES if lpips.random_weights else lpips.num_stages
    if not 1 <= settings.lpips_stages <= lpips.num_stages:
        raise UserError(
            f"lpips_stages is {settings.lpips_stages}; {settings.lpips_net} has 1 to {lpips.num_stages}"
        )
    return settings.lpips_stages


def _lpips_dtype(settings: FitSettings, device: torch.device) -> torch.dtype:
    """AUTO is bfloat16 where that takes half the time, since the fit ends as good."""
    if settings.lpips_dtype != LpipsDtype.AUTO:
        return getattr(torch, settings.lpips_dtype)
    # torch has a public name for this only since 2.10.
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001
    return torch.bfloat16 if fast else torch.float32
