"""Low-rank adapters of a tree of parameters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A kernel W [..., in, out] with an adapter stands for W + (alpha / rank) A B, where A is [..., in, rank] and B
is [rank, out]. For a convolution A has the extent of W and B has none, as in PEFT. B starts at zero, so that
training starts at W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax import random_streams
from im3d_jax.lora import factored
from im3d_jax.sharding import PartitionRules, logical_axes
from recon_torch.errors import UserError, quoted

T = TypeVar("T")

A, B = ".lora_A", ".lora_B"
"""What is appended to a kernel's path to name the two factors of its adapter."""


class Adapter(NamedTuple):
    """The adapter of one kernel [..., in, out]. scale: alpha / rank."""

    a: Float[Array | np.ndarray, "*extent in rank"]
    b: Float[Array | np.ndarray, "rank out"]
    scale: float


def merged(kernel: Any, adapter: Adapter, strength: float = 1.0) -> Any:
    """The kernel plus `strength` times what the adapter adds, which is summed in float32; an array as it was.

    strength: -1 takes off what was added, to float rounding.
    """
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    added = xp.tensordot(adapter.a, adapter.b, 1)
    return (kernel.astype(np.float32) + np.float32(strength * adapter.scale) * added).astype(kernel.dtype)


@dataclass(frozen=True)
class Adapters:
    """Trains adapters and nothing else, see `trainable.WhatTrains`.

    Attributes:
        rank: of the adapters.
        alpha: the adapters are scaled by alpha / rank.
        targets: regular expression found in the paths of the kernels that get one.
    """

    rank: int
    alpha: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def split(self, params: Mapping[str, Any], key: PRNGKeyArray) -> tuple[dict[str, Any], dict[str, Any]]:
        """(adapters, all parameters) by path.

        A is uniform within +-1 / sqrt(fan in), which is Kaiming's as PEFT has it; B is zero. What is drawn
        for a kernel depends on its path alone.

        Raises UserError if there is no target, and for a rank that is larger than the width of one.
        """
        frozen = traverse_util.flatten_dict(params, sep="/")
        trained = {}
        for path in self._targets(frozen):
            *rest, width = frozen[path].shape
            bound = 1 / math.sqrt(math.prod(rest))
            draw = random_streams.stream(key, path + A)
            trained[path + A] = jax.random.uniform(draw, (*rest, self.rank), minval=-bound, maxval=bound)
            trained[path + B] = jnp.zeros((self.rank, width))
        return trained, frozen

    def join(self, frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
        """The parameters with the adapters merged into their kernels: nested dictionaries."""
        adapters = paired(trained, self.scale)
        made = {
            path: merged(value, adapters[path]) if path in adapters else value
            for path, value in frozen.items()
        }
        return traverse_util.unflatten_dict(made, sep="/")

    def call(self, function: Callable[[dict], T], frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> T:
        """`function(join(frozen, trained))` without the product of the factors, see `factored.call`."""
        return factored.call(function, frozen, paired(trained, self.scale))

    def rules(self, trained: Mapping[str, Any], rules: PartitionRules) -> PartitionRules:
        """The rules with those of the adapters: an axis lies where that axis of the kernel does.

        The axis of the rank is whole on every device.
        """
        own = []
        for path in trained:
            kernel, is_a = path.removesuffix(A).removesuffix(B), path.endswith(A)
            axes = logical_axes(kernel, rules)
            names = (*axes[:-1], "rank") if is_a else ("rank", axes[-1]) if axes else ()
            own.append((f"^{re.escape(path)}$", names if axes else ()))
        return (*own, *rules)

    def _targets(self, params: Mapping[str, Any]) -> list[str]:
        if not params:
            raise UserError(
                "config.train.lora: the backbone's weights are no JAX arrays; nothing can adapt them"
            )
        kernels = [path for path, x in params.items() if len(x.shape) > 1]
        found = [path for path in kernels if re.search(self.targets, path)]
        if not found:
            first = min(kernels, default="none, because it has none")
            raise UserError(
                f"config.train.lora.targets: {quoted(self.targets)} matches no kernel; name some of the"
                f" backbone's, such as {first}"
            )
        for path in found:
            *rest, width = params[path].shape
            if self.rank > min(math.prod(rest), width):
                raise UserError(
                    f"config.train.lora.rank is {self.rank}, more than the width of {path}"
                    f" {tuple(params[path].shape)}; give a smaller one, or targets without it"
                )
        return found


def paired(factors: Mapping[str, Any], scale: float) -> dict[str, Adapter]:
    """The adapters by the paths of their kernels, of factors by `A` and `B` of these paths."""
    return {
        path.removesuffix(A): Adapter(a, factors[path.removesuffix(A) + B], scale)
        for path, a in factors.items()
        if path.endswith(A)
    }
