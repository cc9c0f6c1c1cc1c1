"""Blender inside of this process: its import, its output, and its empty state before every object."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

from recon_torch.errors import UserError

INSTALL = "pip install --no-deps 'bpy==4.5.*'"
"""Without its dependencies, because it asks for a NumPy that JAX does not take, and renders without it."""


def check_installed() -> None:
    """Raises UserError if `bpy` is not installed."""
    if importlib.util.find_spec("bpy") is None:
        raise UserError(f"--renderer blender needs Blender's Python module; install it: {INSTALL}")


@functools.cache
def start() -> Any:
    """Imports and returns `bpy`. Raises UserError if it is not installed or cannot be loaded."""
    check_installed()
    with quiet() as log:
        try:
            import bpy
        except ImportError as error:
            raise UserError(f"Blender's module bpy cannot be loaded ({error}); {INSTALL}") from error
        log.flush()
    atexit.register(_end_silently)
    return bpy


def empty() -> Any:
    """`bpy` with the factory settings and an empty scene, so that nothing of an earlier object is left."""
    bpy = start()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.context.preferences.filepaths.use_scripts_auto_execute = False  # a file's scripts are never run
    return bpy


@contextlib.contextmanager
def quiet() -> Iterator[TextIO]:
    """Sends all output of this process to a log meanwhile, and yields that log, which is empty at first.

    Blender writes to the file descriptors 1 and 2 from C++, and its add-ons to sys.stdout.
    """
    log = _log()
    log.seek(0)
    log.truncate()
    _flush()
    saved = [os.dup(1), os.dup(2)]
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield log
    finally:
        log.flush()
        for number, each in enumerate(saved, 1):
            os.dup2(each, number)
            os.close(each)


def last_line(log: TextIO) -> str:
    """What Blender complained of last, or else the last line that it wrote; "" if there is none."""
    log.flush()
    content = os.pread(log.fileno(), 2**20, max(0, os.fstat(log.fileno()).st_size - 2**20))
    lines = [line.strip() for line in content.decode(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if "error" in line.lower()]
    return (complaints or lines or [""])[-1][:200]


@functools.cache
def _log() -> TextIO:
    # It stays open, because loggers of the add-ons keep the stream that they were made with. Appending lets
    # Blender and Python write through two descriptors without overwriting each other.
    return tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _end_silently() -> None:
    """Blender reports memory that it has not freed as the process ends, after all that Python prints."""
    _flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
