"""Noising, what a network may predict, and the training loss (Sec. 3.1).

The paper noises the views J by J_t = sqrt(1 - s_t^2) J + s_t eps and minimises w_t |eps_hat - eps|^2. Here
the two factors are alpha_t and sigma_t, with alpha^2 + sigma^2 = 1 (variance preserving), or with
alpha + sigma = 1 for flow matching. They are one number per asset, [B], or a scalar. Whatever the network's
own precision, everything here is float32.
"""

from __future__ import annotations

from enum import StrEnum

import jax.numpy as jnp
from jaxtyping import Array, Float

from im3d_jax.diffusion.schedules import MIN_LEVEL, Schedule
from im3d_jax.training_settings import LossWeight
from recon_torch.errors import UserError, choice

Views = Float[Array, "B K h w c"]
PerAsset = Float[Array, " *B"]


class PredictionType(StrEnum):
    """What a network predicts of noisy views."""

    EPSILON = "epsilon"  # the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239)
    V = "v"  # alpha eps - sigma x0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)
    X0 = "x0"  # the clean views
    FLOW = "flow"  # eps - x0, the velocity of x_s (Liu et al. 2022, https://arxiv.org/abs/2209.03003)


def check_goes_with(prediction_type: PredictionType | str, schedule: Schedule) -> None:
    """Raises UserError for a prediction from which the schedule's levels do not give the clean views.

    "v" and "flow" are each defined by the law of one family of schedules. With "epsilon", the levels of flow
    matching that are all noise say nothing about the views.
    """
    prediction_type = _checked(prediction_type)
    only_flow = prediction_type == PredictionType.FLOW
    if prediction_type != PredictionType.X0 and only_flow != schedule.is_flow:
        family = "is one of flow matching" if schedule.is_flow else "preserves variance"
        fitting = ", ".join(("flow", "x0") if schedule.is_flow else ("epsilon", "v", "x0"))
        raise UserError(
            f"the backbone predicts {prediction_type.value!r}, and config.schedule {family}, which goes with"
            f" {fitting}; take another schedule ({'kind other than' if schedule.is_flow else 'kind'} 'flow')"
        )


def expand(per_asset: PerAsset | float, like: Float[Array, "..."]) -> Float[Array, "..."]:
    """Appends axes of length 1 until `per_asset` broadcasts against `like`: [B] -> [B, 1, 1, 1, 1]."""
    per_asset = jnp.asarray(per_asset, jnp.float32)
    return per_asset.reshape(per_asset.shape + (1,) * (like.ndim - per_asset.ndim))


def add_noise(x0: Views, eps: Views, alpha: PerAsset | float, sigma: PerAsset | float) -> Views:
    """J_t = alpha J + sigma eps (Sec. 3.1)."""
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def target(
    prediction_type: PredictionType | str, x0: Views, eps: Views, alpha: PerAsset, sigma: PerAsset
) -> Views:
    """What a perfect network of this type would return."""
    match _checked(prediction_type):
        case PredictionType.EPSILON:
            return eps
        case PredictionType.X0:
            return x0
        case PredictionType.V:
            return expand(alpha, x0) * eps - expand(sigma, x0) * x0
        case PredictionType.FLOW:
            return eps - x0


def to_x0(
    prediction_type: PredictionType | str, prediction: Views, noisy: Views, alpha: PerAsset, sigma: PerAsset
) -> Views:
    """The clean views that a prediction implies.

    This is exact at every level for "v", "flow" and "x0". From "epsilon" it is (x - sigma eps) / alpha with
    alpha held at 2^-12 or above: at alpha = 0 epsilon does not determine the clean views, and the value is
    finite but means nothing.
    """
    prediction, alpha, sigma = prediction.astype(jnp.float32), expand(alpha, noisy), expand(sigma, noisy)
    match _checked(prediction_type):
        case PredictionType.X0:
            return prediction
        case PredictionType.V:
            return alpha * noisy - sigma * prediction
        case PredictionType.FLOW:
            return noisy - sigma * prediction
        case PredictionType.EPSILON:
            return (noisy - sigma * prediction) / jnp.maximum(alpha, MIN_LEVEL)


def to_eps(
    prediction_type: PredictionType | str, prediction: Views, noisy: Views, alpha: PerAsset, sigma: PerAsset
) -> Views:
    """The noise that a prediction implies. It mirrors `to_x0`, so from "x0" sigma is held at 2^-12."""
    prediction, alpha, sigma = prediction.astype(jnp.float32), expand(alpha, noisy), expand(sigma, noisy)
    match _checked(prediction_type):
        case PredictionType.EPSILON:
            return prediction
        case PredictionType.V:
            return sigma * noisy + alpha * prediction
        case PredictionType.FLOW:
            return noisy + alpha * prediction
        case PredictionType.X0:
            return (noisy - alpha * prediction) / jnp.maximum(sigma, MIN_LEVEL)


def loss_weight(
    kind: LossWeight | str, prediction_type: PredictionType | str, alpha: PerAsset, sigma: PerAsset
) -> PerAsset:
    """w_t for a squared error in the prediction's own space.

    An error of 1 in x0 is one of 1 / sigma in v and flow and of alpha / sigma in epsilon, so a weight w on
    the squared error in x0 is w sigma^2 on that in v and flow and w / SNR on that in epsilon, where SNR =
    alpha^2 / sigma^2. At alpha = 0, "min_snr_5" leaves a v, flow or x0 network untrained. Public models of
    flow matching are trained with "uniform", which is the squared error of the velocity.
    """
    prediction_type = _checked(prediction_type)
    alpha, sigma = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
    signal, noise = jnp.maximum(alpha, MIN_LEVEL) ** 2, jnp.maximum(sigma, MIN_LEVEL) ** 2
    match choice(LossWeight, kind, "loss weight"):
        case LossWeight.UNIFORM:
            return jnp.ones_like(signal)
        case LossWeight.MIN_SNR_5:
            weight_v = jnp.minimum(signal, 5 * noise)  # also that of flow
        case LossWeight.TRUNCATED_SNR:
            weight_v = jnp.maximum(signal, noise)
    of_v: dict[PredictionType, PerAsset | float] = {
        PredictionType.V: 1.0,
        PredictionType.FLOW: 1.0,
        PredictionType.X0: noise,
        PredictionType.EPSILON: signal,
    }
    return weight_v / of_v[prediction_type]


def loss(prediction: Views, target: Views, weight: PerAsset) -> Float[Array, " B"]:
    """w_t |prediction - target|^2 of each asset (Sec. 3.1), the mean over its elements."""
    squared = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return weight * squared.mean(axis=(1, 2, 3, 4))


def _checked(prediction_type: PredictionType | str) -> PredictionType:
    """A model says its type by a plain string, so each function checks it."""
    return choice(PredictionType, prediction_type, "prediction type")
