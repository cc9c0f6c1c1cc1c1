"""IM-3D: a prompt or a picture becomes a 3D asset. The diffusion half, in JAX, and the Python API.

    import im3d_jax

    with im3d_jax.load("configs/tiny.py") as pipeline:
        asset = pipeline.make("a red mushroom with a beige stem")
        asset.save("out/mushroom")

docs/python.md tells the rest. Importing this package costs nothing: JAX and torch load when `load` is called.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from im3d_jax.asset import Asset
    from im3d_jax.pipeline import Pipeline
    from recon_torch.errors import UserError

__all__ = ["Asset", "Pipeline", "UserError", "load"]

_HOMES = {
    "Asset": "im3d_jax.asset",
    "Pipeline": "im3d_jax.pipeline",
    "UserError": "recon_torch.errors",
    "ConfigDict": "ml_collections",
}


def load(
    config: str | Path | ConfigDict = "configs/tiny.py", overrides: Mapping[str, Any] | None = None
) -> Pipeline:
    """Loads a model with which `Pipeline.make` makes assets.

    Args:
        config: a config file, whose path may also be relative to the repository, or a ConfigDict.
        overrides: other values for entries of the config, by their dotted names: {"video.num_steps": 20}.

    Raises UserError for a config or weights that are missing or do not fit, and for an unknown entry.
    """
    from recon_torch.process.client import leave_if_worker

    leave_if_worker()
    # Before torch loads: threads that spin while they wait slow down whatever shares the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from im3d_jax import config_flags, pipeline

    return pipeline.load(config_flags.with_overrides(config, overrides or {}))


def __getattr__(name: str) -> Any:
    """`Pipeline`, `Asset` and `UserError` import what they need when they are asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: the public names, also those that are not imported yet."""
    return sorted(__all__)
