"""Device mesh and where arrays live on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from recon_torch.errors import UserError

AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh: assets are divided along `data` and `fsdp`, parameters along `fsdp` and `tensor`."""

MESH_AXES = {"embed": "fsdp", "mlp": "tensor"}
"""Logical axis of a parameter, in a backbone's `partition_rules` -> the mesh axis that divides it."""

PartitionRules = Sequence[tuple[str, tuple[str, ...]]]


def make_mesh(devices=None) -> Mesh:
    """A mesh with one axis, `data`, over all devices."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def parse_mesh(text: str) -> dict[str, int]:
    """Devices along each of `AXES`, from "data=10,fsdp=8"; 1 along those that are not named.

    Raises UserError for anything else.
    """
    sizes = dict.fromkeys(AXES, 1)
    named = set()
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in AXES or axis in named or not re.fullmatch("[1-9][0-9]*", number):
            known = ", ".join(AXES)
            raise UserError(f"--mesh {text!r}: {part!r} is not AXIS=NUMBER, each axis once, of {known}")
        named.add(axis)
        sizes[axis] = int(number)
    return sizes


def partition_spec(
    path: str, shape: Sequence[int], rules: PartitionRules, sizes: Mapping[str, int]
) -> PartitionSpec:
    """How a parameter is divided over a mesh with `sizes` devices along its axes.

    The first rule whose pattern is found in `path` names the parameter's last axes. An axis that its devices
    do not divide evenly stays whole, and so does a parameter that no rule names.
    """
    logical = next((names for pattern, names in rules if re.search(pattern, path)), ())
    names = [None] * (len(shape) - len(logical)) + [MESH_AXES.get(name) for name in logical]
    return PartitionSpec(
        *(axis if axis and size % sizes[axis] == 0 else None for axis, size in zip(names, shape, strict=True))
    )


def bytes_per_device(tree, rules: PartitionRules, sizes: Mapping[str, int]) -> int:
    """Bytes that one device holds of a tree of parameters, or of optimiser states that mirror them.

    The leaves, arrays or ShapeDtypeStructs, are divided as the dictionary keys on the way to them say.
    """
    total = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = "/".join(key.key for key in keys if isinstance(key, DictKey))
        axes = filter(None, partition_spec(path, leaf.shape, rules, sizes) if leaf.ndim > 1 else ())
        total += leaf.size * leaf.dtype.itemsize // math.prod(sizes[axis] for axis in axes)
    return total
