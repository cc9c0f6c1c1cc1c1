"""The backbone contract: one module per denoiser, named in the config and imported by name.

A backbone module has a `Model` whose arguments are `config.backbone.kwargs`, and a model has

    init(key) -> params                                            every temporal layer at the identity
    apply(params, noisy [B,K,h,w,c], timestep [B], Conditioning)   -> prediction [B,K,h,w,c], float32
    empty_conditioning(batch) -> Conditioning                      no image and the empty prompt
    latent_shape, prediction_type                                  (h, w, c); "epsilon", "v" or "x0"
    num_views                                                      K that it was trained for, None for any
    temporal_pattern                                               regex of the paths that Sec. 3.1 trains
    partition_rules                                                (regex of the path, logical axes) pairs
    traceable                                                      False if jax.jit cannot trace `apply`

A module may have `SMALL`, arguments of a model small enough to check anywhere. A model with a public ancestor
also has

    from_pretrained(path, params) -> params                        of a public checkpoint
    to_pretrained(params) -> {name: array}                         the same in the ancestor's layout

`timestep` is what a network is told of the noise level, float32: `diffusion.Schedule.timesteps` says it.
View 0 is the conditioning image, at azimuth 0, and view k stands at 2 pi k / K, counter-clockwise seen from
above; a model with another order of frames of its own translates inside `apply`. How a model holds its
parameters is its own affair: nothing outside depends on Flax. `im3d check-backbone` tests all of it.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial

import jax

from recon_torch.errors import UserError

REQUIRED = (
    "init",
    "apply",
    "empty_conditioning",
    "latent_shape",
    "prediction_type",
    "num_views",
    "temporal_pattern",
    "partition_rules",
    "traceable",
)
"""What every model has; one with a public ancestor also has `from_pretrained` and `to_pretrained`."""


def find(name: str):
    """The module of a backbone: of this package ("emu_video") or any importable one ("my_pkg.my_model").

    Raises UserError if there is none.
    """
    path = name if "." in name else f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not path.startswith(error.name):
            raise
        message = f"config.backbone.name: no module {path}; name a backbone of im3d_jax or your own"
        raise UserError(message) from None


def build(name: str, kwargs: dict):
    """The model of backbone `name` (see `find`) with the arguments `kwargs`.

    Raises UserError for a module that does not exist or has no Model, for arguments that it does not take and
    for what it lacks of the contract.
    """
    module = find(name)
    path = module.__name__
    if not hasattr(module, "Model"):
        raise UserError(f"config.backbone.name: {path} has no Model, which the backbone contract asks for")
    unknown = set(kwargs) - set(inspect.signature(module.Model).parameters)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"config.backbone.kwargs: {path}.Model takes no argument {names}; remove it")
    model = module.Model(**kwargs)
    if lacking := [each for each in REQUIRED if not hasattr(model, each)]:
        raise UserError(
            f"config.backbone.name: {path}.Model lacks {', '.join(lacking)} of the backbone contract"
        )
    return model


@partial(jax.jit, static_argnames="model")
def init(model, key: jax.Array):
    """Parameters of a model, as one compiled program."""
    return model.init(key)
