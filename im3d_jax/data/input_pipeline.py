"""The input pipeline of training: a source of examples becomes shuffled, sharded and decoded batches.

The order of a source's examples is endless and is shuffled anew in every epoch. Row g of global batch k is
element k * batch_size + g of that order, and process s of n loads rows [s * B / n, (s + 1) * B / n). So what
a batch holds depends on the seed and on k alone: not on the number of processes or threads, nor on where a
run was resumed. The number of the next batch is the whole position that has to be saved.

grain shuffles, and reads ahead in threads. Threads suffice, because Pillow decodes outside the interpreter's
lock. Making procedural objects holds that lock, so they may come from processes (`workers`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.data import BatchSource, CorruptRecord, Example, Source, procedural
from im3d_jax.data.mixture import Mixture
from recon_torch.errors import UserError

CACHED = {"latents": "latents", "text": "embeddings of its caption", "image_tokens": "image tokens"}
"""What examples may hold in place of pictures and captions, and its name in messages."""

NAMED = 3  # so many of the corrupt records are named in the error that stops a run

Row = tuple[Example | None, list[str]]
"""An example, or None if there was no readable one, and the corrupt records that were met before it."""


@dataclass(frozen=True)
class Shard:
    """Which of `count` equal, contiguous parts of every global batch a process loads."""

    index: int
    count: int


def stack_views(
    examples: Sequence[Example],
) -> tuple[
    Float[Array, "B K H W 3"] | Float[np.ndarray, "B K H W 3"],
    Float[Array, "B K H W 1"] | Float[np.ndarray, "B K H W 1"],
]:
    """The rgb and alpha of a batch: NumPy arrays or, if it has scenes, arrays on JAX's device.

    Scenes are rendered, together. Every other number of them in a batch compiles another program.
    """
    is_scene = np.array(["scene" in each for each in examples])
    if not is_scene.any():
        return _stack_pictures(examples)
    views = _render([each for each in examples if "scene" in each])
    if is_scene.all():
        return views.rgb, views.alpha
    stored = _stack_pictures([each for each in examples if "scene" not in each])
    rows = np.argsort(np.argsort(~is_scene, stable=True))  # where each example is among scenes and others
    rgb, alpha = (
        jnp.concatenate([jnp.asarray(made), jnp.asarray(read)])[rows]
        for made, read in zip((views.rgb, views.alpha), stored, strict=True)
    )
    return rgb, alpha


def _stack_pictures(
    examples: Sequence[Example],
) -> tuple[Float[np.ndarray, "B K H W 3"], Float[np.ndarray, "B K H W 1"]]:
    return np.stack([each["rgb"] for each in examples]), np.stack([each["alpha"] for each in examples])


def _render(examples: Sequence[Example]) -> procedural.Views:
    size = examples[0]["size"]
    scenes = {name: np.stack([each["scene"][name] for each in examples]) for name in examples[0]["scene"]}
    return procedural.render(scenes, scenes.pop("w2c"), procedural.half_width(size), size)


def check_alike(examples: Sequence[Example]) -> None:
    """Raises UserError unless all examples of a batch hold the same: pictures or latents, and what is cached.

    Scenes are as good as pictures. Only a mixture of data sets can hold different things.
    """
    for example in examples[1:]:
        for name, what in CACHED.items():
            shapes = [_shapes(each.get(name)) for each in (examples[0], example)]
            if shapes[0] != shapes[1]:
                (has, a), (lacks, b) = zip((examples[0]["id"], example["id"]), shapes, strict=True)
                raise UserError(
                    f"a batch mixes examples that do not go together: {has} has {what} {a}, {lacks} has {b};"
                    " build all data sets of a mixture with the same encoders"
                )


def _shapes(value: object) -> str:
    """The shapes of one array, or of a tuple of them, in words."""
    if value is None:
        return "none"
    return " and ".join(str(np.shape(each)) for each in (value if isinstance(value, tuple) else (value,)))


class Stream:
    """An iterator over one process's part of the global batches; `open_stream` makes it.

    Attributes:
        position: the number of the global batch that comes next.
        skipped: the corrupt records in the batches that were given out since the stream was opened, each
            once and with what is wrong with it. What was only read ahead does not count.
    """

    def __init__(self, batches: grain.DatasetIterator, start: int, max_corrupt: int):
        self.position: int = start
        self.skipped: list[str] = []
        self._batches, self._max_corrupt = batches, max_corrupt

    def __iter__(self) -> Iterator[list[Example]]:
        return self

    def __next__(self) -> list[Example]:
        """Raises UserError when more than `max_corrupt` records were corrupt."""
        examples = []
        for example, corrupt in next(self._batches):
            self.skipped += [record for record in corrupt if record not in self.skipped]
            if len(self.skipped) > self._max_corrupt or example is None:
                first = "; ".join(self.skipped[:NAMED])
                raise UserError(
                    f"{len(self.skipped)} corrupt records by batch {self.position}, {self._max_corrupt} are"
                    f" allowed: {first}; mend the data, or allow more"
                )
            examples.append(example)
        self.position += 1
        return examples

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()


def open_stream(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    shard: Shard,
    start: int = 0,
    shuffle: bool,
    num_threads: int,
    buffer: int,
    max_corrupt: int,
) -> Stream:
    """Opens the stream of this shard's rows of global batches start, start + 1, and so on.

    Each of its items is a list of batch_size // shard.count examples. The place of a corrupt record is taken
    by the next readable record of the order, which is the same one in every process and on every run.

    Args:
        seed: of the order.
        batch_size: of the global batch, over all processes.
        shuffle: False keeps the source's own order. The parts of a `Mixture` say that for themselves.
        num_threads: how many threads read and decode; 0 reads only when asked.
        buffer: how many batches are read ahead.
        max_corrupt: how many corrupt records this process may skip.

    Raises UserError for an empty source, and for a batch that does not divide among the shards.
    """
    num_rows = _rows_of(shard, source, batch_size)
    order = _order_of(source, seed, shuffle)

    def place(row: int) -> int:
        """The place in the order of a row of this shard."""
        batch, offset = divmod(row, num_rows)
        return batch * batch_size + shard.index * num_rows + offset

    if isinstance(source, BatchSource):
        make = source.batch

        def make_together(batch: int) -> list[Row]:
            rows = range(batch * num_rows, (batch + 1) * num_rows)
            return [(example, []) for example in make([order[place(row)] for row in rows])]

        batches = grain.MapDataset.range(start, sys.maxsize).map(make_together)
        batches = batches.to_iter_dataset(_read_ahead(num_threads, buffer))
    else:
        rows = grain.MapDataset.range(start * num_rows, sys.maxsize)
        rows = rows.map(lambda row: _read(source, order, place(row), max_corrupt))
        rows = rows.to_iter_dataset(_read_ahead(num_threads, buffer * num_rows))
        batches = rows.batch(num_rows, batch_fn=list)
    return Stream(iter(batches), start, max_corrupt)


def _rows_of(shard: Shard, source: Source, batch_size: int) -> int:
    """How many rows of each global batch are this shard's."""
    if not len(source):
        raise UserError("the data set has no objects")
    if batch_size % shard.count or not 0 <= shard.index < shard.count:
        raise UserError(f"a batch of {batch_size} does not divide among {shard.count} processes; match them")
    return batch_size // shard.count


def _order_of(source: Source, seed: int, shuffle: bool) -> grain.MapDataset:
    """The endless order of a source's indices."""
    if isinstance(source, Mixture):
        return source.order(seed)
    order = grain.MapDataset.range(len(source)).seed(seed)
    return (order.shuffle() if shuffle else order).repeat()


def _read_ahead(num_threads: int, buffer: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=min(num_threads, buffer), prefetch_buffer_size=buffer)


def _read(source: Source, order: grain.MapDataset, place: int, max_corrupt: int) -> Row:
    """The first readable record from `place` on, and the corrupt ones before it; None if they are too many.

    The corrupt records are returned and not counted here, because threads come in any order and read ahead.
    """
    corrupt: dict[str, None] = {}
    while len(corrupt) <= min(max_corrupt, len(source) - 1):
        try:
            return source[order[place]], list(corrupt)
        except CorruptRecord as error:
            corrupt[str(error)] = None
        place += 1
    return None, list(corrupt)
