"""The sections that all configs share, and `training`, which makes the section of those that train.

A leaf config calls `get_config` and changes what is its own. It must name an autoencoder, a backbone and a
text encoder. im3d_jax/settings.py, im3d_jax/training_settings.py and recon_torch/settings.py explain every
entry, with its default and its range; `im3d generate --help-config` lists them.
"""

from ml_collections import ConfigDict, config_dict

from im3d_jax.config_kinds import ModelConfig
from im3d_jax.training_settings import TrainSettings
from recon_torch.settings import plain


def get_config() -> ConfigDict:
    config = ConfigDict(plain(ModelConfig()))
    del config.train, config.published  # which few configs have
    config.elevation.deg = config_dict.placeholder(float)
    config.mesh.level = config_dict.placeholder(float)
    config.schedule = dict(
        kind="scaled_linear",
        num_steps=1000,
        beta_start=8.5e-4,
        beta_end=1.2e-2,
        zero_terminal_snr=True,
        shift=config_dict.placeholder(float),  # of the kind "flow" alone
    )
    return config


def training(streams: dict, **settings) -> ConfigDict:
    """The section `train`, with the arguments of `stream` for each stream, and changes to `TrainSettings`.

    Raises KeyError for a setting that does not exist.
    """
    config = ConfigDict(plain(TrainSettings()))
    del config.autoencoder  # of one task alone
    unknown = settings.keys() - config.keys()
    if unknown:
        raise KeyError(f"no setting {min(unknown)} of training")
    config.update(settings)
    config.streams = {name: stream(**each) for name, each in streams.items()}
    return config


def stream(
    *,
    every: int = 1,
    batch_size: int,
    num_views: int = 16,
    path: str = "",
    split: str = "train",
    first_object: int = 0,
    mix: dict | None = None,
    keep_image: float = 0.9,
    keep_text: float = 0.9,
    timestep_shift: float = 1.0,
    timestep_draw: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    random_start: float = 0.0,
) -> ConfigDict:
    """One stream of batches. A step takes one: of those that are due, the one that is due least often.

    Args:
        every: the stream is due every so many steps.
        batch_size: over all processes.
        path, split: of a data set of `im3d dataset`. A path of "" stands for procedural objects, from number
            `first_object` of the split on.
        mix: in their place, the parts of a mixture by name, each with a weight: every batch has examples of
            all parts, as in {"meshes": {"weight": 0.7, "path": "data/meshes"}, "shapes": {"weight": 0.3}}.
        keep_image, keep_text, timestep_shift, random_start: see `im3d_jax.tasks.turntable.Stream`.
        timestep_draw, logit_mean, logit_std: see `im3d_jax.diffusion.schedules.sample_timesteps`.
    """
    data = dict(path=path, split=split, first_object=first_object) | (dict(mix=mix) if mix else {})
    drawn = dict(
        keep_image=keep_image,
        keep_text=keep_text,
        timestep_shift=timestep_shift,
        timestep_draw=timestep_draw,
        logit_mean=logit_mean,
        logit_std=logit_std,
        random_start=random_start,
    )
    return ConfigDict(dict(every=every, batch_size=batch_size, num_views=num_views, **drawn, data=data))
