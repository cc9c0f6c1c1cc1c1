"""The input pipeline of training: a source of objects -> shuffled, sharded, decoded, batched examples.

The order of a source's objects is endless and reshuffled every epoch. Row g of global batch k is element
k * batch_size + g of that order, and process s of n loads rows [s * B / n, (s + 1) * B / n). What a batch
holds is thus a pure function of the seed and of k: it does not depend on the number of processes or threads,
nor on where a run was resumed, and the number of the next batch is the whole position to save. grain
shuffles, and reads ahead in threads, which suffice because Pillow decodes outside the interpreter's lock;
procedural objects are made inside of it, so they may come from processes (`workers`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypedDict

import grain
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.data import objects, procedural
from im3d_jax.data.workers import Run, run_here
from recon_torch.errors import UserError

NAMED = 3  # of the corrupt records, in the error that stops a run


class Example(TypedDict, total=False):
    """K views of one object: rgb and alpha, or latents, or a scene. The last three only where cached.

    id names it in messages, such as "procedural/123"; rgb, over white, and alpha are in [0, 1]; scene has an
    object's arrays of `objects.pack` and w2c [K,4,4], of which `stack_views` renders views of `size` pixels;
    elevation_rad is that of all its cameras; text and text_mask have an entry for each text encoder.
    """

    id: str
    rgb: Float[np.ndarray, "K H W 3"]
    alpha: Float[np.ndarray, "K H W 1"]
    latents: Float[np.ndarray, "K h w c"]
    scene: dict[str, np.ndarray]
    size: int
    caption: str
    elevation_rad: float
    text: tuple[Float[np.ndarray, "L d"], ...]
    text_mask: tuple[Float[np.ndarray, " L"], ...]
    image_tokens: Float[np.ndarray, "L d"]


class Source(Protocol):
    """Objects by number, safe to read from several threads. Raises CorruptRecord for one it cannot decode.

    A source whose objects are cheaper to make together may have `batch(indices) -> list[Example]` too.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class CorruptRecord(Exception):
    """A record that cannot be decoded. name: which, and where it lies. why: what is wrong with it."""

    def __init__(self, name: str, why: str):
        super().__init__(f"{name} ({why})")


class Shard(NamedTuple):
    """Which of `count` equal, contiguous parts of every global batch a process loads."""

    index: int
    count: int


class ProceduralSource:
    """The objects of `procedural.turntables`, yet to be rendered.

    Args:
        seed: world seed. first_object: the object with index 0 here; see `objects.SPLITS`.
        size: side of the square views in pixels. num_views: K.
        run: calls a function, perhaps in another process; see `workers`.
    """

    def __init__(self, seed: int, first_object: int, size: int, num_views: int, run: Run = run_here):
        self.seed, self.first_object, self.size, self.num_views = seed, first_object, size, num_views
        self._run = run

    def __len__(self) -> int:
        return max(last for _, last in objects.SPLITS.values()) - self.first_object

    def __getitem__(self, index: int) -> Example:
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> list[Example]:
        """Several objects at once, which is one call of another process instead of many."""
        numbers = [self.first_object + index for index in indices]
        scenes = self._run(objects.on_turntables, self.seed, numbers, self.num_views)
        fields = scenes.packed | {"w2c": scenes.w2c}
        return [
            Example(
                id=f"procedural/{number}",
                scene={name: rows[row] for name, rows in fields.items()},
                size=self.size,
                caption=scenes.captions[row],
                elevation_rad=float(scenes.elevation_rad[row]),
            )
            for row, number in enumerate(numbers)
        ]


def stack_views(examples: Sequence[Example]) -> tuple[Float[Array, "B K H W 3"], Float[Array, "B K H W 1"]]:
    """rgb and alpha of a batch. What is yet to be rendered is, now, on the default device, where it stays."""
    if "scene" not in examples[0]:
        return tuple(np.stack([each[name] for each in examples]) for name in ("rgb", "alpha"))
    size = examples[0]["size"]
    scenes = {name: np.stack([each["scene"][name] for each in examples]) for name in examples[0]["scene"]}
    views = procedural.render(scenes, scenes.pop("w2c"), procedural.half_width(size), size)
    return views.rgb, views.alpha


class Stream:
    """Iterator over this process's part of the global batches; see `open_stream`.

    Attributes:
        position: the global batch that comes next.
        skipped: the corrupt records met in the batches given out since the stream was opened, each once, with
            what is wrong with it. What was only read ahead does not count.
    """

    def __init__(self, batches: grain.DatasetIterator, start: int, max_corrupt: int):
        self.position, self.skipped = start, []
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
    """Lists of batch_size // shard.count examples: this shard's rows of global batches start, start + 1, ...

    A corrupt record's place is taken by the next record of the order that is readable: the same one in
    every process and on every run.

    Args:
        seed: of the order. shuffle: False keeps the source's order.
        batch_size: of the global batch, over all processes.
        num_threads: that read and decode; 0 reads when asked. buffer: batches to read ahead.
        max_corrupt: how many corrupt records this process may skip.

    Raises UserError for an empty source and for a batch that does not divide among the shards.
    """
    if not len(source):
        raise UserError("the data set has no objects")
    if batch_size % shard.count or not 0 <= shard.index < shard.count:
        raise UserError(f"a batch of {batch_size} does not divide among {shard.count} processes; match them")
    num_rows = batch_size // shard.count

    order = grain.MapDataset.range(len(source)).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()

    def place(row: int) -> int:
        """Row of this shard -> place in the order."""
        batch, offset = divmod(row, num_rows)
        return batch * batch_size + shard.index * num_rows + offset

    def make_together(batch: int) -> list[tuple[Example, list[str]]]:
        rows = range(batch * num_rows, (batch + 1) * num_rows)
        return [(example, []) for example in source.batch([order[place(row)] for row in rows])]

    if hasattr(source, "batch"):
        batches = grain.MapDataset.range(start, sys.maxsize).map(make_together)
        batches = batches.to_iter_dataset(_ahead(num_threads, buffer))
    else:
        rows = grain.MapDataset.range(start * num_rows, sys.maxsize)
        rows = rows.map(lambda row: _read(source, order, place(row), max_corrupt))
        rows = rows.to_iter_dataset(_ahead(num_threads, buffer * num_rows))
        batches = rows.batch(num_rows, batch_fn=list)
    return Stream(iter(batches), start, max_corrupt)


def _ahead(num_threads: int, buffer: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=min(num_threads, buffer), prefetch_buffer_size=buffer)


def _read(source: Source, order, place: int, max_corrupt: int) -> tuple[Example | None, list[str]]:
    """The first readable record from `place` on, and the corrupt ones before it. None: they are too many.

    What is corrupt is returned and not counted here, because threads come in any order and read ahead.
    """
    corrupt: dict[str, None] = {}
    while len(corrupt) <= min(max_corrupt, len(source) - 1):
        try:
            return source[order[place]], list(corrupt)
        except CorruptRecord as error:
            corrupt[str(error)] = None
        place += 1
    return None, list(corrupt)
