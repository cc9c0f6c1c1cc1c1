"""What `im3d train` trains: one module per task, named in `config.train.task`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from im3d_jax.data.pipeline import Example
from im3d_jax.registry import Registry
from im3d_jax.sharding import PartitionRules

Batch = Mapping[str, Any]
"""Arrays [B, ...] by name, or tuples of them."""


@runtime_checkable
class Task(Protocol):
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
        """The parameters of the file that `config.train.init_from` names, on the host."""

    def stream(self, name: str) -> Hashable:
        """Settings of one stream of `config.train.streams`; a step is compiled for each value."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples of `data.pipeline`, on the host."""

    def draw(self, key: PRNGKeyArray, num_examples: int, stream: Hashable) -> PyTree:
        """What is random of each example, [B, ...]. It depends on an example's row alone."""

    def loss(
        self, params: PyTree, constants: PyTree, batch: Batch, draws: PyTree, stream: Hashable
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """(the mean over examples, sums over examples by name); a pure function, which is traced.

        Names that end in "_by_level" have a sum for each noise level.
        """

    def flops(self, trainable: str, name: str) -> float:
        """FLOPs of one step of a stream, forward and backward. trainable: regex of what trains."""

    def sample(self, params: PyTree, key: PRNGKeyArray) -> dict[str, Float[np.ndarray, "T H W 3"]]:
        """Videos to look at, by name, in [0, 1]."""

    def save(self, directory: Path, params: PyTree, metadata: Mapping[str, Any]) -> Path:
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


def build(config, mesh: Mesh) -> Task:
    """The task that `config.train.task` names. Raises UserError as `Registry.build` does."""
    return TASKS.build(config.train.task, {"config": config, "mesh": mesh}, Task)
