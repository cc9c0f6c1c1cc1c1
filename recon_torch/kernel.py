"""How this package compiles loops: numba, cached on disk, in torch's own number of threads."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

# The compiler may reorder sums and fuse products, but NaN and infinity keep their meaning.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}


def kernel(**options) -> Callable:
    """`numba.njit` with its cache on disk, or without where it finds no folder that it can write to."""

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(function, cache=True, error_model="numpy", **options)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(function, error_model="numpy", **options)

    return decorate


def use_torch_threads() -> None:
    """Lets kernels use as many threads as torch does; with OpenMP both draw on one pool."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Contiguous CPU tensors as NumPy arrays of the same memory."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]
