"""Batches for the loop, made ahead of it: read, collated, and on the devices when they are asked for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from im3d_jax import sharding

AHEAD = 2
"""Batches that wait on the devices: one for the next step, one in the making."""


class Batch(NamedTuple):
    """One step's batch.

    stream: which it is of. arrays: over the mesh. ids: the objects that this process loaded for it. skipped:
    the corrupt records that it has met up to this batch.
    """

    stream: str
    arrays: Any
    ids: list[str]
    skipped: list[str]


class Feed:
    """Iterator over (batch, seconds that the caller waited for it), which a thread keeps filled.

    Args:
        order: the streams of the steps to come. read: the next batch of a stream.
    """

    def __init__(self, order: Iterable[str], read: Callable[[str], Batch]):
        self._ready: queue.Queue = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(order), read), daemon=True)
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        while not self._ready.empty():
            self._ready.get()  # lets the thread pass its last one
        self._thread.join()

    def __next__(self) -> tuple[Batch, float]:
        """Raises what reading raised."""
        started = time.monotonic()
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch, time.monotonic() - started

    def _fill(self, order: Iterator[str], read: Callable[[str], Batch]) -> None:
        try:
            for name in order:
                batch = read(name)
                if self._closed.is_set():
                    return
                self._ready.put(batch)
        except BaseException as error:  # it belongs to the loop, which asks for the batch
            self._ready.put(error)


def over_mesh(arrays, mesh: Mesh):
    """Arrays of this process's rows [b, ...] as arrays of all rows [B, ...], divided over the mesh.

    What lies on a device does not come to the host for it.
    """
    where = sharding.along_batch(mesh)

    def place(rows):
        rows = rows if isinstance(rows, jax.Array) else np.ascontiguousarray(rows)
        return jax.make_array_from_process_local_data(where, rows)

    return jax.tree.map(place, arrays)
