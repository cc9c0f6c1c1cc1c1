"""The settings of making an asset, as plain values: one class for each section of a config, without JAX or
torch.

A config is read once, where the model is loaded (`generator.load`, `pipeline.load`). All code below takes
these classes. They have the fields and the defaults of `configs/base.py`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from recon_torch.errors import UserError
from recon_torch.settings import FitSettings, GateSettings


@dataclass(frozen=True)
class TextToImageSettings:
    """How a prompt becomes the picture that is view 0 (`config.text_to_image`). Unspecified in the paper.

    Attributes:
        pipeline: directory of a diffusers text-to-image pipeline, which draws instead of the backbone.
        template: what that pipeline is asked for, with the prompt in place of {}.
        num_steps, spacing, solver: of the sampler, see `diffusion.sampler`. A pipeline takes num_steps alone.
        w_text, rescale: of the guidance, see `diffusion.sampler.Guidance`.
    """

    pipeline: str = ""
    template: str = "{}, one whole object, centred, on a plain white background"
    num_steps: int = 40
    spacing: str = "trailing"
    solver: str = "2m"
    w_text: float = 2.0
    rescale: float = 0.0


@dataclass(frozen=True)
class VideoSettings:
    """How videos are sampled, the first one and those of the rounds (`config.video`; Sec. 3.1).

    Attributes:
        num_steps: denoising steps of the first video. The paper takes 40.
        spacing, solver, rescale: see `diffusion.sampler`.
        w_image, w_text: guidance scales, one for all views or one for each view.
        tie_first_view: view 0 is the conditioning picture itself, not the network's version of it.
    """

    num_steps: int = 40
    spacing: str = "trailing"
    solver: str = "2m"
    w_image: float | tuple[float, ...] = 1.0
    w_text: float | tuple[float, ...] = 1.0
    rescale: float = 0.0
    tie_first_view: bool = True


@dataclass(frozen=True)
class RoundSettings:
    """When and how renders of the fit are noised and denoised again (`config.rounds`; Sec. 3.4, A.1).

    Attributes:
        at_steps: steps of the fit after which a round is made. The paper has 500 and 1000.
        num_runs: how often each round noises and denoises. The paper has 2.
        num_steps: denoising steps of a run. The paper has 10.
        start_level: noise level s of a restart, J_s = sqrt(1 - s^2) J + s eps. Unspecified in the paper.
    """

    at_steps: tuple[int, ...] = (500, 1000)
    num_runs: int = 2
    num_steps: int = 10
    start_level: float = 0.7

    def __post_init__(self) -> None:
        if self.num_runs < 0:
            raise UserError(f"num_runs is {self.num_runs}; give 0 or more")


@dataclass(frozen=True)
class MaskSettings:
    """How views from an autoencoder without alpha get their foreground masks (`config.masks`; A.1).

    Attributes:
        isnet: IS-Net's .onnx file; "": the foreground is what is not white.
        tolerance: difference from white, in [0, 1], from which a pixel is foreground.
    """

    isnet: str = ""
    tolerance: float = 0.04


@dataclass(frozen=True)
class PictureSettings:
    """How a user's picture becomes view 0 (`config.image`), see `conditions.pictures.place`.

    Attributes:
        fill: share of the view's side that the longer side of the object takes.
        background_tolerance: difference from a plain background, in [0, 1], from which a pixel is foreground.
        mask_weights: IS-Net's .onnx file, for pictures whose background is not plain; "": none.
    """

    fill: float = 0.7
    background_tolerance: float = 0.06
    mask_weights: str = ""


@dataclass(frozen=True)
class TurntableSettings:
    """The video turntable.mp4 of the finished asset (`config.turntable`); its side is in pixels."""

    num_frames: int = 48
    size: int = 192
    fps: int = 24

    def __post_init__(self) -> None:
        if min(self.num_frames, self.size, self.fps) < 1:
            raise UserError(f"num_frames, size and fps are {astuple(self)}; give at least 1 for each")


@dataclass(frozen=True)
class AssetSettings:
    """What making an asset takes beside the generator.

    Attributes:
        num_views, size: of a turntable, the latter in pixels.
        rounds_at_steps: see `RoundSettings.at_steps`.
        elevation_deg: of the cameras of every video, for a generator that is told it; None: each video's is
            estimated.
        config_digest: tells assets of different configs apart, see `config_flags.config_digest`.

    Raises UserError for rounds that do not come one after another within the fit, and for sizes below 1.
    """

    num_views: int
    size: int
    rounds_at_steps: tuple[int, ...]
    config_digest: str
    elevation_deg: float | None = None
    picture: PictureSettings = field(default_factory=PictureSettings)
    text_to_image: TextToImageSettings = field(default_factory=TextToImageSettings)
    turntable: TurntableSettings = field(default_factory=TurntableSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    gates: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        steps = (0, *self.until_steps)
        if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
            given = (
                f"config.rounds.at_steps {self.rounds_at_steps}, config.fit.num_steps {self.fit.num_steps}"
            )
            raise UserError(f"{given}: make each larger than the one before")
        if self.num_views < 1 or self.size < 1:
            raise UserError(f"config.num_views {self.num_views}, config.size {self.size}: give at least 1")

    @property
    def until_steps(self) -> tuple[int, ...]:
        """The steps of the fit at which its parts end: before each round, and at the end."""
        return (*self.rounds_at_steps, self.fit.num_steps)
