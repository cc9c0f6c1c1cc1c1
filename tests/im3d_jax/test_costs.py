"""The cost of traced programs against counts by hand and against XLA's own."""

import jax
import jax.numpy as jnp
import pytest

from im3d_jax import costs


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_flops_of_products_convolutions_and_loops():
    def product(x, w):
        return x @ w

    def flops(function, *shapes):
        return costs.count_flops(costs.trace(function, *shapes))

    x, w = shape(4, 5, 6), shape(6, 7)
    assert flops(product, x, w) == 2 * 4 * 5 * 6 * 7
    assert flops(jax.grad(lambda x, w: product(x, w).sum(), (0, 1)), x, w) == 3 * 2 * 4 * 5 * 6 * 7
    assert flops(jax.grad(jax.checkpoint(lambda w, x: jnp.sin(product(x, w)).sum())), w, x) == 3 * 1680
    assert flops(lambda x, w: jax.lax.map(lambda row: row @ w, x), x, w) == 2 * 4 * 5 * 6 * 7
    assert flops(jax.nn.dot_product_attention, *[shape(2, 9, 3, 8)] * 3) == 2 * 2 * 2 * 3 * 9 * 9 * 8

    def convolve(x, w, stride=2):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)

    x, w = shape(2, 16, 16, 5), shape(3, 3, 5, 7)
    forward = 2 * 2 * 8 * 8 * 9 * 5 * 7
    assert flops(convolve, x, w) == forward
    assert flops(jax.grad(lambda x, w: convolve(x, w).sum(), (0, 1)), x, w) == pytest.approx(3 * forward)


def test_bytes_that_are_alive_and_kept():
    x = shape(1000)
    program = costs.trace(lambda x: (jnp.sin(x) * jnp.cos(x)).sum(), x)
    assert costs.peak_bytes(program) == 3 * 4000
    nested = costs.trace(lambda x: jax.jit(lambda y: jnp.sin(jnp.sin(y)).sum())(jnp.cos(x)), x)
    assert costs.peak_bytes(nested) == pytest.approx(3 * 4000, abs=8)

    def loss(trained, data):
        return (jnp.sin(trained) * data).sum()

    assert costs.kept_bytes(loss, x, x) == 4000  # the cosine; `data` is an argument
    assert costs.kept_bytes(jax.checkpoint(loss), x, x) == 0


def test_peak_is_near_what_xla_allocates():
    def loss(weights, x):
        for weight in weights:
            x = x @ weight
        return jnp.square(x).sum()

    arguments = [shape(64, 64)] * 6, shape(1024, 64)
    predicted = costs.peak_bytes(costs.trace(jax.grad(loss), *arguments))
    allocated = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert predicted == pytest.approx(allocated, rel=0.35)
