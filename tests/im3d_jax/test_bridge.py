"""Views share their pointer with torch both ways; copies are made once, and only where asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from im3d_jax import bridge

SHAPE = (4, 8, 8, 3)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or jax.default_backend() != "gpu",
            reason="needs CUDA in both torch and JAX",
        ),
    ),
]
DTYPES = [(torch.float32, jnp.float32), (torch.bfloat16, jnp.bfloat16), (torch.uint8, jnp.uint8)]


def shared(device, dtype=torch.float32):
    tensor = torch.arange(np.prod(SHAPE), device=device).reshape(SHAPE).to(dtype)
    return tensor.share_memory_()


class Operations(TorchDispatchMode):
    """The names of the torch operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("torch_dtype", "jax_dtype"), DTYPES)
def test_a_view_shares_the_pointer_and_sees_later_writes(device, torch_dtype, jax_dtype):
    tensor = shared(device, torch_dtype)
    view = bridge.as_jax(tensor)
    assert view.unsafe_buffer_pointer() == tensor.data_ptr()
    assert view.dtype == jax_dtype and view.shape == SHAPE
    np.testing.assert_array_equal(np.asarray(view, np.float32), tensor.float().cpu().numpy())

    tensor.fill_(7)
    if device == "cuda":
        torch.cuda.synchronize()
    assert float(jnp.max(view)) == float(jnp.min(view)) == 7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("torch_dtype", "jax_dtype"), DTYPES)
def test_write_copies_exactly_once(device, torch_dtype, jax_dtype):
    tensor = shared(device, torch_dtype).zero_()
    array = jnp.arange(np.prod(SHAPE)).reshape(SHAPE).astype(jax_dtype)
    assert torch.from_dlpack(array).data_ptr() == array.unsafe_buffer_pointer()  # no copy on the way to torch

    pointer = tensor.data_ptr()
    with Operations() as operations:
        bridge.write(array, tensor)
    assert [name for name in operations.names if "copy" in name or "clone" in name] == ["copy_"]
    assert tensor.data_ptr() == pointer and tensor.is_shared()
    np.testing.assert_array_equal(tensor.float().cpu().numpy(), np.asarray(array, np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_survives_the_reuse_of_the_tensor(device):
    tensor = shared(device)
    expected = tensor.cpu().numpy().copy()
    copy = bridge.copy_to_jax(tensor)
    tensor.zero_()
    assert copy.unsafe_buffer_pointer() != tensor.data_ptr()
    np.testing.assert_array_equal(np.asarray(copy), expected)


def test_a_round_trip_through_a_jitted_function():
    renders, views = shared("cpu"), shared("cpu").zero_()
    bridge.write(jax.jit(lambda x: 2 * x + 1)(bridge.as_jax(renders)), views)
    torch.testing.assert_close(views, 2 * renders + 1, rtol=0, atol=0)


def test_a_view_sees_what_another_process_writes():
    tensor = shared("cpu")
    view = bridge.as_jax(tensor)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=torch.nn.init.constant_, args=(tensor, 3.0)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert float(jnp.max(view)) == float(jnp.min(view)) == 3


def test_a_tensor_under_optimisation_can_be_viewed():
    tensor = torch.ones(16, requires_grad=True)
    assert bridge.as_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 6).t(),
        torch.zeros(8, 4)[::2],
        torch.zeros(33)[1:],  # 4 bytes off the alignment that JAX wants
        torch.zeros(16, dtype=torch.int64),
        torch.zeros(16, dtype=torch.float64),
    ],
    ids=["transposed", "strided", "unaligned", "int64", "float64"],
)
def test_what_would_need_a_copy_is_refused(tensor):
    with pytest.raises(ValueError):
        bridge.as_jax(tensor)


@pytest.mark.parametrize(
    "array", [jnp.zeros(SHAPE[1:]), jnp.zeros(SHAPE, jnp.bfloat16)], ids=["shape", "dtype"]
)
def test_write_neither_broadcasts_nor_converts(array):
    tensor = torch.ones(SHAPE)
    with pytest.raises(ValueError, match="does not go into"):
        bridge.write(array, tensor)
    assert bool((tensor == 1).all())
