"""Guidance on the image and on the text, each with its own scale (Emu Video, arXiv 2311.10709, appendix)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from im3d_jax.diffusion.objective import Views


class Branch(StrEnum):
    """The conditions of one of the predictions that guidance combines."""

    NULL = "null"  # none: X(0)
    IMAGE = "image"  # the image alone: X(I)
    FULL = "full"  # the image and the prompt: X(I,p)


class Guidance(NamedTuple):
    """X(0) + w_i (X(I) - X(0)) + w_p (X(I,p) - X(I)), with w_i = `w_image` and w_p = `w_text`.

    X(0), X(I) and X(I,p) are the network's predictions without conditions, with the image, and with image and
    prompt. A weight is a number or one per view, [K]. It must be known before jit, because it decides which
    of the three are computed.
    """

    w_image: float | Sequence[float] | np.ndarray = 2.0
    w_text: float | Sequence[float] | np.ndarray = 7.5
    rescale: float = 0.0  # phi of Lin et al. 2023, in [0, 1]: draws the contrast back to that of X(I,p)

    def branch_weights(self) -> dict[Branch, np.ndarray]:
        """The predictions that are needed and their weights, [1, 1 or K, 1, 1, 1], which sum to 1."""
        w_image, w_text = (np.reshape(w, (1, -1, 1, 1, 1)).astype(np.float32) for w in self[:2])
        weights = {Branch.NULL: 1 - w_image, Branch.IMAGE: w_image - w_text, Branch.FULL: w_text}
        return {branch: weight for branch, weight in weights.items() if weight.any()}

    @property
    def num_evaluations(self) -> int:
        """Network evaluations per sampling step and asset: 3, less the predictions whose weight is 0."""
        return len(self.branch_weights())

    def predict(
        self,
        network: Callable[[Array, Array, Any], Array],
        noisy: Views,
        timestep: Num[Array, " B"],
        conditions: Mapping[str, Any],
    ) -> Views:
        """The guided prediction, from one call of `network` on a batch of num_evaluations * B.

        network(noisy, timestep, condition) predicts in its own space (epsilon, v or x0).
        conditions: for each `Branch` a pytree of arrays [B, ...]; those that `branch_weights` lacks are not
            used.
        """
        weights = self.branch_weights()
        batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(conditions[name] for name in weights))
        copies = len(weights)
        predictions = network(jnp.concatenate([noisy] * copies), jnp.concatenate([timestep] * copies), batch)
        return guide(predictions.reshape(copies, *noisy.shape), list(weights.values()), self.rescale)


def guide(
    predictions: Float[Array, "n B K h w c"],
    weights: Sequence[Float[np.ndarray, "1 _ 1 1 1"]],
    rescale: float = 0.0,
) -> Views:
    """The weighted sum of predictions, pulled by `rescale` in [0, 1] towards the last one's contrast.

    Guidance raises the standard deviation of a prediction. Lin et al. 2023 scale it back to that of the
    conditional prediction and mix the two results by `rescale`.
    """
    predictions = predictions.astype(jnp.float32)
    guided = sum(weight * prediction for weight, prediction in zip(weights, predictions, strict=True))
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    contrast = predictions[-1].std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-6)
    return guided * (rescale * contrast + 1 - rescale)
