"""The 3DGS recipe as in gsplat's trainer, on this project's rasteriser: what the fit is compared with.

L1 + 0.2 D-SSIM, densification at gsplat's default thresholds and times, grey spheres at random points. It
gets the number of Gaussians, steps and learning rates of the fit: gsplat's rates are for 30,000 steps.
"""

from __future__ import annotations

import numpy as np
import torch
from gsplat import DefaultStrategy

from recon_torch.losses.metrics import ssim
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.scene.splats import PARAM_NAMES
from recon_torch.scene.start import init_ball
from recon_torch.settings import FitSettings
from recon_torch.views.directory import Views

D_SSIM_SHARE = 0.2  # Kerbl et al. 2023


def fit(views: Views, num_steps: int, seed: int = 0) -> Gaussians:
    """Gaussians fitted to one view of a random order per step."""
    torch.manual_seed(seed)
    settings = FitSettings(num_steps=num_steps)
    start = init_ball(settings.num_gaussians, settings.init_radius)
    params = {name: torch.nn.Parameter(value) for name, value in zip(PARAM_NAMES, start, strict=True)}
    optimizers = {
        name: torch.optim.Adam([param], lr=getattr(settings, f"lr_{name}"), eps=1e-15, fused=True)
        for name, param in params.items()
    }
    strategy = DefaultStrategy()
    state = strategy.initialize_state()
    for step in range(num_steps):
        index = _order(step // len(views), len(views), seed)[step % len(views), None]
        gaussians = Gaussians(*(params[name] for name in PARAM_NAMES))
        rgb, *_, info = render(gaussians, views.cameras[index], background=torch.ones(3))
        strategy.step_pre_backward(params, optimizers, state, step, info)
        _loss(rgb, torch.from_numpy(views.images[index])).backward()
        decay = (settings.lr_means_final / settings.lr_means) ** (step / num_steps)
        optimizers["means"].param_groups[0]["lr"] = settings.lr_means * decay
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        strategy.step_post_backward(params, optimizers, state, step, info)
    return Gaussians(*(params[name].detach() for name in PARAM_NAMES))


def _order(epoch: int, num_views: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_views)


def _loss(rgb: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    l1 = (rgb - target).abs().mean()
    return (1 - D_SSIM_SHARE) * l1 + D_SSIM_SHARE * (1 - ssim(rgb, target).mean())
