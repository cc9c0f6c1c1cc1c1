"""How many threads JAX computes with on a CPU.

XLA divides large sums among its threads, so their number decides the last bits of a sample: a picture drawn
on one core is not the picture drawn on two. XLA asks the environment for NPROC and otherwise counts the cores
that the process may use, once, when JAX starts. The fit of the Gaussians does not depend on its threads.
"""

from __future__ import annotations

import os

import jax

from recon_torch.errors import UserError


def limit(num_threads: int) -> None:
    """Fixes the number of JAX's threads, whatever the number of cores; 0 leaves it at the cores.

    Raises UserError for a number below 0, and if JAX has already started with another number.
    """
    if num_threads < 0:
        raise UserError(f"config.num_threads is {num_threads}; give 0 (all cores) or a number of threads")
    if num_threads == 0 or num_threads == count():
        return
    if _has_started():
        raise UserError(
            f"config.num_threads is {num_threads}, but JAX has started with {count()}; "
            "load this config before anything computes, or set NPROC"
        )
    os.environ["NPROC"] = str(num_threads)


def count() -> int:
    """The number of JAX's threads: NPROC, or the cores that this process may use."""
    asked = os.environ.get("NPROC", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else cores()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_started() -> bool:
    """Whether JAX has made its devices, after which it refuses another number of them."""
    before = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # defined at import
    try:
        jax.config.update("jax_num_cpu_devices", before + 1 if before > 0 else 2)
        jax.config.update("jax_num_cpu_devices", before)
    except RuntimeError:
        return True
    return False
