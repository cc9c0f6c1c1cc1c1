"""How a fit adds Gaussians and prunes faint ones: gsplat's densification with an upper limit."""

from __future__ import annotations

from gsplat import DefaultStrategy

from recon_torch.settings import FitSettings

THRESHOLD_SIZE_PX = 128  # size of the views for which `grow_grad2d` is meant


class CappedStrategy(DefaultStrategy):
    """gsplat's densification, up to a number of Gaussians.

    When there is not enough room for all that would be added, the largest gradients come first.
    """

    grow_grad2d: float
    max_gaussians: int

    def _grow_gs(self, params, optimizers, state, step) -> tuple[int, int]:
        places = self.max_gaussians - len(params["means"])
        if places <= 0:
            return 0, 0
        gradients = state["grad2d"] / state["count"].clamp_min(1)
        threshold = self.grow_grad2d
        if (gradients > threshold).sum() > places:
            self.grow_grad2d = gradients.topk(places + 1).values[-1].item()
        grown = super()._grow_gs(params, optimizers, state, step)
        self.grow_grad2d = threshold
        return grown

    @classmethod
    def of(cls, settings: FitSettings, size_px: float) -> CappedStrategy:
        """The paper's schedule: from the first step on, without resets of the opacity.

        size_px: of the views. With one threshold for all sizes, fits to larger views would end with fewer
            Gaussians and less detail.
        """
        strategy = cls(
            prune_opa=settings.prune_opacity,
            grow_grad2d=settings.grow_grad2d * (THRESHOLD_SIZE_PX / size_px) ** 0.5,
            grow_scale3d=settings.grow_scale3d,
            refine_start_iter=0,
            refine_stop_iter=round(settings.refine_until * settings.num_steps),
            refine_every=settings.refine_every,
            reset_every=settings.num_steps + 1,  # never, and with it no pruning by size
        )
        strategy.max_gaussians = settings.max_gaussians
        return strategy
