"""Noise schedules, noising, prediction types and the training loss (Sec. 3.1). Pure functions of arrays.

The paper noises the views J by J_t = sqrt(1 - s_t^2) J + s_t eps and minimises w_t |eps_hat - eps|^2. Here
the two factors are alpha_t and sigma_t, alpha^2 + sigma^2 = 1 (variance preserving), and a network may
predict any of

    "epsilon"  eps                    (Ho et al. 2020, https://arxiv.org/abs/2006.11239)
    "v"        alpha eps - sigma x0   (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)
    "x0"       x0

Clean and noisy arrays are [B, K, h, w, c]; alpha and sigma are one number per asset, [B], or a scalar.
Whatever the network's own precision, everything here is float32.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.diffusion.schedules import MIN_LEVEL
from recon_torch.errors import UserError

PredictionType = Literal["epsilon", "v", "x0"]

PREDICTION_TYPES = ("epsilon", "v", "x0")


def expand(per_asset: Float[Array, " *B"], like: Array) -> Array:
    """Append axes of length 1 until `per_asset` broadcasts against `like`: [B] -> [B, 1, 1, 1, 1]."""
    per_asset = jnp.asarray(per_asset, jnp.float32)
    return per_asset.reshape(per_asset.shape + (1,) * (like.ndim - per_asset.ndim))


def add_noise(
    x0: Float[Array, "B K h w c"],
    eps: Float[Array, "B K h w c"],
    alpha: Float[Array, " *B"],
    sigma: Float[Array, " *B"],
) -> Float[Array, "B K h w c"]:
    """J_t = alpha J + sigma eps (Sec. 3.1)."""
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def target(
    prediction_type: PredictionType,
    x0: Float[Array, "B K h w c"],
    eps: Float[Array, "B K h w c"],
    alpha: Float[Array, " *B"],
    sigma: Float[Array, " *B"],
) -> Float[Array, "B K h w c"]:
    """What a perfect network of this type would return."""
    _check_type(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "x0":
        return x0
    return expand(alpha, x0) * eps - expand(sigma, x0) * x0


def to_x0(
    prediction_type: PredictionType,
    prediction: Float[Array, "B K h w c"],
    noisy: Float[Array, "B K h w c"],
    alpha: Float[Array, " *B"],
    sigma: Float[Array, " *B"],
) -> Float[Array, "B K h w c"]:
    """The clean views that a prediction implies.

    Exact at every level for "v" and "x0". From "epsilon" it is (x - sigma eps) / alpha with alpha held at
    2^-12 or above: at alpha = 0 epsilon does not determine the clean views, and the value is finite but means
    nothing.
    """
    _check_type(prediction_type)
    prediction, alpha, sigma = prediction.astype(jnp.float32), expand(alpha, noisy), expand(sigma, noisy)
    if prediction_type == "x0":
        return prediction
    if prediction_type == "v":
        return alpha * noisy - sigma * prediction
    return (noisy - sigma * prediction) / jnp.maximum(alpha, MIN_LEVEL)


def to_eps(
    prediction_type: PredictionType,
    prediction: Float[Array, "B K h w c"],
    noisy: Float[Array, "B K h w c"],
    alpha: Float[Array, " *B"],
    sigma: Float[Array, " *B"],
) -> Float[Array, "B K h w c"]:
    """The noise that a prediction implies: the mirror of `to_x0`, so from "x0" sigma is held at 2^-12."""
    _check_type(prediction_type)
    prediction, alpha, sigma = prediction.astype(jnp.float32), expand(alpha, noisy), expand(sigma, noisy)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v":
        return sigma * noisy + alpha * prediction
    return (noisy - alpha * prediction) / jnp.maximum(sigma, MIN_LEVEL)


def loss_weight(
    kind: str, prediction_type: PredictionType, alpha: Float[Array, " *B"], sigma: Float[Array, " *B"]
) -> Float[Array, " *B"]:
    """w_t of the loss (unspecified in the paper), for a squared error in the prediction's own space.

    An error of 1 in x0 is one of 1 / sigma in v and of alpha / sigma in epsilon, so a weight w on the squared
    error in x0 is w sigma^2 on that in v and w / SNR on that in epsilon, where SNR = alpha^2 / sigma^2. On x0
    the kinds are

        "min_snr_5"      min(SNR, 5)  (Hang et al. 2023, https://arxiv.org/abs/2303.09556)
        "truncated_snr"  max(SNR, 1)  (Salimans & Ho 2022)

    and "uniform" is 1 in the prediction's own space. At alpha = 0, "min_snr_5" leaves a v or x0 network
    untrained.
    """
    _check_type(prediction_type)
    alpha, sigma = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    signal, noise = jnp.maximum(alpha, MIN_LEVEL) ** 2, jnp.maximum(sigma, MIN_LEVEL) ** 2
    if kind == "uniform":
        return jnp.ones_like(signal)
    if kind == "min_snr_5":
        weight_v = jnp.minimum(signal, 5 * noise)
    elif kind == "truncated_snr":
        weight_v = jnp.maximum(signal, noise)
    else:
        raise UserError(f"loss weight: unknown kind {kind!r}, use 'uniform', 'min_snr_5' or 'truncated_snr'")
    return weight_v / {"v": 1.0, "x0": noise, "epsilon": signal}[prediction_type]


def loss(
    prediction: Float[Array, "B K h w c"],
    target: Float[Array, "B K h w c"],
    weight: Float[Array, " *B"],
) -> Float[Array, " B"]:
    """w_t |prediction - target|^2 of each asset (Sec. 3.1), the mean over its elements."""
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return weight * squared.mean(axis=(1, 2, 3, 4))


def _check_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"unknown prediction type {prediction_type!r}, use one of {', '.join(PREDICTION_TYPES)}"
        )
