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

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from recon_torch.errors import UserError

PredictionType = Literal["epsilon", "v", "x0"]
PREDICTION_TYPES = ("epsilon", "v", "x0")

# The smallest alpha and sigma that are divided by. Its square is the smallest positive float16, which is also
# where diffusers stops a schedule of zero terminal SNR.
MIN_LEVEL = 2.0**-12


class Schedule(NamedTuple):
    """The N noise levels of training, in float64; under jit read them through `level`."""

    alphas: Float[np.ndarray, " N"]  # falling, in [0, 1]
    sigmas: Float[np.ndarray, " N"]  # rising, in [0, 1]
    timesteps: Float[np.ndarray, " N"]  # rising: what the network is told of a level

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)


def make_schedule(
    kind: str = "scaled_linear",
    num_steps: int = 1000,
    beta_start: float = 8.5e-4,
    beta_end: float = 1.2e-2,
    zero_terminal_snr: bool = False,
    sigma_min: float = 0.002,
    sigma_max: float = 700.0,
) -> Schedule:
    """The schedule of a network's training; the defaults are Emu Video's (arXiv 2311.10709, appendix).

    kind: "scaled_linear" (sqrt(beta) is linear), "linear" (Ho et al. 2020), "cosine" (Nichol & Dhariwal
        2021, which ignores the betas), all of which tell the network the number of the step; or "edm".
    sigma_min, sigma_max: noise-to-signal ratios between which "edm" has its levels, evenly in the logarithm;
        the network is told c_noise = ln(ratio) / 4 (Karras et al. 2022, https://arxiv.org/abs/2206.00364).
        EDM's c_in makes of its noisy input what is noisy here, and with c_skip = 1 / (1 + ratio^2) its
        denoiser is "v" prediction, so nothing else differs. The defaults are SVD's and SV3D's.
    zero_terminal_snr: shift and scale alpha so that the last timestep is pure noise (Lin et al. 2023,
        https://arxiv.org/abs/2305.08891), as in Emu Video's 512 px stages. It asks for "v" or "x0"
        prediction, because at alpha = 0 epsilon says nothing of x0.
    Raises UserError for an unknown kind or fewer than two steps.
    """
    if num_steps < 2:
        raise UserError(f"schedule: num_steps is {num_steps}, needs at least 2")
    if kind == "edm":
        ratios = np.geomspace(sigma_min, sigma_max, num_steps)
        alphas = 1 / np.sqrt(1 + ratios**2)
        return Schedule(alphas, ratios * alphas, np.log(ratios) / 4)
    if kind == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    elif kind == "linear":
        betas = np.linspace(beta_start, beta_end, num_steps)
    elif kind == "cosine":
        alpha_bar = np.cos((np.linspace(0, 1, num_steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise UserError(f"schedule: unknown kind {kind!r}, use 'scaled_linear', 'linear', 'cosine' or 'edm'")
    alphas = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return Schedule(alphas, np.sqrt(1 - alphas**2), np.arange(num_steps))


def level(schedule: Schedule, timestep: Int[Array, " *B"]) -> tuple[Float[Array, " *B"], Float[Array, " *B"]]:
    """(alpha, sigma) of the levels with these numbers, in [0, N)."""
    alphas, sigmas = (jnp.asarray(values, jnp.float32) for values in schedule[:2])
    return alphas[timestep], sigmas[timestep]


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


def sample_timesteps(
    key: PRNGKeyArray, batch: int, num_timesteps: int, stratified: bool = True, shift: float = 1.0
) -> Int[Array, " B"]:
    """Timesteps for one training step, in [0, num_timesteps).

    stratified: one draw shifts an even grid over the batch, so that every batch covers all noise levels and
        the loss varies less (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, app. I.1); else
        independent draws.
    shift: 1 is uniform; above 1 turns u into shift u / (1 + (shift - 1) u), towards noisier levels (Esser et
        al. 2024, https://arxiv.org/abs/2403.03206, sec. 5.3.2): what K views share survives more noise.
    """
    if stratified:
        unit = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    else:
        unit = jax.random.uniform(key, (batch,))
    unit = shift * unit / (1 + (shift - 1) * unit)
    return jnp.minimum(jnp.floor(unit * num_timesteps).astype(jnp.int32), num_timesteps - 1)


def _check_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"unknown prediction type {prediction_type!r}, use one of {', '.join(PREDICTION_TYPES)}"
        )
