"""Compiled loops: where they can be cached, and where they cannot; what decorators put around them."""

import functools

import numpy as np

from recon_torch.kernel import kernel, run


def test_kernels_compile_where_no_cache_can_be_written():
    namespace = {}
    exec("def double(x):\n    return 2 * x", namespace)  # no file, so numba finds no place for its cache
    assert kernel()(namespace["double"])(21) == 42


def test_a_wrapped_function_is_compiled_without_its_wrapper():
    def double(x):
        return 2 * x

    @functools.wraps(double)
    def checked(*args, **kwargs):  # as a type checker wraps functions; numba could not compile this
        return double(*args, **kwargs)

    assert kernel()(checked)(21) == 42


def test_run_covers_every_task_once():
    counts = np.zeros(1000, np.int64)

    def count(begin, end, counts):
        counts[begin:end] += 1

    run(count, len(counts), counts, grain=7)
    assert (counts == 1).all()
