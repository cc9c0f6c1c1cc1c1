"""What `im3d train` trains: one module per task, named in `config.train.task`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from im3d_jax.data import Example
from im3d_jax.registry import Registry
from im3d_jax.sharding import PartitionRules
from im3d_jax.trainable import WhatTrains


@runtime_checkable
class Trainable(Protocol):
    """What a step of training needs of a task. Both are pure functions, which are traced.

    A batch is a tree of arrays [B, ...]. `stream` is what `Task.stream` returned.
    """

    def draw(self, key: PRNGKeyArray, num_examples: int, stream: Hashable) -> PyTree:
        """What is random of each example, [B, ...]. It depends on an example's row alone."""

    def loss(
        self, params: PyTree, constants: PyTree, batch: PyTree, draws: PyTree, stream: Hashable
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
        """(the mean over examples, sums over examples by name).

        Names that end in "_by_level" have a sum for each noise level, and their counts.
        """


@runtime_checkable
class Task(Trainable, Protocol):
    """The contract of a task. The loop knows nothing else of what it trains.

    Attributes:
        partition_rules: of the parameters, see `sharding`.
        constants: arrays that the loss takes and nothing trains.
    """

    partition_rules: PartitionRules
    constants: PyTree

    def init(self, key: PRNGKeyArray) -> dict:
        """Random parameters; a pure function, which is traced."""

    def load(self, path: str) -> dict:
        """The parameters of the file that `config.train.init_from` names, on the host.

        Raises UserError if they do not fit.
        """

    def stream(self, name: str) -> Hashable:
        """The settings of one of `config.train.streams`. A step is compiled for each different value."""

    def collate(self, examples: Sequence[Example]) -> PyTree:
        """The batch of some examples, on the host."""

    def flops(self, trains: WhatTrains, num_examples: int, num_views: int) -> float:
        """FLOPs of one step, forward and backward. trains: what trains."""

    def sample(self, params: PyTree, key: PRNGKeyArray) -> dict[str, Float[np.ndarray, "T H W 3"]]:
        """Videos to look at, by name, in [0, 1]."""

    def save(self, directory: Path, params: PyTree, metadata: dict[str, Any]) -> Path:
        """Writes the trained model as its users load it, and returns where."""


TASKS = Registry(
    key="config.train.task",
    attribute="build",
    ours={
        "turntable": "im3d_jax.tasks.turntable:build",
        "autoencoder": "im3d_jax.tasks.autoencoder:build",
    },
)
"""Functions of a config and a mesh that return a `Task`. They alone read the config of what is trained."""


def build(config: ConfigDict, mesh: Mesh) -> Task:
    """The task that `config.train.task` names. Raises UserError as `Registry.build` does."""
    return TASKS.build(config.train.task, {"config": config, "mesh": mesh}, Task)
