"""Compiled loops: where they can be cached, and where they cannot; what decorators put around them."""

import functools
import importlib
import os
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import recon_torch
from recon_torch.kernel import inlined, kernel, run

MS_SSIM = """
import hashlib, torch
from recon_torch.losses import ms_ssim_cpu, ssim

images, targets = torch.rand(2, 2, 48, 48, 3, generator=torch.Generator().manual_seed(0))
images.requires_grad_()
values = ssim.ms_ssim(images, targets)
values.sum().backward()
found = values.detach().numpy().tobytes() + images.grad.numpy().tobytes()
print(hashlib.sha1(found).hexdigest(), sum(ms_ssim_cpu._channels.stats.cache_misses.values()))
"""


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


def kernels():
    """All kernels of the package, by module and name."""
    for found in pkgutil.walk_packages(recon_torch.__path__, "recon_torch."):
        if found.name.endswith("_cpu") or "mesh" in found.name or "kernel" in found.name:
            module = importlib.import_module(found.name)
            for name, value in vars(module).items():
                if isinstance(value, Dispatcher) and value.py_func.__module__ == found.name:
                    yield f"{found.name}.{name}", value


def test_kernels_call_only_what_is_inlined():
    """What is not may round otherwise in the process that compiles than in those that load from the cache."""
    found = dict(kernels())
    assert len(found) > 60
    called = {
        (caller, name): function.py_func.__globals__.get(name)
        for caller, function in found.items()
        for name in function.py_func.__code__.co_names
    }
    called = {key: value for key, value in called.items() if isinstance(value, Dispatcher)}
    assert len(called) > 40
    assert [key for key, value in called.items() if not value.targetoptions.get("forceinline")] == []


def test_what_is_inlined_is_gone_from_the_compiled_kernel():
    @inlined()
    def squared(x):
        return x * x

    @kernel()
    def summed(x, y):
        return squared(x) + squared(y)

    assert summed(3.0, 4.0) == 25.0
    [library] = [each.library for each in summed.overloads.values()]
    assert not [each.name for each in library.get_defined_functions() if "squared" in each.name]


@pytest.mark.slow
def test_kernels_from_the_cache_compute_the_same_bits(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", MS_SSIM]
    fresh, cached = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert fresh[0] == cached[0]
    assert fresh[1] != "0" and cached[1] == "0"
