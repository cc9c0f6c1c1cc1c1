"""Guidance on the image and on the text, each with its own scale (Emu Video, arXiv 2311.10709, appendix).

A scale may differ from view to view (SVD, SV3D) and change with the noise level, and guidance may be left out
above or below some noise level (Kynkaanniemi et al. 2024, https://arxiv.org/abs/2404.07724). Where it is left
out, the network is evaluated once, on all conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from im3d_jax.diffusion.objective import Views
from im3d_jax.settings import TextToImageSettings, VideoSettings

Scale = float | Sequence[float] | np.ndarray
"""A number, or one for each view, [K]."""


class Branch(StrEnum):
    """The conditions of one of the predictions that guidance combines.

    Without a prompt means with the negative prompt where there is one.
    """

    NULL = "null"  # none: X(0)
    IMAGE = "image"  # the image alone: X(I)
    FULL = "full"  # the image and the prompt: X(I,p)


class Guidance(NamedTuple):
    """X(0) + w_i (X(I) - X(0)) + w_p (X(I,p) - X(I)), with w_i = `w_image` and w_p = `w_text`.

    X(0), X(I) and X(I,p) are the network's predictions without conditions, with the image, and with image and
    prompt.

    Attributes:
        w_image, w_text: the scales, in pure noise if they change with the noise level.
        rescale: phi of Lin et al. 2023, in [0, 1]: draws the contrast back to that of X(I,p).
        w_image_end, w_text_end: the scales in clean views. Between the two they are linear in sigma; None
            stands for scales that do not change.
        interval: the noise levels sigma, from the first to the second, at which there is guidance.
    """

    w_image: Scale = 2.0
    w_text: Scale = 7.5
    rescale: float = 0.0
    w_image_end: Scale | None = None
    w_text_end: Scale | None = None
    interval: Sequence[float] = (0.0, 1.0)

    @classmethod
    def of_video(cls, settings: VideoSettings) -> Guidance:
        """The guidance of videos."""
        return cls(
            settings.w_image,
            settings.w_text,
            settings.rescale,
            settings.w_image_end,
            settings.w_text_end,
            settings.guidance_interval,
        )

    @classmethod
    def of_image(cls, settings: TextToImageSettings) -> Guidance:
        """The guidance of pictures, which are drawn without an image: X(I) is X(0)."""
        w_text, end = settings.w_text, settings.w_text_end
        return cls(w_text, w_text, settings.rescale, end, end, settings.guidance_interval)

    def with_scales(self, change: Callable[[Any], Any]) -> Guidance:
        """The guidance with what `change` makes of each of the scales that there are."""
        names = ("w_image", "w_text", "w_image_end", "w_text_end")
        scales = {name: getattr(self, name) for name in names}
        return self._replace(**{name: change(each) for name, each in scales.items() if each is not None})

    def weights(self, sigma: float) -> dict[Branch, Float[np.ndarray, "1 _ 1 1 1"]]:
        """The predictions that are needed at a noise level and their weights, which sum to 1."""
        if not self.interval[0] <= sigma <= self.interval[1]:
            return {Branch.FULL: np.ones((1, 1, 1, 1, 1), np.float32)}
        w_image = _at(sigma, self.w_image, self.w_image_end)
        w_text = _at(sigma, self.w_text, self.w_text_end)
        weights = {Branch.NULL: 1 - w_image, Branch.IMAGE: w_image - w_text, Branch.FULL: w_text}
        return {branch: weight for branch, weight in weights.items() if weight.any()}

    def evaluations(self, sigmas: Sequence[float] | Float[np.ndarray, " T"]) -> list[int]:
        """Network evaluations per asset of a step at each of these levels: 3, less those of weight 0."""
        return [len(self.weights(float(sigma))) for sigma in sigmas]


def _at(sigma: float, scale: Scale, end: Scale | None) -> Float[np.ndarray, "1 _ 1 1 1"]:
    """A scale at a noise level, for each view or for all."""
    start = np.asarray(scale, np.float64)
    now = start if end is None else np.asarray(end) + (start - np.asarray(end)) * sigma
    return np.reshape(now, (1, -1, 1, 1, 1)).astype(np.float32)


def predict(
    network: Callable[[Array, Array, Any], Array],
    noisy: Views,
    timestep: Num[Array, " B"],
    conditions: Mapping[str, Any],
    weights: Mapping[Branch, Float[Array, "1 _ 1 1 1"] | Float[np.ndarray, "1 _ 1 1 1"]],
    rescale: float = 0.0,
) -> Views:
    """The guided prediction, from one call of `network` on a batch of len(weights) * B.

    network(noisy, timestep, condition) predicts in its own space (epsilon, v, flow or x0).
    conditions: for each `Branch` a pytree of arrays [B, ...]; those that `weights` lacks are not used.
    weights: of `Guidance.weights`. Which there are has to be known before jit; their values may be traced.
    """
    branches = [branch for branch in Branch if branch in weights]  # jit passes dictionaries sorted by name
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(conditions[name] for name in branches))
    copies = len(branches)
    predictions = network(jnp.concatenate([noisy] * copies), jnp.concatenate([timestep] * copies), batch)
    return guide(predictions.reshape(copies, *noisy.shape), [weights[each] for each in branches], rescale)


def guide(
    predictions: Float[Array, "n B K h w c"],
    weights: Sequence[Float[Array, "1 _ 1 1 1"] | Float[np.ndarray, "1 _ 1 1 1"]],
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
