"""The settings of a fit and of the verdict on it: `config.fit` and `config.gates`. Without torch."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Literal

from recon_torch.errors import UserError, choice


class Engine(enum.StrEnum):
    """What rasterises Gaussians; see `recon_torch.raster.rasterize`."""

    AUTO = "auto"  # gsplat where the tensors are on a GPU, else cpu
    GSPLAT = "gsplat"
    CPU = "cpu"
    TORCH = "torch"


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
    start: Literal["hull", "ball"] = "hull"  # the masks' visual hull within the ball; the paper's is the ball

    w_lpips: float = 10.0
    w_ssim: float = 0.2
    w_mask: float = 1.0
    w_rgb: float = 0.0  # Table 2's ablation sets this and w_lpips=0
    w_l1: float = 5.0  # the paper's is 0
    lpips_net: str = "vgg"
    lpips_stages: int | None = None  # from the first; None: all, or 3 where the weights are random
    lpips_weights: str = "auto"  # a file, "random", or "auto": torchvision's cache, else a loss without LPIPS
    lpips_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the loss; metrics are float32
    background: float = 1.0  # grey level behind the views

    lr_means: float = 3e-3
    lr_means_final: float = 6e-5
    lr_sh0: float = 1e-2
    lr_opacities: float = 5e-2
    lr_scales: float = 1e-2
    lr_quats: float = 5e-3

    refine_every: int = 50
    refine_until: float = 0.8  # share of the steps, so that what was added last has time to settle
    grow_grad2d: float = 0.0014  # at 128 px; falls with the square root of the views' size
    grow_scale3d: float = 0.005  # what is larger is split, what is smaller doubled
    prune_opacity: float = 0.03  # at 0.01 (DreamGaussian) a haze of faint Gaussians stays around the object
    prune_unseen: float = 0.06  # what fills less pixels than this share of the mean; the paper's is 0
    max_gaussians: int = 20000

    representation: Literal["gaussians", "nerf"] = "gaussians"  # Table 2's last row is the other
    nerf_cells: int = 64  # along each side of its grid
    nerf_samples: int = 64  # along each of its rays
    lr_nerf: float = 0.2

    engine: Engine = Engine.AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in {"start": ("hull", "ball"), "representation": ("gaussians", "nerf")}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(choices)}")
        object.__setattr__(self, "engine", choice(Engine, self.engine, "engine"))


@dataclass(frozen=True)
class GateSettings:
    """Thresholds. Defaults: chosen between what good fits and made-up failures measure, see docs/gates.md.

    floaters, floaters_bad: share of the opacity in small pieces apart from the rest.
    floater_size: share below which such a piece is small; what is larger belongs to the object.
    cell_opacity: what a cell must take of a ray's light to count as matter.
    floor_area: of a thin sheet below the object, in squares of side 1 (the object's ball has 0.79).
    floor_ratio: and how much wider it is than what stands on it.
    view_shape, view_psnr: least `shape_score`, and PSNR of the foreground in dB, of a render and its view.
    views_bad: share of views that fail from which all of it is bad.
    janus_back, janus_gap: how like the front (correlation) the back is, and by how much less the sides are.
    """

    floaters: float = 0.01
    floaters_bad: float = 0.05
    floater_size: float = 0.1
    cell_opacity: float = 0.1
    floor_area: float = 0.35
    floor_ratio: float = 2.0
    view_shape: float = 0.9
    view_psnr: float = 14.0
    views_bad: float = 0.25
    janus_back: float = 0.8
    janus_gap: float = 0.3


def plain(settings: FitSettings | GateSettings) -> dict[str, Any]:
    """The settings as a config holds them: a dictionary with strings in place of enums."""
    values = dataclasses.asdict(settings)
    return {name: str(v) if isinstance(v, enum.StrEnum) else v for name, v in values.items()}
