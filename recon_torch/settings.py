"""The settings of a fit and of the verdict on it: `config.fit` and `config.gates`. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import re
from typing import Annotated, Any

from recon_torch.errors import UserError
from recon_torch.ranges import Positive, Range, Seed, Share, Steps, Weight, settings

UP_AXES = {
    **{"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)},
    **{"-x": (-1.0, 0.0, 0.0), "-y": (0.0, -1.0, 0.0), "-z": (0.0, 0.0, -1.0)},
}
SMALLEST_SIDE_PX = 32
"""The side of the smallest views that are fitted: the LPIPS networks cannot pool smaller ones."""

Gaussians = Annotated[int, Range(1, 10_000_000)]
Stages = Annotated[int, Range(1, 7)]
Rate = Annotated[float, Range(0, 10)]
Correlation = Annotated[float, Range(-1, 2)]  # above 1 for a gate that never passes


class Engine(enum.StrEnum):
    """What rasterises Gaussians; see `recon_torch.raster.render`."""

    AUTO = "auto"  # gsplat where the tensors are on a GPU, else cpu
    GSPLAT = "gsplat"
    CPU = "cpu"
    TORCH = "torch"


class LpipsNet(enum.StrEnum):
    """The network whose features LPIPS compares."""

    VGG = "vgg"
    ALEX = "alex"
    SQUEEZE = "squeeze"


class LpipsDtype(enum.StrEnum):
    """What the convolutions of LPIPS compute in."""

    AUTO = "auto"  # bfloat16 where it takes half the time, else float32
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Representation(enum.StrEnum):
    """What is fitted; see `recon_torch.scene`."""

    GAUSSIANS = "gaussians"
    NERF = "nerf"  # a radiance field, the last row of the paper's Table 2
    MESH = "mesh"  # a textured mesh by DMTet, see `recon_torch.scene.mesh`


class Start(enum.StrEnum):
    """Where Gaussians start; see `recon_torch.scene.start`."""

    HULL = "hull"  # in the part of the ball that is within the visual hull of the masks
    BALL = "ball"  # the paper's


@settings
class FitSettings:
    """How a scene is fitted. An enum may be given as its string; the settings then hold the enum.

    From the paper: 5000 Gaussians, 1200 steps, refinement every 50 steps, and the weights of LPIPS, SSIM and
    mask. The rest is unspecified in the paper.

    Learning rates are those of DreamGaussian, except that the means move three times and the scales twice as
    fast, which gives 0.4 dB more on held-out views.

    Raises:
        UserError: a value out of its range, a string that is none of an enum's, and a mesh where a package is
            missing or that is to be rendered by gsplat.
    """

    num_gaussians: Gaussians = 5000  # at the start
    num_steps: Steps = 1200
    views_per_step: Annotated[int, Range(1, 1024)] = 1
    init_radius: Annotated[float, Range(above=0, most=10)] = 0.5
    start: Start | str = Start.HULL

    w_lpips: Weight = 10.0
    w_ssim: Weight = 0.2
    w_mask: Weight = 1.0
    w_rgb: Weight = 0.0  # Table 2's ablation sets this and w_lpips=0
    w_l1: Weight = 5.0  # 0 in the paper
    lpips_net: LpipsNet | str = LpipsNet.VGG
    lpips_stages: Stages | None = None  # how many of the first ones; None: all, or 3 where weights are random
    lpips_weights: str = "auto"  # a file, "random", or "auto": torchvision's cache, else a loss without LPIPS
    lpips_dtype: LpipsDtype | str = LpipsDtype.AUTO  # for the loss; metrics are computed in float32
    background: Share = 1.0  # grey level behind the views

    lr_means: Annotated[float, Range(above=0, most=10)] = 3e-3
    lr_means_final: Rate = 6e-5
    lr_sh0: Rate = 1e-2
    lr_opacities: Rate = 5e-2
    lr_scales: Rate = 1e-2
    lr_quats: Rate = 5e-3

    refine_every: Steps = 50
    refine_until: Share = 0.8  # share of the steps, so that what was added last has time to settle
    grow_grad2d: Weight = 0.0014  # for views of 128 px; falls with the square root of their size
    grow_scale3d: Weight = 0.005  # larger Gaussians are split, smaller ones are doubled
    prune_opacity: Share = 0.03  # at 0.01 (DreamGaussian) a haze of faint Gaussians stays around the object
    prune_unseen: Share = 0.06  # Gaussians that fill fewer pixels than this share of the mean; 0 in the paper
    max_gaussians: Gaussians = 20000
    zoomed: Annotated[float, Range(0, 0.2)] = (
        0.1  # share of late steps that see views enlarged; 0 in the paper
    )

    representation: Representation | str = Representation.GAUSSIANS
    nerf_cells: Annotated[int, Range(4, 512)] = 64  # along each side of its grid
    nerf_samples: Annotated[int, Range(2, 4096)] = 64  # along each ray
    lr_nerf: Rate = 0.2
    mesh_cells: Annotated[int, Range(4, 128)] = 36  # along each side of its lattice, each with 12 tetrahedra
    mesh_colors: Annotated[int, Range(8, 512)] = (
        96  # most cells along a side of the grid of colours, see `MeshScene`
    )
    lr_distances: Rate = 1e-3  # in units of the fit's world
    lr_shifts: Rate = 1e-2  # as a share of the largest shift
    lr_colors: Rate = 5e-2
    w_signs: Weight = 0.02  # of what keeps the surface from being where no view sees it
    w_area: Weight = 0.02  # of the surface's area, which flattens what no view sees
    w_bends: Weight = 0.05  # of the angles between neighbouring triangles

    engine: Engine | str = Engine.AUTO
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.representation == Representation.MESH:
            _check_mesh_packages("representation")
            if self.engine == Engine.GSPLAT:
                raise UserError("engine: gsplat renders Gaussians, and no mesh; make it auto")


class FileAxes(enum.StrEnum):
    """Which way the axes of an asset's file point; see `recon_torch.views.axes`."""

    UPRIGHT = "upright"  # the object stands and shows its front in public viewers, which take -Y as up
    WORLD = "world"  # those of the cameras beside it


class Format(enum.StrEnum):
    """A format of splats beside the .ply of 3DGS; see `recon_torch.formats`."""

    COMPRESSED_PLY = "compressed.ply"  # SuperSplat's
    SPZ = "spz"  # Niantic's version 3
    SPZ4 = "spz4"  # its version 4, which is another container in a file of the same suffix
    SOG = "sog"  # PlayCanvas's
    SPLAT = "splat"  # antimatter15's
    KSPLAT = "ksplat"  # mkkellogg's
    GLB = "glb"  # glTF's KHR_gaussian_splatting
    USDZ = "usdz"  # OpenUSD's ParticleField3DGaussianSplat
    USDA = "usda"

    @property
    def suffix(self) -> str:
        """Of files in this format."""
        return ".spz" if self == Format.SPZ4 else f".{self}"

    @property
    def package(self) -> str:
        """The module of the extra "export" that reads and writes it; "" for none."""
        if self == Format.GLB:
            return ""
        return "pxr" if self in (Format.USDZ, Format.USDA) else "gaussforge"


EXPORTED = "|".join(sorted({re.escape(each.suffix[1:]) for each in Format}))
"""The suffixes of all formats as a regular expression, for the files of a command."""


MESH_PATHS = (r"mesh\.(glb|obj|mtl|png|ply|usdc)", r"mesh\.json")
"""What a mesh is written to, as `outputs.Kind` takes it."""

MESH_PACKAGES = ("skimage", "fast_simplification", "manifold3d", "xatlas", "trimesh")
"""The modules of the extra "mesh"."""


@settings
class ExportSettings:
    """As which files an asset is written (`config.export`).

    Attributes:
        axes: of asset.ply, see `FileAxes`; our readers undo it.
        formats: further files beside asset.ply, each read back and compared; they need the extra "export".
        page: whether to write asset.html, which shows the asset in a browser, see `recon_torch.page`.
        mesh: whether to write a textured mesh, see `MeshSettings`.

    Raises UserError for two formats with one suffix, such as spz and spz4, and where a package is missing.
    """

    axes: FileAxes | str = FileAxes.UPRIGHT
    formats: tuple[Format | str, ...] = ()
    page: bool = False
    mesh: bool = False

    def __post_init__(self) -> None:
        suffixes = [Format(each).suffix for each in self.formats]
        twice = sorted({each for each in suffixes if suffixes.count(each) > 1})
        if twice:
            raise UserError(f"formats has {', '.join(self.formats)}, of which two write asset{twice[0]}")
        for each in map(Format, self.formats):
            if each.package and importlib.util.find_spec(each.package) is None:
                raise UserError(f'formats: {each} needs {each.package}; pip install "im3d[export]"')
        if self.mesh:
            _check_mesh_packages("mesh")


class MeshMethod(enum.StrEnum):
    """Where the surface of Gaussians is; see `recon_torch.mesh.making`."""

    OPACITY = "opacity"  # where their summed density has a level
    DEPTH = "depth"  # where their depth maps, fused, say so


class MeshFormat(enum.StrEnum):
    """Files that a mesh is written to; see `recon_torch.mesh.files`."""

    GLB = "glb"
    OBJ = "obj"
    PLY = "ply"
    USD = "usd"


@settings
class MeshSettings:
    """How a surface with a texture is made of Gaussians (`config.mesh`). Measured in docs/meshes.md.

    method: where the surface is.
    level: of the method's field, at which the surface is; None: 0.45 for the density of Gaussians, and -0.25
        truncation distances, which is a cell before the depth maps, for these.
    resolution: cells along the longest side of the grid.
    floaters: share of the area below which a piece that is apart is left out.
    triangles: the most that the mesh has.
    watertight: whether a mesh with holes is an error.
    texture: side of the square texture in pixels.
    formats: of the files.
    """

    method: MeshMethod | str = MeshMethod.OPACITY
    level: Annotated[float, Range(-1, 100)] | None = None
    resolution: Annotated[int, Range(16, 512)] = 192
    floaters: Share = 0.01
    triangles: Annotated[int, Range(4, 1_000_000)] = 20_000
    watertight: bool = False
    texture: Annotated[int, Range(16, 8192)] = 1024
    formats: tuple[MeshFormat | str, ...] = (MeshFormat.GLB,)


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


@settings
class GateSettings:
    """Thresholds of the quality gates, between what good fits and made-up failures measure (docs/gates.md).

    floaters, floaters_bad: share of the opacity in small pieces apart from the rest.
    floater_size: share of the opacity below which a piece is small; larger ones belong to the object.
    cell_opacity: share of a ray's light that a cell must take to count as matter.
    floor_area: area of a thin sheet below the object, whose ball has a cross-section of 0.79.
    floor_ratio: how many times as wide the sheet is as what stands on it.
    view_shape, view_psnr: least `shape_score`, and PSNR of the foreground in dB, of a render and its view.
    view_gap: by how many dB less than the median that PSNR is of views that stand out.
    views_bad: share of views that fail from which the verdict is bad instead of suspect.
    view_motion: by which share of the object's size the outlines of so many views may stick out of what the
        other views allow.
    janus_back, janus_gap: correlation of the back with the front, and by how much less that of the sides is.
    """

    floaters: Share = 0.01
    floaters_bad: Share = 0.05
    floater_size: Share = 0.1
    cell_opacity: Share = 0.1
    floor_area: Share = 0.35
    floor_ratio: Positive = 2.0
    view_shape: Correlation = 0.9
    view_psnr: Annotated[float, Range(0, 1000)] = 14.0
    view_gap: Positive = 11.0
    views_bad: Share = 0.25
    view_motion: Share = 0.022
    janus_back: Correlation = 0.8
    janus_gap: Correlation = 0.3


def _check_mesh_packages(setting: str) -> None:
    missing = [each for each in MESH_PACKAGES if importlib.util.find_spec(each) is None]
    if missing:
        raise UserError(f'{setting}: needs {", ".join(missing)}; pip install "im3d[mesh]"')


def plain(settings: Any) -> dict[str, Any]:
    """Settings as a config holds them: dictionaries, with strings in place of enums."""
    return _without_enums(dataclasses.asdict(settings))


def _without_enums(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_enums(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_without_enums, value))
    return str(value) if isinstance(value, enum.StrEnum) else value
