"""A radiance field instead of Gaussians (Mildenhall et al. 2020): the last row of the paper's Table 2.

Unspecified in the paper: which field. Here: density and colour on a dense grid with its coarser octaves added
(so that large parts form first, and quickly), because one object needs no hashing, and this runs wherever
PyTorch does. Colour does not depend on the view, like that of the Gaussians.

Each ray is cut into equal pieces inside a ball, and each piece is sampled at one point: a random one while
the field is fitted, its middle otherwise.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recon_torch.files import replacing, sort_safetensors_header
from recon_torch.raster import Render
from recon_torch.scene.parameters import Parameters
from recon_torch.settings import FitSettings, MeshSettings
from recon_torch.views import axes
from recon_torch.views.axes import Axes
from recon_torch.views.cameras import Cameras
from recon_torch.views.world import World

RADIUS = 0.55  # a field is empty outside the ball of this radius, which is also half the grid's width
OCTAVES = (4, 2, 1)  # what the number of cells is divided by
INITIAL_DENSITY = -6.0  # before softplus; a ray through the middle then loses a seventh of its light
RAYS_AT_ONCE = 2**15  # bounds the memory; where there are more, they are marched again for the gradient
FINAL_RATE = 0.1  # the last learning rate as a share of the first


class Rays(NamedTuple):
    """R rays: at depth t (camera z) each is at origin + t * direction, inside the ball from near to far."""

    origins: Float[Tensor, "R 3"]
    directions: Float[Tensor, "R 3"]
    near: Float[Tensor, " R"]
    far: Float[Tensor, " R"]


class RadianceField:
    """A `Scene` on a grid that is the sum of octaves. Nothing is ever added to it or dropped."""

    num_gaussians = 0

    def __init__(self, settings: FitSettings, device: torch.device):
        self.settings, self.device = settings, device
        sides = [settings.nerf_cells // octave for octave in OCTAVES]
        empty = {f"octave_{side}": torch.zeros(1, 4, side, side, side) for side in sides}
        self.parameters = Parameters(empty, device)

    def start_on(self, masks: Float[Tensor, "K H W 1"] | None) -> list[str]:
        """See `Scene`. A field starts as a thin fog everywhere, whatever the masks are."""
        return ["a radiance field fits in no asset.ply: it is in asset.safetensors"]

    def rates(self, progress: float) -> dict[str, float]:
        return dict.fromkeys(self.parameters.tensors, self.settings.lr_nerf * FINAL_RATE**progress)

    @classmethod
    def render_together(
        cls, scenes: Sequence[RadianceField], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """See `Scene`. The seeds are those of the points at which rays are sampled."""
        return [scene.render(rig, seed) for scene, rig, seed in zip(scenes, cameras, seeds, strict=True)]

    def penalty(self, info: dict[str, Any]) -> float:
        return 0.0

    def watch(self, step: int, info: dict[str, Any]) -> None:
        pass

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        pass

    def limit(self, max_gaussians: int) -> None:
        pass

    def render(self, cameras: Cameras, seed: int | None) -> Render:
        """See `render_together`."""
        field, num_samples = self.field(), self.settings.nerf_samples
        background = torch.full((3,), self.settings.background, device=self.device)
        rays, hit = cast_rays(cameras, self.device)
        jitter = torch.full((len(rays.near), num_samples), 0.5)
        if seed is not None:
            jitter = torch.rand(jitter.shape, generator=torch.Generator().manual_seed(seed))
        split = [each.split(RAYS_AT_ONCE) for each in (*rays, jitter.to(self.device))]
        parts = [(Rays(*some), share) for *some, share in zip(*split, strict=True)]
        once = march if len(parts) == 1 else functools.partial(checkpoint, march, use_reentrant=False)
        marched = [once(field, *part) for part in parts]
        rgb, alpha, depth = (torch.cat(each) for each in zip(*marched, strict=True))
        shape = (len(cameras), cameras.height, cameras.width)

        def image(values: Tensor) -> Tensor:
            return values.new_zeros(hit.numel(), values.shape[-1]).index_put((hit.nonzero()[:, 0],), values)

        alpha_image = image(alpha)
        rgb_image = image(rgb) + (1 - alpha_image) * background
        return Render(
            rgb=rgb_image.view(*shape, 3),
            alpha=alpha_image.view(*shape, 1),
            depth=image(depth).view(*shape, 1),
            info={},
        )

    def field(self) -> Float[Tensor, "1 4 n n n"]:
        """The sum of the octaves at the points of the finest: density, red, green, blue, each by z, y, x."""
        coarsest, *finer = self.parameters.tensors.values()
        field: Tensor = coarsest
        for octave in finer:
            size = octave.shape[2:]
            field = octave + F.interpolate(field, size, mode="trilinear", align_corners=True)
        return field

    def save(
        self,
        path: str | os.PathLike,
        world: World | None = None,
        file_axes: Axes = axes.UPRIGHT,
        *,
        up: Float[np.ndarray, "3"] = axes.UP,
        mesh: MeshSettings | None = None,
    ) -> Path:
        """See `Scene`. A .safetensors holds the grid "field" [4,n,n,n]; its metadata say how to read it.

        It has the axes of the world, as no viewer shows it.
        """
        path = Path(path).with_suffix(".safetensors")
        scale, center = (world.scale, list(map(float, world.center))) if world else (1.0, [0.0] * 3)
        unit = _density_unit(self.settings.nerf_cells) * scale
        metadata = {
            "center": json.dumps(center),
            "half_width": json.dumps(RADIUS / scale),
            "density_per_unit": f"softplus(field[0] + {INITIAL_DENSITY}) * {unit}",
            "rgb": "sigmoid(field[1:4])",
            "interpolation": "trilinear before either; outermost points on the faces; empty outside the ball",
        }
        with torch.no_grad(), replacing(path) as temporary:
            save_file({"field": self.field()[0].cpu().contiguous()}, temporary, metadata)
            sort_safetensors_header(temporary)
        return path

    @torch.no_grad()
    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        cell = 2 * half_width / num_cells
        ticks = (torch.arange(num_cells, device=self.device) + 0.5) * cell - half_width
        points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).view(1, -1, 3)
        density, _ = evaluate(self.field(), points)
        inside = points.norm(dim=-1) < RADIUS
        return (1 - torch.exp(-density * inside * cell)).view(num_cells, num_cells, num_cells)

    def state_dict(self) -> dict[str, Any]:
        return self.parameters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parameters = Parameters.from_state_dict(state, self.device)


def cast_rays(cameras: Cameras, device: torch.device | str = "cpu") -> tuple[Rays, Tensor]:
    """The rays through the centres of pixels that meet the ball, and whether each of K*H*W pixels does."""
    w2c = torch.from_numpy(cameras.w2c).to(device)
    inverse = torch.linalg.inv(torch.from_numpy(cameras.intrinsics_px).to(w2c))
    rows, columns = (torch.arange(size, device=device) + 0.5 for size in (cameras.height, cameras.width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)
    rotation = w2c[:, :3, :3]
    directions = pixels @ inverse.mT @ rotation
    origins = (-rotation.mT @ w2c[:, :3, 3:]).mT.expand_as(directions)
    a, b = directions.square().sum(-1), (origins * directions).sum(-1)
    root = b.square() - a * (origins.square().sum(-1) - RADIUS**2)
    half = root.clamp_min(0).sqrt()
    near, far = ((-b - half) / a).clamp_min(0), (-b + half) / a
    hit = ((root > 0) & (far > near)).flatten()
    rays = (origins.flatten(0, 1), directions.flatten(0, 1), near.flatten(), far.flatten())
    return Rays(*(each[hit] for each in rays)), hit


def march(
    field: Float[Tensor, "1 4 n n n"], rays: Rays, jitter: Float[Tensor, "R S"]
) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """Colour times alpha, alpha, and expected depth of rays.

    jitter: where each of S pieces of a ray is sampled, from 0 (its near end) to 1.
    """
    origins, directions, near, far = rays
    step = (far - near) / jitter.shape[-1]
    depth = near[:, None] + (torch.arange(jitter.shape[-1], device=near.device) + jitter) * step[:, None]
    points = origins[:, None] + depth[..., None] * directions[:, None]
    density, color = evaluate(field, points)
    weights = absorb(density * (step * directions.norm(dim=-1))[:, None])
    alpha = weights.sum(-1, keepdim=True)
    rgb = (weights[..., None] * color).sum(1)
    return rgb, alpha, (weights * depth).sum(-1, keepdim=True) / alpha.clamp_min(1e-6)


def absorb(optical_depth: Float[Tensor, "R S"]) -> Float[Tensor, "R S"]:
    """The share of a ray's light that ends in each piece: exp(-depths before) (1 - exp(-own depth))."""
    before = optical_depth.cumsum(-1) - optical_depth
    return torch.exp(-before) * -torch.expm1(-optical_depth)


def evaluate(
    field: Float[Tensor, "1 4 n n n"], points: Float[Tensor, "R S 3"]
) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R S 3"]]:
    """Density, per unit of length, and RGB at points.

    Softplus and sigmoid are taken after the interpolation, so that surfaces can be sharp within a cell.
    """
    values = F.grid_sample(field, points[None, None] / RADIUS, padding_mode="border", align_corners=True)[
        0, :, 0
    ]
    density = F.softplus(values[0] + INITIAL_DENSITY) * _density_unit(field.shape[-1])
    return density, values[1:].sigmoid().permute(1, 2, 0)


def _density_unit(num_cells: int) -> float:
    """The density at which a cell takes 1 - 1/e of the light."""
    return (num_cells - 1) / (2 * RADIUS)
