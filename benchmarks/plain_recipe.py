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
from recon_torch.raster.rasterize import rasterize
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
        render, info = _render(Gaussians(*(params[name] for name in PARAM_NAMES)), views, index)
        strategy.step_pre_backward(params, optimizers, state, step, info)
        _loss(render, torch.from_numpy(views.images[index])).backward()
        decay = (settings.lr_means_final / settings.lr_means) ** (step / num_steps)
        optimizers["means"].param_groups[0]["lr"] = settings.lr_means * decay
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        strategy.step_post_backward(params, optimizers, state, step, info)
    return Gaussians(*(params[name].detach() for name in PARAM_NAMES))


def _order(epoch: int, num_views: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_views)


def _render(gaussians: Gaussians, views: Views, index: np.ndarray) -> tuple[torch.Tensor, dict]:
    cameras = views.cameras[index]
    render = rasterize(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors,
        torch.from_numpy(cameras.w2c.astype(np.float32)),
        torch.from_numpy(cameras.intrinsics_px),
        cameras.width,
        cameras.height,
        background=torch.ones(3),
    )
    return render.rgb, render.info


def _loss(render: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    l1 = (render - target).abs().mean()
    return (1 - D_SSIM_SHARE) * l1 + D_SSIM_SHARE * (1 - ssim(render, target).mean())
