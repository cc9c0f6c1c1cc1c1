"""What a whole config may hold: the entries and sections that commands read, with their ranges.

The parts that a config names (`backbone`, `autoencoder`, `text` and `schedule`) take the arguments of what
they name, and `parts` checks those.
"""

from __future__ import annotations

from typing import Annotated

from im3d_jax.settings import (
    ClipSettings,
    ElevationSettings,
    ImageEncoderSettings,
    MaskSettings,
    PictureSettings,
    RoundSettings,
    TextToImageSettings,
    TurntableSettings,
    VideoSettings,
)
from im3d_jax.training_settings import LoaderSettings, TrainSettings
from recon_torch.ranges import Count, Every, NumViews, Pixels, Range, Seed, Share, settings
from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings


@settings
class PublishedSettings:
    """Published numbers of parameters, beside which `im3d plan` shows ours (`config.published`)."""

    total: Annotated[float, Range(0, 1e15)]
    spatial: Annotated[float, Range(0, 1e15)]
    temporal: Annotated[float, Range(0, 1e15)]
    note: str = ""


@settings
class ModelConfig:
    """The entries of a config of a generator or of its training, but for the parts that it names.

    seed: for procedural objects and training; an asset's seed is `im3d generate --seed`.
    weights: of the backbone. size: of a view, in pixels. num_views: K, of a turntable.
    lora: files of adapters that are merged into the weights: PATH or PATH=STRENGTH, several after commas.
    num_threads: JAX's threads on a CPU, which decide the last bits of a sample; 0: as many as the cores.
    """

    seed: Seed = 0
    weights: str = ""
    lora: str = ""
    num_threads: Annotated[int, Range(0, 4096)] = 0
    size: Pixels = 64
    num_views: NumViews = 16
    image_encoder: ImageEncoderSettings = ImageEncoderSettings()
    text_to_image: TextToImageSettings = TextToImageSettings()
    clip: ClipSettings = ClipSettings()
    video: VideoSettings = VideoSettings()
    rounds: RoundSettings = RoundSettings()
    elevation: ElevationSettings = ElevationSettings()
    masks: MaskSettings = MaskSettings()
    image: PictureSettings = PictureSettings()
    fit: FitSettings = FitSettings()
    gates: GateSettings = GateSettings()
    export: ExportSettings = ExportSettings()
    mesh: MeshSettings = MeshSettings()
    turntable: TurntableSettings = TurntableSettings()
    train: TrainSettings | None = None
    published: PublishedSettings | None = None


@settings
class AugmentSettings:
    """How much `training.elevation.degrade` changes frames at most; each video or frame draws its own amount.

    Attributes:
        noise: standard deviation of Gaussian noise, drawn for each frame.
        blur_px: standard deviation of a Gaussian blur, drawn for each video.
        shift_px: of each frame by itself, along both axes.
        colour: relative strength of each channel of a video.
    """

    noise: Share = 0.08
    blur_px: Annotated[float, Range(0, 100)] = 1.2
    shift_px: Annotated[int, Range(0, 1000)] = 1
    colour: Share = 0.3


@settings
class ElevationDataSettings:
    """A data set of `im3d dataset` and its splits (`config.data`). A path of "": procedural objects."""

    path: str = ""
    split: str = "train"
    test_split: str = "test"


@settings
class ElevationConfig:
    """The entries of a config of `im3d train-elevation`.

    Attributes:
        size: of the rendered frames, in pixels.
        num_objects: procedural objects to train on, each rendered once.
        num_views: evenly spaced views of each object, of which a training video has 4.
        batch_size: videos of a step.
        learning_rate: at its peak, from which it falls to 0 on a cosine.
        dino: the directory of a DINO model to use instead of the small encoder.
        max_skipped: so many steps may have a loss or gradient that is not finite.
    """

    seed: Seed = 0
    size: Pixels = 64
    data: ElevationDataSettings = ElevationDataSettings()
    num_objects: Annotated[int, Range(1, 100_000_000)] = 8192
    num_views: Annotated[int, Range(4, 1024)] = 8
    num_test_objects: Annotated[int, Range(1, 10_000)] = 200
    loader: LoaderSettings = LoaderSettings(num_threads=1)
    num_steps: Every = 2000
    batch_size: Annotated[int, Range(1, 1_000_000)] = 64
    learning_rate: Annotated[float, Range(above=0, most=10)] = 2e-3
    weight_decay: Annotated[float, Range(0, 10)] = 0.02
    dino: str = ""
    checkpoint_every: Every = 200
    log_every: Every = 50
    tensorboard: bool = False
    max_skipped: Count = 0
    augment: AugmentSettings = AugmentSettings()
