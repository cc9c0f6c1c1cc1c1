"""Batches made ahead: their order, their errors, their end, and where they lie."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from im3d_jax import sharding
from im3d_jax.training.feed import AHEAD, Batch, Feed, over_mesh


def test_batches_come_in_order_and_only_a_few_ahead():
    read, counts = [], {"a": itertools.count(), "b": itertools.count()}

    def make(name):
        read.append(name)
        return Batch(name, next(counts[name]), [], [])

    order = list("aabaabaab")
    with Feed(order, make) as feed:
        for number, name in enumerate(order):
            batch, wait_s = next(feed)
            assert batch.stream == name and wait_s >= 0
            assert len(read) <= number + 1 + AHEAD + 1  # asked for, waiting, in the making
            assert batch.arrays == order[:number].count(name)


def test_waiting_is_counted():
    gate = threading.Event()

    def slow(name):
        gate.wait()
        return Batch(name, None, [], [])

    with Feed("a", slow) as feed:
        threading.Timer(0.2, gate.set).start()
        started = time.monotonic()
        _, wait_s = next(feed)
        assert 0.1 < wait_s <= time.monotonic() - started


def test_errors_reach_the_loop():
    def broken(name):
        if name == "b":
            raise ValueError("no b")
        return Batch(name, None, [], [])

    with Feed("aab", broken) as feed:
        next(feed)
        next(feed)
        with pytest.raises(ValueError, match="no b"):
            next(feed)


def test_it_ends_while_batches_wait():
    started = threading.active_count()
    with Feed(itertools.repeat("a"), lambda name: Batch(name, None, [], [])) as feed:
        next(feed)
    assert threading.active_count() == started


def test_rows_are_divided_over_the_mesh():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = np.arange(24.0).reshape(8, 3)
    placed = over_mesh({"x": rows, "text": (rows[:, ::2],)}, mesh)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, placed, {"x": rows, "text": (rows[:, ::2],)})


def test_rows_on_a_device_do_not_come_to_the_host():
    rows = jax.numpy.arange(24.0).reshape(8, 3)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        (placed,) = over_mesh((rows,), sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
    np.testing.assert_array_equal(placed, rows)
