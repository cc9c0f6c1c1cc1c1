"""Parameters by path, divided into those that train and those that stay frozen; their types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from numpy.typing import ArrayLike, DTypeLike

from recon_torch.errors import UserError


def join(frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
    """Puts the parameters together as the network takes them: nested dictionaries."""
    return traverse_util.unflatten_dict({**frozen, **trained}, sep="/")


def split_params(params: Mapping[str, Any], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) parameters by path, such as "encoder/conv_in/kernel".

    pattern: regular expression that is found in the paths of those that train.

    Raises UserError if it matches none.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {path: value for path, value in flat.items() if re.search(pattern, path)}
    if not trained:
        raise UserError(_nothing(pattern, list(flat)))
    return trained, {path: value for path, value in flat.items() if path not in trained}


def _nothing(pattern: str, paths: list[str]) -> str:
    line = f"config.train.trainable: {pattern!r} matches none of the {len(paths)} parameters"
    if not paths:
        return line
    line += f"; name some, such as {min(paths)}"
    if "temporal" not in pattern:
        return line
    return f"{line}, or where every layer sees all frames train a LoRA (--config.train.lora.rank=16)"


def cast(value: ArrayLike, dtype: DTypeLike, what: str) -> np.ndarray:
    """An array of another type of floating-point numbers, each rounded to the nearest.

    what: the array and its file, for errors.

    Raises UserError for NaN, infinity and a value that the type does not hold, which would become infinite.
    """
    value = np.asarray(value)
    with np.errstate(over="ignore"):
        rounded = np.array(value, dtype, order="C")
    if not np.isfinite(rounded).all():
        worst = float(value[~np.isfinite(rounded)].flat[0])
        lost = f", which {np.dtype(dtype)} does not hold; choose bfloat16 or float32"
        raise UserError(f"{what} holds {worst:.6g}{lost if np.isfinite(worst) else ''}")
    return rounded
