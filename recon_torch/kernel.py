"""How this package compiles loops and spreads them over threads.

Kernels are plain numba functions over a range of tasks that write to disjoint places. Numba's own parallel
loops would bring a second OpenMP runtime beside torch's: two pools that spin on the same cores, and a barrier
that waits for every thread even where another process holds its core.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

# The compiler may reorder sums and fuse products, but NaN and infinity keep their meaning.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
CHUNKS_PER_THREAD = 4

_pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def kernel(**options) -> Callable:
    """`numba.njit` with its cache on disk, or without one where there is no folder that can be written."""
    options |= {"nogil": True, "error_model": "numpy"}

    def decorate(function: Callable) -> Callable:
        function = inspect.unwrap(function)  # numba compiles no wrappers, such as those of type checkers
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(function, **options)

    return decorate


def run(function: Callable, num_tasks: int, *arguments, grain: int = 1) -> None:
    """Calls function(begin, end, *arguments) for chunks of at least `grain` that make up [0, num_tasks).

    Uses as many threads as torch does. The caller takes part and never waits for a thread that has not begun.
    """
    num_threads = torch.get_num_threads()
    size = max(grain, -(-num_tasks // (CHUNKS_PER_THREAD * num_threads)))
    begins = iter(range(0, num_tasks, size))

    def work() -> None:
        for begin in begins:  # the threads share this iterator
            function(begin, min(begin + size, num_tasks), *arguments)

    helpers = [_pool.submit(work) for _ in range(min(num_threads, -(-num_tasks // size)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


def gradient_arrays(gradients: Sequence[Tensor | None], like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Gradients as `arrays`, zeros for those that do not matter to the loss.

    For `ctx.set_materialize_grads(False)`: torch would fill such zeros with all its threads.
    """
    pairs = zip(gradients, like, strict=True)
    return [np.zeros_like(array) if v is None else arrays(v)[0] for v, array in pairs]


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """CPU tensors as contiguous NumPy arrays, of the same memory where they are contiguous already."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]
