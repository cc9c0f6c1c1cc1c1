"""The input pipeline: a batch depends on seed and number alone, not on shards, threads or resuming."""

import time

import numpy as np
import pytest

from im3d_jax.data import CorruptRecord, procedural
from im3d_jax.data.input_pipeline import Shard, open_stream, stack_views
from im3d_jax.data.sources import ProceduralSource
from recon_torch.errors import UserError

WHOLE = Shard(0, 1)
SETTINGS = dict(seed=3, batch_size=8, shuffle=True, num_threads=3, buffer=2, max_corrupt=5)


class Numbers:
    """Records that are their numbers; some are broken, and every third is slow to read."""

    def __init__(self, length, broken=()):
        self.length, self.broken = length, set(broken)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(0.002 if index % 3 == 0 else 0)
        if index in self.broken:
            raise CorruptRecord(f"record {index}", "no picture")
        return {"id": index}


def ids(source, num_batches, shard=WHOLE, **settings):
    """Numbers [num_batches, rows] of a stream's first batches."""
    stream = open_stream(source, shard=shard, **(SETTINGS | settings))
    batches = [[each["id"] for each in next(stream)] for _ in range(num_batches)]
    stream.close()
    return np.array(batches)


def test_every_epoch_is_another_permutation():
    order = ids(Numbers(24), 9).reshape(3, 24)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(24))
    assert all((a != b).any() for a, b in [order[[0, 1]], order[[1, 2]], order[[0, 2]]])
    assert (ids(Numbers(24), 3, seed=4) != order[0].reshape(3, 8)).any()


def test_without_shuffling_the_order_is_that_of_the_source():
    order = ids(Numbers(10), 3, shuffle=False)
    np.testing.assert_array_equal(order.ravel(), np.arange(24) % 10)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("broken", [(), (0, 7, 8, 19)])
def test_shards_are_contiguous_parts_of_the_same_batches(count, broken):
    source = Numbers(21, broken)
    parts = [ids(source, 7, Shard(index, count)) for index in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), ids(source, 7))


@pytest.mark.parametrize("start", [1, 5])
@pytest.mark.parametrize("broken", [(), (0, 7, 8, 19)])
def test_resumed_equals_uninterrupted(start, broken):
    source = Numbers(21, broken)
    np.testing.assert_array_equal(ids(source, 4, start=start), ids(source, start + 4)[start:])


@pytest.mark.parametrize("num_threads, buffer", [(0, 0), (0, 2), (1, 1), (8, 1), (16, 9)])
def test_threads_and_buffer_do_not_change_the_order(num_threads, buffer):
    source = Numbers(21, (4, 5))
    np.testing.assert_array_equal(
        ids(source, 6, num_threads=num_threads, buffer=buffer), ids(source, 6, num_threads=0, buffer=0)
    )


def test_a_corrupt_record_is_replaced_by_the_next_readable_one():
    broken = {2, 3, 11, 17, 20}
    order = ids(Numbers(21), 12).ravel()
    readable = [number not in broken for number in order]
    expected = [order[place + np.argmax(readable[place:])] for place in range(80)]
    np.testing.assert_array_equal(ids(Numbers(21, broken), 10).ravel(), expected)


def test_a_corrupt_record_is_named_once_and_only_when_it_was_met():
    stream = open_stream(Numbers(40, {9, 30}), shard=WHOLE, **(SETTINGS | dict(shuffle=False, buffer=9)))
    met = []
    for _ in range(10):  # two epochs
        next(stream)
        met.append(list(stream.skipped))
    first, second = "record 9 (no picture)", "record 30 (no picture)"
    assert met[:4] == [[], [first], [first], [first, second]]
    assert met[9] == [first, second]
    assert stream.position == 10


def test_too_many_corrupt_records_stop_the_stream():
    settings = SETTINGS | dict(shuffle=False, max_corrupt=2)
    stream = open_stream(Numbers(40, {1, 9, 18, 19, 25}), shard=WHOLE, **settings)
    next(stream), next(stream)
    with pytest.raises(UserError, match=r"by batch 2.*2 are allowed: record 1 \(no picture\); record 9"):
        next(stream)
    with pytest.raises(UserError, match="5 corrupt records by batch 0"):
        ids(Numbers(5, range(5)), 1, max_corrupt=100)


def test_other_errors_keep_their_type():
    class Gone(Numbers):
        def __getitem__(self, index):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        ids(Gone(5), 1)


def test_empty_sources_and_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="a batch of 8 does not divide among 3 processes"):
        ids(Numbers(5), 1, Shard(0, 3))
    with pytest.raises(UserError, match="no objects"):
        ids(Numbers(0), 1)


@pytest.mark.slow
def test_procedural_examples_are_rendered_as_the_objects_are():
    source = ProceduralSource(seed=5, first_object=20_100, size=16, num_views=2)
    settings = SETTINGS | dict(batch_size=4, shuffle=False)
    streams = [open_stream(source, shard=Shard(index, 2), start=1, **settings) for index in range(2)]
    examples = [example for stream in streams for example in next(stream)]
    rgb, alpha = stack_views(examples)
    for first in (0, 2):
        numbers = range(20_104 + first, 20_106 + first)
        truth = procedural.turntables(5, numbers, size=16, num_views=2)
        for row, number in enumerate(numbers):
            example = examples[first + row]
            assert example["id"] == f"procedural/{number}"
            assert example["caption"] == truth.captions[row]
            assert example["elevation_rad"] == truth.elevation_rad[row]
            np.testing.assert_array_equal(rgb[first + row], truth.views.rgb[row])
            np.testing.assert_array_equal(alpha[first + row], truth.views.alpha[row])
    for stream in streams:
        stream.close()
