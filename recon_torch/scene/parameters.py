"""The tensors that a fit optimises, each with an optimiser of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Parameters:
    """Named tensors, each with an Adam of its own, as gsplat's densification needs them.

    Attributes:
        tensors, optimizers: by the names of the parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device):
        """Copies the tensors."""
        self.tensors = {
            name: torch.nn.Parameter(tensor.detach().to(device, copy=True))
            for name, tensor in tensors.items()
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam([tensor], eps=1e-15, fused=True) for name, tensor in self.tensors.items()
        }

    def step(self, rates: Mapping[str, float]) -> None:
        """Follows the gradients, by a learning rate for each tensor, and clears them."""
        for name, rate in rates.items():
            self.optimizers[name].param_groups[0]["lr"] = rate
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors and of the optimisers' states."""
        return {
            "params": {name: tensor.detach().clone() for name, tensor in self.tensors.items()},
            "optimizers": {name: copy.deepcopy(each.state_dict()) for name, each in self.optimizers.items()},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Parameters:
        """Parameters as they were when `state_dict` was called."""
        parameters = cls(state["params"], device)
        for name, optimizer in parameters.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
        return parameters
