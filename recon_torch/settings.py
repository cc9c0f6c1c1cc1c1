"""The settings of a fit and of the verdict on it: `config.fit` and `config.gates`. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from recon_torch.errors import choice


class Engine(enum.StrEnum):
    """What rasterises Gaussians; see `recon_torch.raster.render`."""

    AUTO = "auto"  # gsplat where the tensors are on a GPU, else cpu
    GSPLAT = "gsplat"
    CPU = "cpu"
    TORCH = "torch"


class LpipsDtype(enum.StrEnum):
    """What the convolutions of LPIPS compute in."""

    AUTO = "auto"  # bfloat16 where it takes half the time, else float32
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Representation(enum.StrEnum):
    """What is fitted; see `recon_torch.scene`."""

    GAUSSIANS = "gaussians"
    NERF = "nerf"  # a radiance field, the last row of the paper's Table 2


class Start(enum.StrEnum):
    """Where Gaussians start; see `recon_torch.scene.start`."""

    HULL = "hull"  # in the part of the ball that is within the visual hull of the masks
    BALL = "ball"  # the paper's


@dataclass(frozen=True)
class FitSettings:
    """How a scene is fitted. An enum may be given as its string; the settings then hold the enum.

    From the paper: 5000 Gaussians, 1200 steps, refinement every 50 steps, and the weights of LPIPS, SSIM and
    mask. The rest is unspecified in the paper.

    Learning rates are those of DreamGaussian, except that the means move three times and the scales twice as
    fast, which gives 0.4 dB more on held-out views.

    Raises:
        UserError: a string that is none of an enum's.
    """

    num_gaussians: int = 5000  # at the start
    num_steps: int = 1200
    views_per_step: int = 1
    init_radius: float = 0.5
    start: Start | str = Start.HULL

    w_lpips: float = 10.0
    w_ssim: float = 0.2
    w_mask: float = 1.0
    w_rgb: float = 0.0  # Table 2's ablation sets this and w_lpips=0
    w_l1: float = 5.0  # 0 in the paper
    lpips_net: str = "vgg"
    lpips_stages: int | None = None  # how many of the first ones; None: all, or 3 where weights are random
    lpips_weights: str = "auto"  # a file, "random", or "auto": torchvision's cache, else a loss without LPIPS
    lpips_dtype: LpipsDtype | str = LpipsDtype.AUTO  # for the loss; metrics are computed in float32
    background: float = 1.0  # grey level behind the views

    lr_means: float = 3e-3
    lr_means_final: float = 6e-5
    lr_sh0: float = 1e-2
    lr_opacities: float = 5e-2
    lr_scales: float = 1e-2
    lr_quats: float = 5e-3

    refine_every: int = 50
    refine_until: float = 0.8  # share of the steps, so that what was added last has time to settle
    grow_grad2d: float = 0.0014  # for views of 128 px; falls with the square root of their size
    grow_scale3d: float = 0.005  # larger Gaussians are split, smaller ones are doubled
    prune_opacity: float = 0.03  # at 0.01 (DreamGaussian) a haze of faint Gaussians stays around the object
    prune_unseen: float = 0.06  # Gaussians that fill fewer pixels than this share of the mean; 0 in the paper
    max_gaussians: int = 20000

    representation: Representation | str = Representation.GAUSSIANS
    nerf_cells: int = 64  # along each side of its grid
    nerf_samples: int = 64  # along each ray
    lr_nerf: float = 0.2

    engine: Engine | str = Engine.AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        enums = dict(start=Start, representation=Representation, lpips_dtype=LpipsDtype, engine=Engine)
        for name, kind in enums.items():
            object.__setattr__(self, name, choice(kind, getattr(self, name), name))


class Level(enum.StrEnum):
    """How much a finding of a quality gate speaks against an asset."""

    HINT = "hint"  # not at all; the asset may be meant so
    SUSPECT = "suspect"
    BAD = "bad"


class Verdict(enum.StrEnum):
    """What all findings amount to, from the best to the worst."""

    GOOD = "good"
    SUSPECT = "suspect"
    BAD = "bad"


@dataclass(frozen=True)
class GateSettings:
    """Thresholds of the quality gates, between what good fits and made-up failures measure (docs/gates.md).

    floaters, floaters_bad: share of the opacity in small pieces apart from the rest.
    floater_size: share of the opacity below which a piece is small; larger ones belong to the object.
    cell_opacity: share of a ray's light that a cell must take to count as matter.
    floor_area: area of a thin sheet below the object, whose ball has a cross-section of 0.79.
    floor_ratio: how many times as wide the sheet is as what stands on it.
    view_shape, view_psnr: least `shape_score`, and PSNR of the foreground in dB, of a render and its view.
    views_bad: share of views that fail from which the verdict is bad instead of suspect.
    janus_back, janus_gap: correlation of the back with the front, and by how much less that of the sides is.
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
