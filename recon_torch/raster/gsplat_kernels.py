"""gsplat's CUDA kernels: loaded where they are built, otherwise compiled, which the user is told.

gsplat 1.5.3 takes a `csrc*.so` beside its `__init__.py`, which wheels with kernels have and which
`launch/gpu_kernels.sh` makes. Without it torch compiles the kernels into its directory of extensions, where
later processes find them. That takes minutes, during which torch says nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from recon_torch.errors import UserError

# A generous bound: two busy cores took 12 minutes for the 22 files of CUDA.
COMPILE_TIMEOUT_S = 3600.0

LIBRARY = "gsplat_cuda"  # gsplat's name for what torch compiles
MAX_REASON = 200  # characters of a compiler's error


def _say(line: str) -> None:
    print(f"im3d: {line}", file=sys.stderr, flush=True)


@functools.cache
def load(announce: Callable[[str], None] = _say) -> Callable:
    """gsplat's `rasterization`. The first call loads its kernels, or compiles them once for all later runs.

    announce: is called with a line of text before kernels are compiled. By default it goes to stderr.

    Raises UserError if there are no kernels and they cannot be compiled here.
    """
    from gsplat import rasterization  # this import alone loads no kernels

    try:
        importlib.import_module("gsplat.csrc")
        _import_kernels()
    except ImportError as error:
        with _build_directory() as directory:
            if not (directory / f"{LIBRARY}.so").exists():
                if not isinstance(error, ModuleNotFoundError):
                    announce(f"gsplat's own kernels do not load ({_reason(error)})")
                announce(
                    "gsplat compiles its CUDA kernels now, once on this machine: a few minutes on many cores,"
                    f" some 12 on two. They stay in {directory} (TORCH_EXTENSIONS_DIR chooses another place)"
                )
            _import_kernels()
    return rasterization


def _import_kernels() -> None:
    """Has gsplat load its kernels, or compile them. Raises UserError if it cannot."""
    try:
        from gsplat.cuda._backend import _C
    except (RuntimeError, OSError, ImportError, ValueError) as error:  # torch's build raises any of these
        raise _no_kernels(_reason(error)) from error
    if _C is None:
        raise _no_kernels("there is no nvcc")


def _no_kernels(why: str) -> UserError:
    return UserError(
        f"gsplat has no CUDA kernels and cannot compile them: {why}; install g++, ninja and the CUDA toolkit"
        f" {torch.version.cuda} (CUDA_HOME), or bring kernels made elsewhere: see gsplat's kernels in"
        " docs/reconstruction.md"
    )


def _reason(error: Exception) -> str:
    """What an error of torch's build says, in one line: the first error in a compiler's output."""
    if isinstance(error, ImportError) and isinstance(error.__context__, OSError):
        error = error.__context__  # gsplat then tries to import what was not built, which hides the reason
    template, *values = error.args or (type(error).__name__,)
    text = str(error)
    if isinstance(template, str) and values and template.count("%s") == len(values):
        text = template % tuple(values)  # torch raises some messages as a template and its values
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    told = [line for line in lines[1:] if "error" in line.lower()]
    return (told or lines)[0][:MAX_REASON]


@contextlib.contextmanager
def _build_directory() -> Iterator[Path]:
    """The directory that torch compiles into, for one process at a time: gsplat first removes what is there.

    Raises UserError if the directory cannot be made.
    """
    from torch.utils import cpp_extension  # slow to import

    try:
        # torch has no public way to ask for this, and it depends on the versions of Python and CUDA.
        directory = Path(cpp_extension._get_build_directory(LIBRARY, verbose=False))  # noqa: SLF001
        lock = open(directory.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(
            f"gsplat has no place for its CUDA kernels: {error.filename}: {error.strerror}; set"
            " TORCH_EXTENSIONS_DIR to a directory that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
