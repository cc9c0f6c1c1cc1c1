"""The mesh of devices, and where arrays live on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jaxtyping import PyTree
from numpy.typing import DTypeLike

from recon_torch.errors import UserError

AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh. Assets are divided along `data` and `fsdp`, parameters along `fsdp` and `tensor`."""

BATCH = ("data", "fsdp")
"""The axes along which a batch is divided."""

MESH_AXES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
"""The mesh axis that divides each logical axis of a parameter."""

PartitionRules = Sequence[tuple[str, tuple[str, ...]]]
"""(regular expression of a path, logical names of the parameter's last axes); the first found counts."""


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `AXES`; all devices along `data` unless `sizes` says more (see `parse_mesh`).

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": len(devices)} if sizes is None else sizes
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        asked = " x ".join(map(str, shape))
        raise UserError(f"config.train.mesh asks for {asked} devices, there are {len(devices)}; correct it")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices that work on different assets."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shares(mesh: Mesh) -> int:
    """The number of parts into which `along_batch` divides."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def parse_mesh(text: str, num_devices: int | None = None) -> dict[str, int]:
    """Reads the devices along each of `AXES` from a text such as "data=10,fsdp=8"; axes not named have 1.

    num_devices: if given, one axis may be -1, which stands for the devices that the others leave.

    Raises UserError for anything else.
    """
    sizes = dict.fromkeys(AXES, 1)
    named = set()
    number_pattern = "[1-9][0-9]*" if num_devices is None else "-1|[1-9][0-9]*"
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in AXES or axis in named or not re.fullmatch(number_pattern, number):
            known = ", ".join(AXES)
            or_open = "" if num_devices is None else ", or -1"
            raise UserError(
                f"mesh {text!r}: {part!r} is not AXIS=NUMBER with a number of at least 1{or_open}, "
                f"each axis once, of {known}"
            )
        named.add(axis)
        sizes[axis] = int(number)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if open_axes and num_devices is not None:
        rest, remainder = divmod(num_devices, -math.prod(sizes.values()))
        if len(open_axes) > 1 or remainder or not rest:
            raise UserError(f"mesh {text!r} does not divide {num_devices} devices; give one -1 or numbers")
        sizes[open_axes[0]] = rest
    return sizes


def logical_axes(path: str, rules: PartitionRules) -> tuple[str, ...]:
    """The logical names of a parameter's last axes, by the first rule that is found in its path, if any."""
    return next((names for pattern, names in rules if re.search(pattern, path)), ())


def partition_spec(
    path: str, shape: Sequence[int], rules: PartitionRules, sizes: Mapping[str, int]
) -> PartitionSpec:
    """How a parameter is divided over a mesh with `sizes` devices along its axes.

    The first rule whose pattern is found in `path` names the parameter's last axes. An axis that its devices
    do not divide evenly stays whole, and so does a parameter that no rule names.
    """
    logical = logical_axes(path, rules)
    names = [None] * (len(shape) - len(logical)) + [MESH_AXES.get(name) for name in logical]
    return PartitionSpec(
        *(axis if axis and size % sizes[axis] == 0 else None for axis, size in zip(names, shape, strict=True))
    )


def spec_of_leaf(
    keys: Sequence[Any],
    leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct,
    rules: PartitionRules,
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """How a leaf of a tree is divided, whose path is made of the dictionary keys that lead to it.

    A parameter's moments and averages hang under the same keys, so they lie where it lies. Vectors stay
    whole.
    """
    path = "/".join(key.key for key in keys if isinstance(key, DictKey))
    return partition_spec(path, leaf.shape, rules, sizes) if leaf.ndim > 1 else PartitionSpec()


def of_tree(tree: PyTree, rules: PartitionRules, mesh: Mesh) -> PyTree:
    """The NamedSharding of each leaf of a tree of arrays or ShapeDtypeStructs; see `spec_of_leaf`."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec_of_leaf(keys, leaf, rules, mesh.shape)), tree
    )


def place(value: np.ndarray, sharding: NamedSharding, dtype: DTypeLike) -> jax.Array:
    """Places an array that every process holds over all devices, each of which keeps its part."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index].astype(dtype))


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every process. All processes must call it if its parts lie on several of them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process's devices work on part `index` of `count` equal parts of every batch.

    Raises UserError if they work on parts that are not consecutive, which cannot be loaded as one.
    """
    shares = batch_shares(mesh)
    slices = along_batch(mesh).addressable_devices_indices_map((shares,)).values()
    rows = sorted({row for index in slices if index for row in range(*index[0].indices(shares))})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows) or shares % len(rows):
        raise UserError(
            f"config.train.mesh {dict(mesh.shape)} gives a process parts {rows} of a batch; make fsdp and "
            "tensor divide the devices of a host, or hosts divide them"
        )
    return rows[0] // len(rows), shares // len(rows)


def bytes_per_device(tree: PyTree, rules: PartitionRules, sizes: Mapping[str, int]) -> int:
    """Bytes that one device holds of a tree of parameters, or of optimiser states that mirror them."""
    total = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        axes = filter(None, spec_of_leaf(keys, leaf, rules, sizes))
        total += leaf.size * leaf.dtype.itemsize // math.prod(sizes[axis] for axis in axes)
    return total
