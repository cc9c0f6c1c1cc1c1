"""LoRA files, ours and public ones: read for a backbone, checked against it, merged into its parameters.

Ours is what `im3d train` writes with `config.train.lora`: the factors of the adapters by the paths of their
kernels, and in the metadata the alpha, the targets and the weights that they adapt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree
from numpy.typing import DTypeLike

from im3d_jax import checkpoint
from im3d_jax.backbones import Backbone, Params
from im3d_jax.lora import public
from im3d_jax.lora.adapters import A, Adapter, Adapters, B, merged, paired
from recon_torch import weights_files
from recon_torch.errors import UserError

ROOT = Path(__file__).parents[2]
"""Files that a config names may lie relative to this directory, as weights may."""

MAX_STRENGTH = 100.0


class Chosen(NamedTuple):
    """A file that `config.lora` names, and how strongly its adapters count."""

    path: Path
    strength: float


def parse(text: str) -> list[Chosen]:
    """Reads "PATH", or "PATH=STRENGTH" for a strength other than 1, and several of them after commas.

    Raises UserError for a strength that is none, and for a file that does not exist.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = part.rpartition("=")
        path, strength = (name, _strength(number, part)) if equals else (part, 1.0)
        place = next((each for each in (Path(path), ROOT / path) if each.exists()), None)
        if place is None:
            raise UserError(f"config.lora: no file {path}; give PATH or PATH=STRENGTH, several after commas")
        found.append(Chosen(place, strength))
    return found


def _strength(text: str, part: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = np.nan
    if not abs(strength) <= MAX_STRENGTH:
        raise UserError(
            f"config.lora: {part!r} does not end in =STRENGTH, a number from -{MAX_STRENGTH:.0f} to"
            f" {MAX_STRENGTH:.0f}"
        )
    return strength


# ---- Files of ours ----


def save(
    path: Path,
    trained: Mapping[str, Any],
    trains: Adapters,
    base: Path,
    metadata: Mapping[str, Any],
    dtype: DTypeLike,
) -> None:
    """Writes adapters as one safetensors file. The file is whole or not there.

    base: the weights that they adapt, which are recorded by name and fingerprint.
    """
    told = {"rank": trains.rank, "alpha": trains.alpha, "targets": trains.targets}
    told |= {"base": base.name, "base_fingerprint": checkpoint.fingerprint(base)}
    checkpoint.save_weights(path, dict(trained), {**metadata, "lora": told}, dtype)


def factors(adapters: Mapping[str, Adapter]) -> dict[str, np.ndarray]:
    """What a file of ours holds of adapters. Scales are multiplied into B, so that they may differ."""
    made = {}
    for kernel, (a, b, scale) in adapters.items():
        made[kernel + A], made[kernel + B] = np.asarray(a), np.asarray(b) * np.float32(scale)
    return made


def converted(source: Path) -> dict[str, Any]:
    """The metadata of a file of ours that holds `factors`."""
    return {"lora": {"source": source.name}}


def is_lora(path: Path) -> bool:
    """Whether a file or directory holds adapters, of ours or public ones."""
    if not path.exists():
        return False
    for file in weights_files.find(path):
        with weights_files.opened(file) as opened:
            names = list(opened.keys())
            if any(name.endswith((A, B)) for name in names) or public.is_public(names):
                return True
    return False


def is_ours(path: Path) -> bool:
    """Whether a file holds adapters under our paths."""
    if not path.is_file():
        return False
    with weights_files.opened(path) as opened:
        return any(name.endswith((A, B)) for name in opened.keys())  # noqa: SIM118


def _read_ours(path: Path) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """(adapters by the paths of their kernels, metadata)."""
    with weights_files.opened(path) as opened:
        metadata = checkpoint.metadata_of(path, opened.metadata() or {})
        factors = {
            name: weights_files.to_float32(opened.get_tensor(name), name, f"LoRA {path}").numpy()
            for name in opened.keys()  # noqa: SIM118
        }
    for name in factors:
        twin = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
        if twin not in factors:
            raise UserError(f"LoRA {path} has {name} and lacks {twin}; train or fetch it again")
    told = metadata.get("lora", {})
    alpha = told.get("alpha") if isinstance(told, dict) else None
    found = paired(factors, 1.0)
    if isinstance(alpha, int | float):
        found = {kernel: each._replace(scale=alpha / each.a.shape[-1]) for kernel, each in found.items()}
    return found, metadata


# ---- For a backbone ----


def read(path: Path, model: Backbone, name: str) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """(adapters by the paths of their kernels, metadata) of a LoRA file of ours, or of a public one.

    name: of the backbone, for errors.

    Raises UserError that names a factor which is missing, unknown to the backbone or of other widths, and for
    what a file does to weights beside adapting them.
    """
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    if not shapes:
        raise UserError(
            f"config.lora: the weights of {name} are no JAX arrays, so nothing merges {path} into them; give"
            " a config.backbone.kwargs.path whose weights it is merged into (in diffusers fuse_lora)"
        )
    if is_ours(path):
        adapters, metadata = _read_ours(path)
    else:
        adapters, metadata = public.read(path, model, name, shapes), {}
    if unknown := sorted(adapters.keys() - shapes.keys()):
        raise UserError(
            f"LoRA {path} adapts {unknown[0]} ({len(unknown)} such), which {name} lacks; give a LoRA of this"
            " backbone"
        )
    for kernel, adapter in adapters.items():
        made, taken = (*adapter.a.shape[:-1], adapter.b.shape[-1]), shapes[kernel].shape
        if made != taken or adapter.a.shape[-1] != len(adapter.b):
            raise UserError(
                f"LoRA {path} adapts {kernel} of {made} by rank {adapter.a.shape[-1]} x {len(adapter.b)},"
                f" config.backbone makes it {taken}; give the config that it was trained with"
            )
    return adapters, metadata


def add(params: Params, adapters: Mapping[str, Adapter], strength: float) -> Params:
    """The parameters with the adapters merged into their kernels."""
    flat = traverse_util.flatten_dict(params, sep="/")
    changed = {path: merged(flat[path], adapter, strength) for path, adapter in adapters.items()}
    return traverse_util.unflatten_dict(flat | changed, sep="/")


def with_loras(
    text: str, params: PyTree, *, model: Backbone, name: str, base: Path | None, sign: float = 1.0
) -> PyTree:
    """The parameters with the adapters of the files that `config.lora` names merged into them.

    Args:
        name: of the backbone, for errors.
        base: the file of the parameters; None where they are random.
        sign: -1.0 takes off adapters that were added before, to float rounding.

    Says on stderr if a file was trained on other weights. Raises UserError as `parse` and `read` do.
    """
    for path, strength in parse(text):
        adapters, metadata = read(path, model, name)
        told = metadata.get("lora", {})
        fingerprint = told.get("base_fingerprint") if isinstance(told, dict) else None
        if fingerprint and sign > 0 and (base is None or fingerprint != checkpoint.fingerprint(base)):
            trained_on = f"was trained on other weights, {told.get('base')}"
            print(f"im3d: warning: LoRA {path} {trained_on}, than config.weights {base}", file=sys.stderr)
        params = add(params, adapters, sign * strength)
    return params
