"""Sampling (Sec. 3.4): DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), its partial restart, and guidance.

With the noise-to-signal ratio r = sigma / alpha, the step from level s to level t is h = log(r_s / r_t) long.
What multiplies the Gaussian part of x decays by exp(-h) = r_t / r_s, and what the network believes the views
to be, D, fills the place:

    ODE   x <- (sigma_t / sigma_s) x          + alpha_t (1 - exp(-h)) D
    SDE   x <- (sigma_t / sigma_s) exp(-h) x  + alpha_t (1 - exp(-2h)) D  + sigma_t sqrt(1 - exp(-2h)) z

First order ("1", "sde_1") takes D = x0; second order ("2m", "sde_2m") extrapolates the last two predictions
to the middle of the step, D = x0 + (h / 2 h_prev) (x0 - x0_prev). Every step is thus a fixed linear
combination of x, x0, x0_prev and z, whose weights `coefficients` tabulates in float64 before the first
network call.

Which solver, spacing, guidance and restart level IM-3D uses is unspecified in the paper beyond "DPM-Solver++"
and the step counts, so all of them are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax.diffusion.objective import add_noise
from im3d_jax.diffusion.schedules import MIN_LEVEL, Schedule
from recon_torch.errors import UserError

Spacing = Literal["trailing", "linspace", "karras"]
Solver = Literal["1", "2m", "sde_1", "sde_2m"]
SOLVERS = ("1", "2m", "sde_1", "sde_2m")
KARRAS_RHO = 7.0  # Karras et al. 2022, https://arxiv.org/abs/2206.00364


class Steps(NamedTuple):
    """The T steps of one sampling run: step i goes from level i to level i + 1 and costs one network call."""

    timesteps: Float[np.ndarray, " T"]  # falling; what the network is told at step i
    alphas: Float[np.ndarray, " T+1"]  # float64, rising to exactly 1
    sigmas: Float[np.ndarray, " T+1"]  # float64, falling to exactly 0


def make_steps(
    schedule: Schedule, num_steps: int, spacing: Spacing = "trailing", start_level: float = 1.0
) -> Steps:
    """`num_steps` steps from noise level `start_level` down to clean views.

    spacing: "trailing" and "linspace" are even in the training timestep, "karras" in r^(1/7). With zero
        terminal SNR use one of the first two: Karras then spends half its steps where x is all but noise.
    start_level: the s of J_s = sqrt(1 - s^2) J + s eps, in (0, 1]; 1 is the schedule's noisiest level. Below
        1 this is a restart (Sec. 3.4): "trailing" and "linspace" begin at the training timestep whose sigma
        is nearest to s, "karras" at s. Read the level that was reached from `sigmas[0]`.
    A level of zero SNR is held at alpha = 2^-12, as diffusers does, which keeps every step's length finite.

    Raises UserError where the schedule has fewer timesteps below `start_level` than steps asked for.
    """
    if num_steps < 1:
        raise UserError(f"sampler: num_steps is {num_steps}, needs at least 1")
    if not 0 < start_level <= 1:
        raise UserError(f"sampler: start_level is {start_level}, must be above 0 and at most 1")
    ratios = _noise_to_signal(schedule)
    first = int(np.abs(schedule.sigmas - start_level).argmin())
    if spacing == "trailing":
        levels = np.round((first + 1) * np.arange(num_steps, 0, -1) / num_steps).astype(int) - 1
        kept, timesteps = ratios[levels], schedule.timesteps[levels]
    elif spacing == "linspace":
        levels = np.round(np.linspace(first, 0, num_steps + 1)[:-1]).astype(int)
        kept, timesteps = ratios[levels], schedule.timesteps[levels]
    elif spacing == "karras":
        start = min(ratios[-1], start_level / np.sqrt(max(1 - start_level**2, MIN_LEVEL**2)))
        ramp = np.linspace(start ** (1 / KARRAS_RHO), ratios[0] ** (1 / KARRAS_RHO), num_steps)
        kept = ramp**KARRAS_RHO
        timesteps = np.interp(np.log(kept), np.log(ratios), schedule.timesteps)
        if schedule.timesteps.dtype.kind == "i":  # the network was trained on whole numbers alone
            timesteps = np.round(timesteps).astype(int)
    else:
        raise UserError(f"sampler: unknown spacing {spacing!r}, use 'trailing', 'linspace' or 'karras'")
    if (np.diff(kept) >= 0).any():
        raise UserError(f"sampler: no {num_steps} distinct steps below noise level {start_level}; take fewer")
    alphas = np.append(1 / np.sqrt(1 + kept**2), 1.0)
    return Steps(timesteps, alphas, np.append(kept * alphas[:-1], 0.0))


def _noise_to_signal(schedule: Schedule) -> Float[np.ndarray, " N"]:
    """r = sigma / alpha of every training timestep, rising and finite."""
    alphas = np.maximum(schedule.alphas, MIN_LEVEL)
    return np.sqrt(1 - alphas**2) / alphas


def tail(steps: Steps, start_level: float) -> Steps:
    """The steps that begin at or below noise level `start_level`: a restart on the grid of the full run.

    Where `make_steps(..., start_level)` spends all its steps below the level, this keeps the step length and
    so takes fewer steps. Noise is to be added with the sigma of the first kept step (see `renoise`).
    """
    first = int(np.argmax(steps.sigmas <= start_level))
    if first == len(steps.timesteps):
        raise UserError(
            f"sampler: no step at or below noise level {start_level}; the last is at {steps.sigmas[-2]:.4f}"
        )
    return Steps(steps.timesteps[first:], steps.alphas[first:], steps.sigmas[first:])


def coefficients(steps: Steps, solver: Solver = "2m") -> Float[np.ndarray, "T 4"]:
    """The weights of x, x0, x0_prev and z in each step of `solver`, in float64.

    The first step has no previous prediction and is of first order. So is the last, which ends at sigma = 0:
    its length is infinite, and it returns x0 itself.
    """
    if solver not in SOLVERS:
        raise UserError(f"sampler: unknown solver {solver!r}, use one of {', '.join(SOLVERS)}")
    ratios, sigmas = steps.sigmas / steps.alphas, steps.sigmas
    decay = ratios[1:] / ratios[:-1]  # exp(-h)
    from_x, from_mean = sigmas[1:] / sigmas[:-1], steps.alphas[1:] * (1 - decay)
    from_noise = np.zeros_like(decay)
    if solver.startswith("sde"):
        from_x, from_mean = from_x * decay, steps.alphas[1:] * (1 - decay**2)
        from_noise = sigmas[1:] * np.sqrt(1 - decay**2)
    extrapolate = np.zeros_like(decay)
    if solver.endswith("2m"):
        h = -np.log(decay[:-1])
        extrapolate[1:-1] = h[1:] / (2 * h[:-1])
    return np.stack([from_x, from_mean * (1 + extrapolate), -from_mean * extrapolate, from_noise], axis=1)


@jax.jit
def update(
    x: Float[Array, "B K h w c"],
    x0: Float[Array, "B K h w c"],
    x0_prev: Float[Array, "B K h w c"],
    z: Float[Array, "B K h w c"],
    weights: Float[Array, " 4"],
) -> Float[Array, "B K h w c"]:
    """One solver step, given its row of `coefficients`."""
    return weights[0] * x + weights[1] * x0 + weights[2] * x0_prev + weights[3] * z


def sample(
    denoise: Callable[[Array, Array, Array, Array], Array],
    x: Float[Array, "B K h w c"],
    steps: Steps,
    *,
    solver: Solver = "2m",
    key: PRNGKeyArray | None = None,
    on_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "B K h w c"]:
    """Denoise `x`, which is at noise level `steps.sigmas[0]`, to clean views. T calls of `denoise`.

    denoise(x, timestep [B], alpha [B], sigma [B]) returns its estimate of the clean views.
    key: needed by the SDE solvers alone; step i folds in i.
    on_step(i, x0) sees the estimate of step i, for progress and previews.
    """
    if solver.startswith("sde") and key is None:
        raise ValueError(f"sampler: {solver} draws noise and needs a key")
    x0_prev = z = jnp.zeros_like(x)
    for i, weights in enumerate(jnp.asarray(coefficients(steps, solver), jnp.float32)):
        timestep = jnp.full(x.shape[:1], steps.timesteps[i], jnp.float32)
        alpha = jnp.full(x.shape[:1], steps.alphas[i], jnp.float32)
        sigma = jnp.full(x.shape[:1], steps.sigmas[i], jnp.float32)
        x0 = denoise(x, timestep, alpha, sigma)
        if solver.startswith("sde"):
            z = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        x = update(x, x0, x0_prev, z, weights)
        x0_prev = x0
        if on_step is not None:
            on_step(i, x0)
    return x


def renoise(key: PRNGKeyArray, x0: Float[Array, "B K h w c"], steps: Steps) -> Float[Array, "B K h w c"]:
    """Noise clean views to the level at which `steps` begins (Sec. 3.4)."""
    return add_noise(x0, jax.random.normal(key, x0.shape), steps.alphas[0], steps.sigmas[0])


class Guidance(NamedTuple):
    """Guidance on image and text apart (Emu Video, appendix): X(0) + w_i (X(I) - X(0)) + w_p (X(I,p) - X(I)).

    X(0), X(I) and X(I,p) are the network's predictions without conditions, with the image, and with image and
    prompt. A weight is a number or one per view, [K], which must be known before jit: it decides which of the
    three are computed.
    """

    w_image: float | Sequence[float] | np.ndarray = 2.0
    w_text: float | Sequence[float] | np.ndarray = 7.5
    rescale: float = 0.0  # phi of Lin et al. 2023, in [0, 1]: draws the contrast back to that of X(I,p)

    def branch_weights(self) -> dict[str, np.ndarray]:
        """The predictions that are needed and their weights, [1, 1 or K, 1, 1, 1], which sum to 1."""
        w_image, w_text = (np.reshape(w, (1, -1, 1, 1, 1)).astype(np.float32) for w in self[:2])
        weights = {"null": 1 - w_image, "image": w_image - w_text, "full": w_text}
        return {name: weight for name, weight in weights.items() if weight.any()}

    @property
    def num_evaluations(self) -> int:
        """Network evaluations per sampling step and asset: 3, less the predictions whose weight is 0."""
        return len(self.branch_weights())

    def predict(
        self,
        network: Callable[[Array, Array, Any], Array],
        noisy: Float[Array, "B K h w c"],
        timestep: Float[Array, " B"],
        conditions: dict[str, Any],
    ) -> Float[Array, "B K h w c"]:
        """The guided prediction, from one call of `network` on a batch of num_evaluations * B.

        network(noisy, timestep, condition) predicts in its own space (epsilon, v or x0).
        conditions: "null", "image" and "full", pytrees of arrays [B, ...]; those that `branch_weights` lacks
        are unused.
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
) -> Float[Array, "B K h w c"]:
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
