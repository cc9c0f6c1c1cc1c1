"""What of a network's parameters trains: a part of them, or adapters of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import PRNGKeyArray

from im3d_jax.lora.adapters import Adapters
from im3d_jax.params import join, split_params
from im3d_jax.sharding import PartitionRules
from im3d_jax.training_settings import TrainSettings

T = TypeVar("T")


@runtime_checkable
class WhatTrains(Protocol):
    """Divides parameters into those that train and those that stay frozen, and puts them together again.

    Both are dictionaries by path. All methods but `call` also take shapes in place of arrays, under
    `jax.eval_shape`.
    """

    def split(self, params: Mapping[str, Any], key: PRNGKeyArray) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, frozen), at the start of training.

        Args:
            params: nested dictionaries.
            key: of what is drawn beside them.

        Raises UserError if nothing trains.
        """

    def join(self, frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
        """The parameters as the network takes them: nested dictionaries."""

    def call(self, function: Callable[[dict], T], frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> T:
        """`function(join(frozen, trained))`, in whatever way costs least to compute and differentiate."""

    def rules(self, trained: Mapping[str, Any], rules: PartitionRules) -> PartitionRules:
        """The partition rules of all that is trained and frozen, of those of the network's parameters."""


@dataclass(frozen=True)
class Part:
    """Trains the parameters in whose paths a regular expression is found."""

    pattern: str

    def split(self, params: Mapping[str, Any], key: PRNGKeyArray) -> tuple[dict[str, Any], dict[str, Any]]:
        return split_params(params, self.pattern)

    def join(self, frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict:
        return join(frozen, trained)

    def call(self, function: Callable[[dict], T], frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> T:
        return function(join(frozen, trained))

    def rules(self, trained: Mapping[str, Any], rules: PartitionRules) -> PartitionRules:
        return rules


def chosen(settings: TrainSettings) -> WhatTrains:
    """What `config.train` trains."""
    lora = settings.lora
    if not lora.rank:
        return Part(settings.trainable)
    return Adapters(lora.rank, lora.alpha or float(lora.rank), lora.targets)
