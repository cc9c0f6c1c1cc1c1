"""Calls a function of parameters with adapters as x W + scale (x A) B, in place of x (W + scale A B).

A backbone is any pure function of its parameters, so this looks at what JAX traces of it. Where a kernel is
multiplied or convolved with, the two thin products of its adapter are added. The sum of W and A B is never
made there, nor is the gradient of W, which is as large as W and costs as much to compute as the forward pass.
Wherever else a kernel goes, the sum is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

T = TypeVar("T")


class Factored(NamedTuple):
    """A kernel [..., in, out] and its adapter: it stands for kernel + scale a b. A tree of arrays."""

    kernel: Array
    a: Array
    b: Array
    scale: Array

    def whole(self) -> Array:
        """The sum, of the kernel's type."""
        added = self.scale * jnp.tensordot(self.a, self.b, 1)
        return (self.kernel.astype(added.dtype) + added).astype(self.kernel.dtype)


def call(function: Callable[[dict], T], params: Mapping[str, Any], adapters: Mapping[str, Any]) -> T:
    """`function` of the parameters, nested, with their adapters.

    Args:
        function: can be traced by JAX.
        params: by path.
        adapters: a, b and scale (`adapters.Adapter`) by the paths of the kernels.
    """
    nested = traverse_util.unflatten_dict(dict(params), sep="/")
    traced, shape = jax.make_jaxpr(function, return_shape=True)(nested)
    given = traverse_util.unflatten_dict(
        {path: _factored(x, adapters[path]) if path in adapters else x for path, x in params.items()}, sep="/"
    )
    leaves = jax.tree.leaves(given, is_leaf=_is_factored)
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(traced.jaxpr, traced.consts, *leaves))


def _factored(kernel: Array, adapter: Any) -> Factored:
    return Factored(kernel, adapter.a, adapter.b, jnp.asarray(adapter.scale, jnp.float32))


def _is_factored(value: Any) -> bool:
    return isinstance(value, Factored)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
    """The outputs of a traced program, of whose arguments some may be `Factored`."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        outputs: Sequence[Any] | None = None
        if any(map(_is_factored, inputs)):
            rule = RULES.get(equation.primitive.name)
            outputs = rule(jaxpr, equation, *inputs) if rule else None
            inputs = inputs if outputs is not None else [_whole(each) for each in inputs]
        if outputs is None:
            outputs = _bind(jaxpr, equation, *inputs)
        values |= zip(equation.outvars, outputs, strict=True)
    return [_whole(read(variable)) for variable in jaxpr.outvars]


def _whole(value: Any) -> Any:
    return value.whole() if _is_factored(value) else value


def _bind(jaxpr: Jaxpr, equation: JaxprEqn, *inputs: Any) -> Sequence[Any]:
    """The outputs of one operation of a program, as they would be without this module."""
    pairs = zip(equation.invars, inputs, strict=True)
    given = {variable: value for variable, value in pairs if not isinstance(variable, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*given], outvars=equation.outvars, eqns=[equation])
    return jax.core.eval_jaxpr(alone, (), *given.values())


# ---- Operations that take a factored kernel; None: they do not in this case ----


def _convert(jaxpr: Jaxpr, equation: JaxprEqn, factored: Factored) -> list[Factored]:
    dtype = equation.params["new_dtype"]
    kernel, a, b = (each.astype(dtype) for each in (factored.kernel, factored.a, factored.b))
    return [Factored(kernel, a, b, factored.scale)]


def _product(jaxpr: Jaxpr, equation: JaxprEqn, x: Any, kernel: Any) -> list[Array] | None:
    """x [..., in] times kernel [in, out], also with several axes in place of `in`."""
    (_, contracted), (_, batched) = equation.params["dimension_numbers"]
    is_linear = not batched and sorted(contracted) == [*range(np.ndim(_first(kernel)) - 1)]
    if _is_factored(x) or not is_linear:
        return None
    how = {name: equation.params[name] for name in ("precision", "preferred_element_type")}
    (made,) = _bind(jaxpr, equation, x, kernel.kernel)
    thin = lax.dot_general(x, kernel.a, equation.params["dimension_numbers"], **how)
    return [_add(made, thin, kernel, thin.ndim - 1)]


def _convolution(jaxpr: Jaxpr, equation: JaxprEqn, x: Any, kernel: Any) -> list[Array] | None:
    """x convolved with kernel [..., in, out], without groups."""
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["feature_group_count"], equation.params["batch_group_count"]
    if _is_factored(x) or groups != (1, 1) or numbers.rhs_spec[0] != kernel.kernel.ndim - 1:
        return None
    (made,) = _bind(jaxpr, equation, x, kernel.kernel)
    (thin,) = _bind(jaxpr, equation, x, kernel.a)
    return [_add(made, thin, kernel, numbers.out_spec[1])]


def _first(kernel: Any) -> Any:
    return kernel.kernel if _is_factored(kernel) else kernel


def _add(made: Array, thin: Array, kernel: Factored, features: int) -> Array:
    """x W plus scale (x A) B, where `thin` is x A and `features` the axis of its rank."""
    wide = lax.dot_general(thin, kernel.b.astype(thin.dtype), (((features,), (0,)), ((), ())))
    added = kernel.scale * jnp.moveaxis(wide, -1, features).astype(jnp.float32)
    return made + added.astype(made.dtype)


def _inner(jaxpr: Jaxpr, equation: JaxprEqn, *inputs: Any) -> list[Any]:
    inner: ClosedJaxpr = equation.params["jaxpr"]
    return _evaluate(inner.jaxpr, inner.consts, *inputs)


def _checkpoint(jaxpr: Jaxpr, equation: JaxprEqn, *inputs: Any) -> list[Any]:
    """What is computed again in the backward pass still is."""
    how = {name: equation.params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(partial(_evaluate, equation.params["jaxpr"], ()), **how)(*inputs)


RULES: dict[str, Callable[..., list[Any] | None]] = {
    "convert_element_type": _convert,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "jit": _inner,
    "checkpoint": _checkpoint,
}
