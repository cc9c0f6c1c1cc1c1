"""jax.Array <-> the tensors shared with the worker, by DLPack, without needless copies.

Torch owns the memory, because CUDA refuses to export what recent JAX allocates. The worker and this process
write into it, while JAX takes its arrays to be constant. So there are two ways to read a tensor: a view, for
what is used up before anybody writes there again, and a copy, for what is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Shaped
from torch import Tensor


def as_jax(tensor: Shaped[Tensor, "..."]) -> Shaped[Array, "..."]:
    """The tensor's own memory as a JAX array, of the same shape and dtype.

    Finish what you compute from it (`jax.block_until_ready`) before the memory is written to again.
    Raises ValueError for a tensor that JAX could only read by a copy: not contiguous, not aligned to 64
    bytes, or of a dtype that JAX would narrow (int64, float64).
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a view needs a contiguous tensor, not strides {tensor.stride()}")
    array = jax.dlpack.from_dlpack(tensor.detach(), copy=False)
    if array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(f"JAX cannot view a tensor of {tensor.dtype} {tuple(tensor.shape)} without a copy")
    return array


def copy_to_jax(tensor: Shaped[Tensor, "..."]) -> Shaped[Array, "..."]:
    """A JAX array with memory of its own; when this returns, the tensor may be written to.

    `from_dlpack(copy=True)` and `device_put` do not serve here: both may alias aligned CPU memory.
    """
    return jnp.array(as_jax(tensor), copy=True).block_until_ready()


def write(array: Shaped[Array, "..."], tensor: Shaped[Tensor, "..."]) -> None:
    """Copies the array into the tensor, once, and returns when another process can read it there.

    The array must be on a single device. Raises ValueError if shapes or dtypes differ.
    """
    source = torch.from_dlpack(array.block_until_ready())
    if source.shape != tensor.shape or source.dtype != tensor.dtype:
        raise ValueError(
            f"{source.dtype} {tuple(source.shape)} does not go into {tensor.dtype} {tuple(tensor.shape)}"
        )
    tensor.copy_(source)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
