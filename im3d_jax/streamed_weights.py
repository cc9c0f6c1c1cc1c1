"""Large public checkpoints -> parameters, one tensor after another, in the type that they are stored in.

`pretrained.to_params` wants all tensors of a checkpoint in float32 at once. A network of 14 billion
parameters takes 28 GB in bfloat16, so here each tensor goes from its file to its devices before the next one
is read, and no more than one is on the host twice. All are accounted for before the first one is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from jax.sharding import NamedSharding
from jaxtyping import PyTree
from numpy.typing import DTypeLike
from torch import Tensor

from im3d_jax import pretrained, public_tensors
from im3d_jax.pretrained import SourceOf
from recon_torch import weights_files
from recon_torch.errors import UserError

TYPES = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float16: np.dtype(np.float16),
}
"""Types that weights may be stored in, and be read as."""


CHECKED_TOGETHER = 2**20
"""Values that are looked at together, so that checking a tensor takes no memory of its size."""

ALIGNMENT = 64
"""Bytes; JAX takes an array at a multiple of it over as it is on a CPU, and copies any other."""


class Stored(NamedTuple):
    """A tensor in a file of a checkpoint."""

    file: Path
    name: str


class Checkpoint(NamedTuple):
    """The tensors of a model in a set of files, none of which has been read.

    Attributes:
        path: as the user gave it.
        tensors: by the names that the model gives them.
    """

    path: str
    tensors: dict[str, Stored]


def find(path: str | Path, prefixes: Sequence[str] = public_tensors.DENOISER) -> Checkpoint:
    """The tensors at `path`, which is a .safetensors file, a shard, an index of shards, or a directory.

    Args:
        prefixes: see `public_tensors.read`.

    Raises UserError as `public_tensors.read` does, and for a missing shard.
    """
    files: dict[str, Path] = {}
    for file in weights_files.find(path):
        with weights_files.opened(file) as opened:
            files |= dict.fromkeys(opened.keys(), file)
    chosen = public_tensors.choose(files, prefixes, str(path))
    return Checkpoint(str(path), {own: Stored(files[name], name) for name, own in chosen.items()})


def read(
    checkpoint: Checkpoint,
    shapes: dict[str, Any],
    source_of: SourceOf,
    what: str,
    *,
    dtype: DTypeLike | None = None,
    keep: str = "(?!)",
    shardings: PyTree[NamedSharding] | None = None,
) -> dict[str, Any]:
    """The parameters of a checkpoint.

    Args:
        shapes: nested dictionaries of ShapeDtypeStructs or arrays.
        source_of: where each of them stands; all of them stand somewhere.
        what: the checkpoint and its family, for errors.
        dtype: that tensors become; None for the one that each is stored in.
        keep: regular expression, found in the paths of parameters that stay in the type they are stored in.
        shardings: a tree like `shapes`, of where each parameter lies; None for the default device.

    Raises UserError that names a missing, unknown, wrongly shaped or non-finite tensor, and one of a type
    that is not read.
    """
    flat = traverse_util.flatten_dict(shapes, sep="/")
    places = {} if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    sources = {path: source_of(path) for path in flat}
    pretrained.account_for({source.name for source in sources.values() if source}, checkpoint.tensors, what)
    found = {}
    for path, source, tensor in _tensors(checkpoint, sources):
        wanted = None if dtype is None or re.search(keep, path) else np.dtype(dtype)
        theirs = _as_array(tensor, wanted, source.name, what)
        ours = pretrained.laid_out(path, source, theirs, flat[path].shape, what)
        found[path] = _placed(ours, places.get(path))
    return traverse_util.unflatten_dict({path: found[path] for path in flat}, sep="/")


def _tensors(
    checkpoint: Checkpoint, sources: dict[str, pretrained.Source | None]
) -> Iterator[tuple[str, pretrained.Source, Tensor]]:
    """(path, source, tensor) of each parameter, shard by shard.

    A file is mapped into memory anew for every tensor, because what was read of a mapped file stays there.
    """
    named = [(path, source) for path, source in sources.items() if source]
    for path, source in sorted(named, key=lambda each: checkpoint.tensors[each[1].name].file):
        file, name = checkpoint.tensors[source.name]
        with weights_files.opened(file) as opened:
            yield path, source, opened.get_tensor(name)


def _as_array(tensor: Tensor, dtype: np.dtype | None, name: str, what: str) -> np.ndarray:
    """A view of a tensor, or a copy in another type. Raises UserError for values that are not finite then."""
    if tensor.dtype not in TYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{what}: {name} is of type {kind}, which is not read here; give the original weights"
        )
    if dtype is not None:
        tensor = tensor.to(next(theirs for theirs, ours in TYPES.items() if ours == dtype))
    if not all(some.isfinite().all() for some in tensor.flatten().split(CHECKED_TOGETHER)):
        raise UserError(f"{what}: {name} holds NaN or infinity as {TYPES[tensor.dtype]}; fetch it again")
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _placed(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A copy of an array of a file, on the devices where it belongs."""
    if sharding is None:
        return jax.device_put(_copied(array))
    # Each process reads the parts of its own devices alone.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: _copied(array[index]))


def _copied(array: np.ndarray) -> np.ndarray:
    """An array's values in order, in memory of their own that JAX can take over."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
