"""Batches that are read, collated and put on the devices ahead of the loop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from im3d_jax import sharding

AHEAD = 2
"""How many batches wait on the devices: one for the next step and one that is being made."""


class Batch(NamedTuple):
    """One step's batch.

    Attributes:
        stream: the name of its stream.
        arrays: divided over the mesh.
        ids: the objects that this process loaded for it.
        skipped: the corrupt records that this process has met up to this batch.
    """

    stream: str
    arrays: PyTree
    ids: list[str]
    skipped: list[str]


class Feed:
    """An iterator over (batch, seconds that the caller waited for it), which a thread keeps filled.

    Args:
        order: the streams of the steps to come.
        read: reads the next batch of a stream.
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
        """The next batch. Raises what reading it raised."""
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


def over_mesh(arrays: PyTree, mesh: Mesh) -> PyTree:
    """Makes of this process's rows [b, ...] arrays of all rows [B, ...], which are divided over the mesh.

    Arrays that are on a device already do not come back to the host.
    """
    where = sharding.along_batch(mesh)

    def place(rows):
        rows = rows if isinstance(rows, jax.Array) else np.ascontiguousarray(rows)
        return jax.make_array_from_process_local_data(where, rows)

    return jax.tree.map(place, arrays)
