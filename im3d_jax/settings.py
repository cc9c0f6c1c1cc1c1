"""The settings of making an asset, with their ranges: a class for each section of a config, without JAX or
torch.

A config is read once, where the model is loaded (`generator.load`, `pipeline.load`). All code below takes
these classes. `configs/base.py` takes its values from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from recon_torch.errors import UserError
from recon_torch.ranges import ElevationDeg, Pixels, Range, Share, settings
from recon_torch.settings import (
    SMALLEST_SIDE_PX,
    ExportSettings,
    FileAxes,
    FitSettings,
    GateSettings,
    MeshFormat,
    MeshSettings,
    Representation,
)

NumSteps = Annotated[int, Range(1, 10_000)]
Guidance = Annotated[float, Range(-1000, 1000)]
Scales = Guidance | tuple[Guidance, ...]


class Spacing(StrEnum):
    """How the noise levels of a run of the sampler are spread.

    With zero terminal SNR take one of the first two: "karras" then spends half its steps where x is all but
    noise. A schedule of flow matching takes "trailing" and the last three, each of which spreads the levels
    exactly as one scheduler of diffusers does; these differ most in the last level before the clean views.
    """

    TRAILING = "trailing"  # even in the training timestep, from the noisiest
    LINSPACE = "linspace"  # even in the training timestep, with both ends
    KARRAS = "karras"  # even in r^(1/7)
    FLOW_EULER = "flow_euler"  # FlowMatchEulerDiscreteScheduler: even between the shifted ends, then shifted
    FLOW_UNIPC = "flow_unipc"  # UniPCMultistepScheduler with use_flow_sigmas: even from 1 towards 1 / N
    FLOW_DPM = "flow_dpm"  # DPMSolverMultistepScheduler with use_flow_sigmas: even from 1 - 1 / N to 0

    @property
    def is_of_flow(self) -> bool:
        return self in (Spacing.FLOW_EULER, Spacing.FLOW_UNIPC, Spacing.FLOW_DPM)


class Solver(StrEnum):
    """DPM-Solver++ of first or second order, for the ODE or the SDE, and UniPC of second order."""

    ODE_1 = "1"
    ODE_2M = "2m"
    SDE_1 = "sde_1"
    SDE_2M = "sde_2m"
    UNIPC = "unipc"

    @property
    def draws_noise(self) -> bool:
        return self in (Solver.SDE_1, Solver.SDE_2M)

    @property
    def is_second_order(self) -> bool:
        return self in (Solver.ODE_2M, Solver.SDE_2M, Solver.UNIPC)

    @property
    def corrects(self) -> bool:
        """Whether each prediction also corrects the step that led to it."""
        return self == Solver.UNIPC


@settings
class TextToImageSettings:
    """How a prompt becomes the picture that is view 0 (`config.text_to_image`). Unspecified in the paper.

    Guidance scales and solver were chosen on validation objects.

    Attributes:
        pipeline: directory of a diffusers text-to-image pipeline, which draws instead of the backbone.
        template: what that pipeline is asked for, with the prompt in place of {}.
        num_steps, spacing, solver: of the sampler, see `diffusion.sampler`. A pipeline takes num_steps alone.
        w_text, w_text_end, rescale, guidance_interval: see `diffusion.guidance.Guidance`.
        negative_prompt: what guidance leads away from, in place of the empty prompt.
    """

    pipeline: str = ""
    template: str = "{}, one whole object, centred, on a plain white background"
    num_steps: NumSteps = 40
    spacing: Spacing | str = Spacing.TRAILING
    solver: Solver | str = Solver.ODE_2M
    w_text: Guidance = 2.0
    w_text_end: Guidance | None = None
    rescale: Share = 0.0
    guidance_interval: tuple[Share, ...] = (0.0, 1.0)
    negative_prompt: str = ""


@settings
class VideoSettings:
    """How videos are sampled, the first one and those of the rounds (`config.video`; Sec. 3.1).

    Guidance scales and solver are unspecified in the paper. They were chosen on validation objects.

    Attributes:
        num_steps: denoising steps of the first video. The paper takes 40.
        spacing, solver: see `diffusion.sampler`. rescale: see `diffusion.guidance`.
        w_image, w_text: guidance scales, one for all views or one for each view.
        w_image_end, w_text_end: the scales in clean views, to which those above, the scales in pure noise, go
            on a line in the noise level; None: they stay the same.
        guidance_interval: the lowest and the highest noise level sigma at which there is guidance. At the
            others the network is evaluated once, on the picture and the prompt.
        negative_prompt: what guidance leads away from, in place of the empty prompt.
        tie_first_view: view 0 is the conditioning picture itself, not the network's version of it.
    """

    num_steps: NumSteps = 40
    spacing: Spacing | str = Spacing.TRAILING
    solver: Solver | str = Solver.ODE_2M
    w_image: Scales = 1.0
    w_text: Scales = 1.0
    w_image_end: Scales | None = None
    w_text_end: Scales | None = None
    rescale: Share = 0.0
    guidance_interval: tuple[Share, ...] = (0.0, 1.0)
    negative_prompt: str = ""
    tie_first_view: bool = True


@settings
class ClipSettings:
    """How the K views stand in the clip that the network denoises (`config.clip`), see `clips.Clip`.

    Attributes:
        pictures_per_view: pictures from one view to the next; 5 for a network that knows slow motion alone.
        closed: the clip ends with view 0 again, as where an autoencoder takes 4n + 1 pictures.
        closure_psnr: where that last picture has a lower PSNR [dB] with view 0 the asset is suspect. The
            default is that of `GateSettings.view_psnr`; no generator has been measured.
    """

    pictures_per_view: Annotated[int, Range(1, 1024)] = 1
    closed: bool = False
    closure_psnr: Annotated[float, Range(0, 1000)] = 14.0


@settings
class RoundSettings:
    """When and how renders of the fit are noised and denoised again (`config.rounds`; Sec. 3.4, A.1).

    Attributes:
        at_steps: steps of the fit after which a round is made. The paper has 500 and 1000.
        num_runs: how often each round noises and denoises. The paper has 2.
        num_steps: denoising steps of a run. The paper has 10.
        start_level: noise level s of a restart, J_s = sqrt(1 - s^2) J + s eps, or (1 - s) J + s eps for flow
            matching. Unspecified in the paper.
    """

    at_steps: tuple[Annotated[int, Range(1, 1_000_000)], ...] = (500, 1000)
    num_runs: Annotated[int, Range(0, 100)] = 2
    num_steps: NumSteps = 10
    start_level: Annotated[float, Range(above=0, most=1)] = 0.7


@settings
class ElevationSettings:
    """How the elevation of a video's cameras is known (`config.elevation`; Sec. 3.3).

    Attributes:
        weights: of the estimator; "": the shipped ones.
        dino: directory of the DINO model with which the estimator was trained; "": none.
        deg: the elevation of all videos, for a generator that is told it; None: it is estimated.
    """

    weights: str = ""
    dino: str = ""
    deg: ElevationDeg | None = None


@settings
class MaskSettings:
    """How views from an autoencoder without alpha get their foreground masks (`config.masks`; A.1).

    Attributes:
        isnet: IS-Net's .onnx file; "": the foreground is what is not white.
        tolerance: difference from white, in [0, 1], from which a pixel is foreground.
    """

    isnet: str = ""
    tolerance: Share = 0.04


@settings
class PictureSettings:
    """How a user's pictures become views (`config.image`), see `conditions.pictures.place`.

    Attributes:
        fill: share of the view's side that the longer side of the object takes.
        background_tolerance: difference from a plain background, in [0, 1], from which a pixel is foreground.
        mask_weights: IS-Net's .onnx file, for pictures whose background is not plain; "": none.
        weight: of a view that a picture shows, in the fit; a generated one has 1.
    """

    fill: Annotated[float, Range(0.05, 1)] = 0.7
    background_tolerance: Share = 0.06
    mask_weights: str = ""
    weight: Annotated[float, Range(above=0, most=1000)] = 1.0

    @property
    def placing(self) -> dict[str, Any]:
        """The arguments of `conditions.pictures.place` that are settings."""
        return {name: getattr(self, name) for name in ("fill", "background_tolerance", "mask_weights")}


@settings
class TurntableSettings:
    """The video turntable.mp4 of the finished asset (`config.turntable`); its side is in pixels."""

    num_frames: Annotated[int, Range(1, 10_000)] = 48
    size: Pixels = 192
    fps: Annotated[int, Range(1, 240)] = 24


@settings
class ImageEncoderSettings:
    """The encoder of the picture for a backbone that attends to it (`config.image_encoder`).

    path: a directory with a CLIPVisionModelWithProjection; "" for none.
    """

    path: str = ""


@dataclass(frozen=True)
class AssetSettings:
    """What making an asset takes beside the generator.

    Attributes:
        num_views, size: of a turntable, the latter in pixels.
        rounds_at_steps: see `RoundSettings.at_steps`.
        elevation_deg: of the cameras of every video, for a generator that is told it; None: each video's is
            estimated.
        config_digest: tells assets of different configs apart, see `config_flags.config_digest`.

    Raises UserError for rounds that do not come one after another within the fit, for views that are too
    small to be fitted, and for formats that cannot hold what is fitted.
    """

    num_views: int
    size: int
    rounds_at_steps: tuple[int, ...]
    config_digest: str
    elevation_deg: float | None = None
    clip: ClipSettings = field(default_factory=ClipSettings)
    picture: PictureSettings = field(default_factory=PictureSettings)
    text_to_image: TextToImageSettings = field(default_factory=TextToImageSettings)
    turntable: TurntableSettings = field(default_factory=TurntableSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    gates: GateSettings = field(default_factory=GateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        steps = (0, *self.until_steps)
        if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            given = (
                f"config.rounds.at_steps {self.rounds_at_steps}, config.fit.num_steps {self.fit.num_steps}"
            )
            raise UserError(f"{given}: make each larger than the one before")
        if self.export.formats and self.fit.representation == Representation.NERF:
            raise UserError("config.export.formats: a radiance field has no files of Gaussians; make it ()")
        if self.export.page and self.fit.representation == Representation.NERF:
            raise UserError("config.export.page: pages show Gaussians, and this is a radiance field")
        if self.export.mesh and not self.mesh.formats:
            raise UserError(f"config.mesh.formats is empty; name one of {', '.join(MeshFormat)}")
        if self.export.mesh and self.fit.representation == Representation.NERF:
            raise UserError("config.export.mesh: meshes are made of Gaussians, and this is a radiance field")
        if self.fit.representation == Representation.MESH:
            self._check_mesh()
        if self.size < SMALLEST_SIDE_PX:
            raise UserError(f"config.size is {self.size}; views of an asset need {SMALLEST_SIDE_PX} px")

    def _check_mesh(self) -> None:
        if self.export.formats:
            raise UserError(
                "config.export.formats: these are of Gaussians, and the asset is a mesh; make it (),"
                " and name those of the mesh in config.mesh.formats"
            )
        if self.export.mesh:
            raise UserError("config.export.mesh: the asset is a mesh already; make it False")
        if self.export.axes != FileAxes.UPRIGHT:
            raise UserError("config.export.axes: files of a mesh have +Y up; make it upright")
        if not self.mesh.formats:
            raise UserError(f"config.mesh.formats is empty; name one of {', '.join(MeshFormat)}")

    @property
    def until_steps(self) -> tuple[int, ...]:
        """The steps of the fit at which its parts end: before each round, and at the end."""
        return (*self.rounds_at_steps, self.fit.num_steps)
