"""Public checkpoints <-> our parameters: tensors in the layouts of PyTorch projects.

A model says by a function from path to `Source` which tensor each of its parameters comes from. This module
moves the values and changes their layouts, and it accounts for every tensor (`public_tensors` reads them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_settings


class Source(NamedTuple):
    """Where a parameter stands in a public checkpoint.

    Attributes:
        name: of the tensor.
        layout: a key of `LAYOUTS`, such as "conv1x1" for a Dense of ours that is a 1x1 convolution there. ""
            stands for the layout that the rank of a kernel implies (`KERNEL_LAYOUTS`).
    """

    name: str
    layout: str = ""


SourceOf = Callable[[str], Source | None]
"""Parameter path ("down_0/conv/kernel") -> its `Source`, or None for a parameter that is ours alone."""

LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),
    "conv1x1": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "conv2d": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "conv3d": (lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2)),
    "per_channel_2d": (lambda x: x[:, 0, 0], lambda x: x[:, None, None]),
    "per_channel_3d": (lambda x: x[:, 0, 0, 0], lambda x: x[:, None, None, None]),
    # A convolution over frames is a 3D one there, with an extent of 1 in both directions of the image.
    "conv_frames": (
        lambda x: x[..., 0, 0].transpose(2, 1, 0),
        lambda x: x.transpose(2, 1, 0)[..., None, None],
    ),
}
"""Layout -> (from theirs to ours, from ours to theirs). PyTorch has output channels first, Flax has them
last.
"""

RANK_IN_CHECKPOINT = {
    "linear": 2,
    "conv1x1": 4,
    "conv2d": 4,
    "conv3d": 5,
    "conv_frames": 5,
    "per_channel_2d": 3,
    "per_channel_3d": 4,
}
KERNEL_LAYOUTS = {2: "linear", 3: "conv_frames", 4: "conv2d", 5: "conv3d"}
"""Rank of a kernel of ours -> its layout, where its `Source` does not say otherwise."""

TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Last name in a path of ours -> the one in a checkpoint, where they differ."""


def torch_name(path: str) -> str:
    """The name that a path has in a checkpoint whose modules mirror ours: "a_0/b/kernel" -> "a.0.b.weight".

    A number at the end of a module's name is an index of a list there, except in diffusers' "linear_1" and
    "linear_2".
    """
    *modules, leaf = path.split("/")
    parts = []
    for module in modules:
        stem, _, number = module.rpartition("_")
        indexed = number.isdigit() and stem not in ("", "linear")
        parts += [stem, number] if indexed else [module]
    return ".".join([*parts, TORCH_LEAVES.get(leaf, leaf)])


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a diffusers directory; {} for a bare file. Raises UserError as `read_settings` does."""
    file = Path(path) / "config.json"
    return read_settings(file) if file.is_file() else {}


def check_config(path: str | Path, settings: Mapping[str, object]) -> None:
    """Compares what shapes do not show with the config.json beside a checkpoint's weights, if there is one.

    Args:
        settings: those of our model by their name there. A list has an element for each level, in place of
            which the file may have one number for all.

    Raises UserError that names a setting which the file has otherwise.
    """
    config = read_config(path)
    for key, ours in settings.items():
        theirs = config.get(key, ours)
        if theirs != ours and not (isinstance(ours, list) and [theirs] * len(ours) == ours):
            raise UserError(
                f"{path}: config.json has {key} {quoted(theirs)}, config.backbone makes it {quoted(ours)}"
            )


def to_params(
    tensors: Mapping[str, np.ndarray], params: dict[str, Any], source_of: SourceOf, what: str
) -> dict[str, Any]:
    """`params` with the values of a checkpoint, float32.

    Args:
        params: nested dictionaries of arrays or ShapeDtypeStructs; those without a source keep their values.
        what: the checkpoint's path and family, for errors.

    Raises UserError that names a missing, unknown, wrongly shaped or non-finite tensor.
    """
    flat, found = traverse_util.flatten_dict(params, sep="/"), {}
    sources = {path: source_of(path) for path in flat}
    account_for({source.name for source in sources.values() if source}, tensors, what)
    for path, value in flat.items():
        source = sources[path]
        if source is None:
            found[path] = value
            continue
        ours = laid_out(path, source, tensors[source.name], value.shape, what)
        if not np.isfinite(ours).all():
            raise UserError(f"{what}: {source.name} holds NaN or infinity; fetch it again")
        found[path] = jnp.asarray(ours, jnp.float32)
    return traverse_util.unflatten_dict(found, sep="/")


def account_for(used: Set[str], stored: Iterable[str], what: str) -> None:
    """Raises UserError that names a tensor which a model uses and a checkpoint lacks, or the other way round.

    Args:
        used, stored: names of tensors.
        what: the checkpoint's path and family.
    """
    stored = set(stored)
    problems = [
        f"{problem} {min(names)} ({len(names)} such)"
        for problem, names in (("lacks", used - stored), ("has an unknown tensor", stored - used))
        if names
    ]
    if problems:
        is_stability = any(name.startswith("input_blocks.") for name in stored) and "conv_in.weight" in used
        hint = (
            "convert it from Stability's layout to diffusers'"
            if is_stability
            else "is it of another family or size?"
        )
        raise UserError(f"{what} {' and '.join(problems)}; {hint}")


def laid_out(path: str, source: Source, tensor: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A view of a checkpoint's tensor, as a parameter of this shape. Raises UserError if it has another."""
    layout = layout_of(path, source, len(shape))
    rank = RANK_IN_CHECKPOINT.get(layout, len(shape))
    ours = LAYOUTS[layout][0](tensor) if tensor.ndim == rank else tensor
    if ours.shape != shape:
        shapes = f"is {tensor.shape}; the config makes {path} {shape}"
        raise UserError(f"{what}: {source.name} {shapes}")
    return ours


def to_tensors(params: dict[str, Any], source_of: SourceOf) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: a checkpoint's tensors by name. Parameters without a source stay out."""
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        if source := source_of(path):
            layout = layout_of(path, source, value.ndim)
            tensors[source.name] = np.ascontiguousarray(LAYOUTS[layout][1](np.asarray(value)))
    return tensors


def layout_of(path: str, source: Source, rank: int) -> str:
    """The key of `LAYOUTS` of a parameter of ours with so many axes."""
    if source.layout or not path.endswith("/kernel"):
        return source.layout or "same"
    return KERNEL_LAYOUTS[rank]
