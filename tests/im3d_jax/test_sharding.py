"""Meshes, what they divide, and which rows of a batch a process loads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from im3d_jax import sharding
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "text, expected",
    [("data=-1", (8, 1, 1)), ("data=-1,fsdp=4", (2, 4, 1)), ("fsdp=2, tensor=-1", (1, 2, 4))],
)
def test_one_axis_takes_the_devices_that_others_leave(text, expected):
    sizes = sharding.parse_mesh(text, 8)
    assert tuple(sizes[axis] for axis in sharding.AXES) == expected
    mesh = sharding.make_mesh(sizes)
    assert mesh.devices.shape == expected and len(set(mesh.devices.flat)) == 8
    assert sharding.batch_shares(mesh) == expected[0] * expected[1]


def test_meshes_that_cannot_be():
    for text in ("data=0", "data=-2"):
        with pytest.raises(UserError, match="AXIS=NUMBER with a number of at least 1"):
            sharding.parse_mesh(text, 8)
    with pytest.raises(UserError, match="AXIS=NUMBER with a number of at least 1"):
        sharding.parse_mesh("data=-1")
    for text in ("data=-1,fsdp=3", "data=-1,fsdp=16"):
        with pytest.raises(UserError, match="does not divide 8 devices"):
            sharding.parse_mesh(text, 8)
    with pytest.raises(UserError, match="one -1"):
        sharding.parse_mesh("data=-1,fsdp=-1", 8)
    with pytest.raises(UserError, match="asks for 3 x 1 x 1 devices, there are 8"):
        sharding.make_mesh({"data": 3})


def test_moments_lie_where_their_parameters_do():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = ((r"out/kernel", ("mlp", "embed")), (r"/kernel", ("embed", "mlp")))
    shapes = {"a/kernel": (3, 4, 8), "out/kernel": (8, 4), "a/bias": (8,), "odd/kernel": (3, 4)}
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    places = sharding.of_tree({"mu": [tree]}, rules, mesh)["mu"][0]
    assert {path: place.spec for path, place in places.items()} == {
        "a/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "out/kernel": PartitionSpec("tensor", "fsdp"),
        "a/bias": PartitionSpec(),
        "odd/kernel": PartitionSpec(None, "tensor"),
    }


def test_each_device_keeps_its_part_and_the_host_gets_the_whole():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    value = np.arange(32.0).reshape(8, 4)
    placed = sharding.place(value, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), jnp.bfloat16)
    assert placed.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(sharding.to_host(placed), value)


@pytest.mark.parametrize(
    "shape, num_local, process, expected",
    [
        ((8, 1, 1), 4, 0, (0, 2)),
        ((8, 1, 1), 4, 1, (1, 2)),
        ((2, 4, 1), 2, 3, (3, 4)),
        ((2, 1, 4), 4, 1, (1, 2)),  # tensor within a process
        ((1, 1, 8), 4, 1, (0, 1)),  # tensor over both: both load all
        ((4, 1, 2), 1, 3, (1, 4)),  # two processes for each row
    ],
)
def test_rows_of_a_process(shape, num_local, process, expected, monkeypatch):
    """Devices numbered through, `num_local` of them on each process, as real meshes have them."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
    local = list(mesh.devices.flat)[process * num_local : (process + 1) * num_local]

    def addressable(placement, global_shape):
        found = placement.devices_indices_map(global_shape)
        return {device: found[device] for device in local}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    assert sharding.rows_of_process(mesh) == expected


def test_rows_that_do_not_follow_one_another_are_refused(monkeypatch):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    rows = {n: (slice(row, row + 1),) for n, row in enumerate((0, 2))}
    monkeypatch.setattr(
        sharding, "along_batch", lambda _: SimpleNamespace(addressable_devices_indices_map=lambda _: rows)
    )
    with pytest.raises(UserError, match=r"gives a process parts \[0, 2\]"):
        sharding.rows_of_process(mesh)
