"""What a traced program costs, from shapes alone, and what accelerators offer.

`plan` applies this to a config; the loop of training takes its FLOPs a second and their share of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, Literal, Var, jaxprs_in_params
from jaxtyping import PyTree

GB = 1e9


class Accelerator(NamedTuple):
    """One device.

    flops: bfloat16 FLOP/s of dense matrix products, at its peak.
    bandwidth: of its memory, in bytes/s.
    memory: in bytes.
    source: who says so.
    """

    flops: float
    bandwidth: float
    memory: float
    source: str


ACCELERATORS = {
    "a100": Accelerator(312e12, 2.039e12, 80 * GB, "NVIDIA A100 80GB SXM datasheet"),
    "h100": Accelerator(989e12, 3.35e12, 80 * GB, "NVIDIA H100 SXM datasheet, without sparsity"),
    "h200": Accelerator(989e12, 4.8e12, 141 * GB, "NVIDIA H200 SXM datasheet, without sparsity"),
    "b200": Accelerator(2250e12, 7.7e12, 180 * GB, "NVIDIA HGX B200 datasheet, without sparsity"),
    "tpu_v4": Accelerator(275e12, 1.2e12, 32 * GB, "cloud.google.com/tpu/docs/v4"),
    "tpu_v5e": Accelerator(197e12, 0.819e12, 16 * GB, "cloud.google.com/tpu/docs/v5e"),
    "tpu_v5p": Accelerator(459e12, 2.765e12, 95 * GB, "cloud.google.com/tpu/docs/v5p"),
    "tpu_v6e": Accelerator(918e12, 1.64e12, 32 * GB, "cloud.google.com/tpu/docs/v6e"),
}


def trace(function: Callable[..., Any], *shapes: PyTree) -> Jaxpr:
    """The program of one call with arguments of these shapes. Nothing is computed."""
    return jax.make_jaxpr(function)(*shapes).jaxpr


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of a program's convolutions and matrix products, 2 for each multiplication."""
    total = 0
    for equation in jaxpr.eqns:
        shapes, params = [_shaped(var).shape for var in equation.invars], equation.params
        outputs = sum(_shaped(var).size for var in equation.outvars)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * outputs * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            output_axis = params["dimension_numbers"].rhs_spec[0]
            each = math.prod(shapes[1]) // shapes[1][output_axis]
            # The gradient of a strided convolution dilates its input with zeros. They need no arithmetic.
            total += 2 * outputs * each // math.prod(params["lhs_dilation"])
        else:
            inner = sum(map(count_flops, jaxprs_in_params(params)))
            total += inner * (params["length"] if equation.primitive.name == "scan" else 1)
    return total


def kept_bytes(loss: Callable[..., Any], trained: PyTree, *rest: PyTree) -> int:
    """Bytes that the forward pass of `loss` keeps for the backward pass, beside the arguments.

    Args:
        trained: the argument that is differentiated.
        rest: the other arguments of `loss`.
    """

    def residuals(trained: PyTree, *rest: PyTree) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, *rest), trained)[1])

    jaxpr = trace(residuals, trained, *rest)
    arguments = set(jaxpr.invars)
    kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)} - arguments
    return sum(_var_bytes(var) for var in kept)


def peak_bytes(jaxpr: Jaxpr) -> int:
    """The most bytes that are alive at a time, beside arguments and results, if operations run as traced.

    This estimates what XLA needs, which fuses operations and chooses another order. For the tiny model on a
    CPU, XLA took 1.2 times as much for a call, the same for a training step, and with remat 2.1 times as much
    (4.4 times with its default scheduler, which favours concurrency).
    """
    variables = [{var for var in each.invars if not isinstance(var, Literal)} for each in jaxpr.eqns]
    last_use = {var: number for number, used in enumerate(variables) for var in used}
    results = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    others = {*jaxpr.constvars, *jaxpr.invars, *results}
    alive = peak = 0
    for number, (equation, used) in enumerate(zip(jaxpr.eqns, variables, strict=True)):
        made = {var for var in equation.outvars if var not in results}
        inner = max(map(peak_bytes, jaxprs_in_params(equation.params)), default=0)
        peak = max(peak, alive + sum(map(_var_bytes, made)) + inner)
        alive += sum(_var_bytes(var) for var in made if var in last_use)
        alive -= sum(_var_bytes(var) for var in used if last_use[var] == number and var not in others)
    return peak


def _var_bytes(var: Var) -> int:
    return _shaped(var).size * _shaped(var).dtype.itemsize


def _shaped(var: Var | Literal) -> ShapedArray:
    """The shape and the dtype of a variable, which every variable of the programs traced here has."""
    return cast(ShapedArray, var.aval)
