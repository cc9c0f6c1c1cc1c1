"""How loops are compiled and spread over threads.

A kernel is a numba function over a range of tasks, which write to disjoint places. Numba's own parallel loops
would bring a second OpenMP runtime beside torch's: two pools of threads that spin on the same cores, and a
barrier that waits for every thread even while another process holds its core.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# Lets the compiler reorder sums and fuse products; NaN and infinity keep their meaning.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
CHUNKS_PER_THREAD = 4

_pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def kernel(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` with its cache on disk, or without one where there is no folder that can be written."""
    options |= {"nogil": True, "error_model": "numpy"}

    def decorate(function: Callable) -> Callable:
        function = inspect.unwrap(function)  # numba compiles no wrappers, such as those of type checkers
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # "cannot cache function: no locator available"
            return numba.njit(function, **options)

    return decorate


def inlined(**options: Any) -> Callable[[Callable], Callable]:
    """A function that kernels call; its code becomes a part of theirs. Kernels call nothing else of ours.

    Otherwise numba 0.68 keeps several compiled copies of it, which may round differently: the process that
    compiles runs one, and those that load the kernel from the cache run another.
    """
    return kernel(forceinline=True, **options)


def run(function: Callable, num_tasks: int, *arguments: Any, grain: int = 1) -> None:
    """Calls function(begin, end, *arguments) for chunks of at least `grain` tasks, until all are done.

    Uses as many threads as torch does. The caller works, too, and waits for no thread that has not begun.
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
    """Gradients as NumPy arrays, with zeros for outputs that the loss does not depend on.

    Use it with `ctx.set_materialize_grads(False)`: torch would write those zeros with all of its threads.
    """
    pairs = zip(gradients, like, strict=True)
    return [np.zeros_like(array) if v is None else arrays(v)[0] for v, array in pairs]


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """CPU tensors as contiguous NumPy arrays, which share the memory of tensors that are contiguous."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]
