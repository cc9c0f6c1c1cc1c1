"""The parts that a config names, each with its registry: backbone, autoencoder, text encoder and schedule."""

from __future__ import annotations

from ml_collections import ConfigDict

from im3d_jax import config_sections
from im3d_jax.autoencoders import AUTOENCODERS
from im3d_jax.backbones import REGISTRY
from im3d_jax.conditions.text import TEXT_ENCODERS
from im3d_jax.diffusion.schedules import SCHEDULES, make_schedule

REGISTRIES = dict(zip(config_sections.PARTS, (REGISTRY, AUTOENCODERS, TEXT_ENCODERS, SCHEDULES), strict=True))
"""By the name of the config's section."""


def check(config: ConfigDict) -> None:
    """Raises UserError for the parts that a config names if they do not exist, or not with such arguments.

    Nothing is made of them but the schedule, which costs nothing.
    """
    for section, registry in REGISTRIES.items():
        if registry is not SCHEDULES:
            registry.check(*config_sections.named(config, section))
    config_sections.require(config, "schedule")
    make_schedule(**config.schedule)
