"""From directories of views to the records of a data set: read ahead, and checked for likeness."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import grain

from im3d_jax.data import views
from im3d_jax.data.turntables import Record

T = TypeVar("T")


def read_objects(root: Path, directories: Sequence[Path]) -> Iterable[Record | str]:
    """Reads the objects in `directories`, which lie below `root`, in threads and in this order.

    Yields a record for each object, or in its place one line that says why the object cannot be used.
    """

    def read(directory: Path) -> Record | str:
        name = directory.relative_to(root).as_posix()
        try:
            return views.read_object(directory, name)
        except views.Unfit as error:
            return f"{name}: {error}"

    return read_ahead(directories, read)


def read_ahead(directories: Sequence[Path], read: Callable[[Path], T]) -> Iterable[T]:
    """What `read` makes of each directory, in this order, made ahead in threads."""
    num_threads = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return grain.MapDataset.source(list(directories)).map(read).to_iter_dataset(options)


def keep_alike(objects: Iterable[Record | str], skip: Callable[[str], None]) -> Iterator[Record]:
    """The records that have as many views, of the same size, as the first record.

    Args:
        objects: of `read_objects`.
        skip: is told of every object that is left out, and why.
    """
    alike = None
    for record in objects:
        if isinstance(record, str):
            skip(record)
            continue
        shape = f"{len(record.cameras)} views of {record.cameras.height} px"
        alike = alike or shape
        if shape == alike:
            yield record
        else:
            skip(f"{record.id}: it has {shape}, the first object {alike}")
