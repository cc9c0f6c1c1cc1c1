"""Sampling (Sec. 3.4): DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), UniPC, and their partial restart.

With the noise-to-signal ratio r = sigma / alpha, the step from level s to level t is h = log(r_s / r_t) long.
What multiplies the Gaussian part of x decays by exp(-h) = r_t / r_s, and what the network believes the views
to be, D, fills the place:

    ODE   x <- (sigma_t / sigma_s) x          + alpha_t (1 - exp(-h)) D
    SDE   x <- (sigma_t / sigma_s) exp(-h) x  + alpha_t (1 - exp(-2h)) D  + sigma_t sqrt(1 - exp(-2h)) z

First order takes D = x0. Second order extrapolates the last two predictions to the middle of the step,
D = x0 + (h / 2 h_prev) (x0 - x0_prev). Every step is thus a fixed linear combination of x, x0, x0_prev and z,
whose weights `coefficients` tabulates in float64 before the first network call.

This holds for any alpha and sigma. On a schedule of flow matching, where x = (1 - s) x0 + s eps, the ODE of
first order is Euler's method on the velocity eps - x0. Its run begins at alpha = 0: there h is infinite,
exp(-h) is 0, and the step after it has nothing to extrapolate from, which are the limits of the formulas.

UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867; order 2, the variant "bh2") makes the steps of 2M.
Each prediction at the end of a step then also takes part in that step: x is corrected (`corrections`) before
the next step begins, at no further call of the network.

Which solver, spacing, guidance and restart level IM-3D uses is unspecified in the paper beyond "DPM-Solver++"
and the step counts, so all of them are arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from im3d_jax.diffusion.objective import Views, add_noise
from im3d_jax.diffusion.schedules import MIN_LEVEL, Schedule, shifted
from im3d_jax.settings import Solver, Spacing
from recon_torch.errors import UserError, choice

KARRAS_RHO = 7.0  # Karras et al. 2022, https://arxiv.org/abs/2206.00364

UNIPC_START = 1 - 1e-6
"""The noisiest level at which diffusers' UniPCMultistepScheduler begins, whose logarithms need alpha > 0."""


# ---- Steps ----


class Steps(NamedTuple):
    """The T steps of one sampling run: step i goes from level i to level i + 1 and costs one network call."""

    timesteps: Float[np.ndarray, " T"] | Int[np.ndarray, " T"]  # falling; what the network is told at step i
    alphas: Float[np.ndarray, " T+1"]  # float64, rising to exactly 1
    sigmas: Float[np.ndarray, " T+1"]  # float64, falling to exactly 0


def make_steps(
    schedule: Schedule,
    num_steps: int,
    spacing: Spacing | str = Spacing.TRAILING,
    start_level: float = 1.0,
) -> Steps:
    """`num_steps` steps from noise level `start_level` down to clean views.

    start_level: the s of J_s = sqrt(1 - s^2) J + s eps, in (0, 1]; 1 is the schedule's noisiest level. Below
        1 this is a restart (Sec. 3.4): "trailing" and "linspace" begin at the training timestep whose sigma
        is nearest to s, "karras" at s. Read the level that was reached from `sigmas[0]`. On a schedule of
        flow matching J_s = (1 - s) J + s eps, and every spacing begins at s.
    A level of zero SNR is held at alpha = 2^-12, as diffusers does, which keeps every step's length finite.
    Flow matching begins at alpha = 0.

    Raises UserError where the schedule has fewer timesteps below `start_level` than steps asked for, and for
    a spacing that is not one of the schedule's family.
    """
    if num_steps < 1:
        raise UserError(f"sampler: num_steps is {num_steps}, needs at least 1")
    if not 0 < start_level <= 1:
        raise UserError(f"sampler: start_level is {start_level}, must be above 0 and at most 1")
    spacing = _fitting(choice(Spacing, spacing, "sampler spacing"), schedule)
    if schedule.is_flow:
        sigmas, timesteps = _flow_levels(schedule, num_steps, spacing, start_level)
        steps = Steps(timesteps, np.append(1 - sigmas, 1.0), np.append(sigmas, 0.0))
    else:
        if spacing == Spacing.KARRAS:
            ratios, timesteps = _karras_levels(schedule, num_steps, start_level)
        else:
            levels = _even_levels(schedule, num_steps, spacing, start_level)
            ratios, timesteps = _noise_to_signal(schedule)[levels], schedule.timesteps[levels]
        alphas = np.append(1 / np.sqrt(1 + ratios**2), 1.0)
        steps = Steps(timesteps, alphas, np.append(ratios * alphas[:-1], 0.0))
    if (np.diff(steps.sigmas) >= 0).any():
        raise UserError(f"sampler: no {num_steps} distinct steps below noise level {start_level}; take fewer")
    return steps


def _fitting(spacing: Spacing, schedule: Schedule) -> Spacing:
    """The spacing. Raises UserError if schedules of the other family alone have it."""
    of_this = [each for each in Spacing if each == Spacing.TRAILING or each.is_of_flow == schedule.is_flow]
    if spacing not in of_this:
        family = "flow matching" if schedule.is_flow else "variance preserving"
        raise UserError(
            f"sampler: spacing {spacing.value!r} is not one of a {family} schedule; take {', '.join(of_this)}"
        )
    return spacing


def _flow_levels(
    schedule: Schedule, num_steps: int, spacing: Spacing, start_level: float
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"] | Int[np.ndarray, " T"]]:
    """(sigmas, timesteps) of flow matching: levels u that are even, and shifted as those of training.

    Two of diffusers' schedulers tell the network whole numbers, and so do these spacings.
    """
    shift, least = schedule.shift or 1.0, 1 / schedule.num_timesteps
    first = 1.0 if start_level == 1 else float(shifted(start_level, 1 / shift))
    match spacing:
        case Spacing.FLOW_EULER:  # which shifts its least level a second time
            unit = np.linspace(first, float(shifted(least, shift)), num_steps)
        case Spacing.FLOW_UNIPC:
            unit = np.linspace(first, least, num_steps + 1)[:-1]
        case Spacing.FLOW_DPM:
            # As the scheduler computes it, to the last bit: the whole numbers of timesteps depend on it.
            unit = np.flip(1 - np.linspace(1, max(1 - first, least), num_steps + 1))[:-1]
        case _:
            unit = np.linspace(first, 0, num_steps + 1)[:-1]
    sigmas = np.where(unit == 1, 1.0, shifted(unit, shift))
    if spacing == Spacing.FLOW_UNIPC:
        sigmas = np.minimum(sigmas, UNIPC_START)
    timesteps = sigmas * schedule.num_timesteps
    told_whole = spacing in (Spacing.FLOW_UNIPC, Spacing.FLOW_DPM)
    return sigmas, np.floor(timesteps).astype(int) if told_whole else timesteps


def _even_levels(
    schedule: Schedule, num_steps: int, spacing: Spacing, start_level: float
) -> Int[np.ndarray, " T"]:
    """Numbers of training timesteps, evenly spaced from the one whose sigma is nearest to `start_level`."""
    first = int(np.abs(schedule.sigmas - start_level).argmin())
    if spacing == Spacing.TRAILING:
        return np.round((first + 1) * np.arange(num_steps, 0, -1) / num_steps).astype(int) - 1
    return np.round(np.linspace(first, 0, num_steps + 1)[:-1]).astype(int)


def _karras_levels(
    schedule: Schedule, num_steps: int, start_level: float
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"] | Int[np.ndarray, " T"]]:
    """(noise-to-signal ratios, timesteps) between those of the schedule, evenly spaced in r^(1/7)."""
    ratios = _noise_to_signal(schedule)
    start = min(ratios[-1], start_level / np.sqrt(max(1 - start_level**2, MIN_LEVEL**2)))
    ramp = np.linspace(start ** (1 / KARRAS_RHO), ratios[0] ** (1 / KARRAS_RHO), num_steps)
    kept = ramp**KARRAS_RHO
    timesteps = np.interp(np.log(kept), np.log(ratios), schedule.timesteps)
    if schedule.timesteps.dtype.kind == "i":  # the network was trained on whole numbers alone
        timesteps = np.round(timesteps).astype(int)
    return kept, timesteps


def _noise_to_signal(schedule: Schedule) -> Float[np.ndarray, " N"]:
    """r = sigma / alpha of every training timestep, rising and finite."""
    alphas = np.maximum(schedule.alphas, MIN_LEVEL)
    return np.sqrt(1 - alphas**2) / alphas


def tail(steps: Steps, start_level: float) -> Steps:
    """The steps that begin at or below noise level `start_level`: a restart on the grid of the full run.

    Where `make_steps(..., start_level)` spends all its steps below the level, this keeps the step length and
    so takes fewer steps. Noise is to be added with the sigma of the first kept step (see `renoise`).

    Raises UserError if there is no such step.
    """
    first = int(np.argmax(steps.sigmas <= start_level))
    if first == len(steps.timesteps):
        raise UserError(
            f"sampler: no step at or below noise level {start_level}; the last is at {steps.sigmas[-2]:.4f}"
        )
    return Steps(steps.timesteps[first:], steps.alphas[first:], steps.sigmas[first:])


# ---- Solving ----


def coefficients(steps: Steps, solver: Solver | str = Solver.ODE_2M) -> Float[np.ndarray, "T 4"]:
    """The weights of x, x0, x0_prev and z in each step of `solver`, in float64.

    The first step has no previous prediction and is of first order. So is the last, which ends at sigma = 0:
    its length is infinite, and it returns x0 itself. UniPC's rows are those of 2M.
    """
    solver = choice(Solver, solver, "sampler solver")
    sigmas, decay = steps.sigmas, _decay(steps)
    from_x, from_mean = sigmas[1:] / sigmas[:-1], steps.alphas[1:] * (1 - decay)
    from_noise = np.zeros_like(decay)
    if solver.draws_noise:
        from_x, from_mean = from_x * decay, steps.alphas[1:] * (1 - decay**2)
        from_noise = sigmas[1:] * np.sqrt(1 - decay**2)
    extrapolate = np.zeros_like(decay)
    if solver.is_second_order:
        h = _lengths(decay)[:-1]
        extrapolate[1:-1] = h[1:] / (2 * h[:-1])
    return np.stack([from_x, from_mean * (1 + extrapolate), -from_mean * extrapolate, from_noise], axis=1)


def corrections(steps: Steps) -> Float[np.ndarray, "T 4"]:
    """UniPC's corrector: the weights with which x is replaced at the end of each step, in float64.

    They are those of x as it was at the start of the step, and of x0 as predicted at the start of the step
    before, at the start of this one and at its end. With the step from s to t, of length h,

        D = x0_s + c_prev (x0_s - x0_prev) + c_end (x0_t - x0_s)
        x <- (sigma_t / sigma_s) x + alpha_t (1 - exp(-h)) D

    The first step, which has no prediction before it, takes c_end = 1/2. The others take those c with which
    the step is exact for an x0 that is a quadratic function of lambda = -log(sigma / alpha). The last step
    ends at x0 itself, and its row is not used.
    """
    decay = _decay(steps)
    prev, end = np.zeros_like(decay), np.full_like(decay, 0.5)
    if len(decay) > 2:
        h = _lengths(decay)
        length, ratio = h[1:-1], h[:-2] / h[1:-1]  # the first is infinite after a start at alpha = 0
        filled = 1 - decay[1:-1]
        slope = 1 / filled - 1 / length  # mean of (lambda - lambda_s) / h under the step's weight exp(lambda)
        curvature = 1 / filled - 2 * slope / length  # mean of its square
        bend = (slope - curvature) / (1 + ratio)
        prev[1:-1], end[1:-1] = bend / ratio, slope - bend
    from_mean = steps.alphas[1:] * (1 - decay)
    from_x = steps.sigmas[1:] / steps.sigmas[:-1]
    return np.stack([from_x, -from_mean * prev, from_mean * (1 + prev - end), from_mean * end], axis=1)


def _decay(steps: Steps) -> Float[np.ndarray, " T"]:
    """exp(-h) of each step: 0 of one that begins at alpha = 0 or ends at sigma = 0."""
    with np.errstate(divide="ignore"):
        ratios = steps.sigmas / steps.alphas
    return ratios[1:] / ratios[:-1]


def _lengths(decay: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """h of each step, in lambda; infinite where exp(-h) is 0."""
    with np.errstate(divide="ignore"):
        return -np.log(decay)


@jax.jit
def update(x: Views, x0: Views, x0_prev: Views, z: Views, weights: Float[Array, " 4"]) -> Views:
    """One solver step, given its row of `coefficients`; or one of `corrections`, with what that weights."""
    return weights[0] * x + weights[1] * x0 + weights[2] * x0_prev + weights[3] * z


def sample(
    denoise: Callable[[Array, Array, Array, Array], Array],
    x: Views,
    steps: Steps,
    *,
    solver: Solver | str = Solver.ODE_2M,
    key: PRNGKeyArray | None = None,
    on_step: Callable[[int, Array], None] | None = None,
) -> Views:
    """Denoises `x`, which is at noise level `steps.sigmas[0]`, to clean views by T calls of `denoise`.

    denoise(x, timestep [B], alpha [B], sigma [B]) returns its estimate of the clean views.
    key: needed by the SDE solvers alone; step i folds in i.
    on_step(i, x0) sees the estimate of step i, for progress and previews.
    """
    solver = choice(Solver, solver, "sampler solver")
    if solver.draws_noise and key is None:
        raise ValueError(f"sampler: {solver} draws noise and needs a key")
    x_start = x0_prev = x0_before = z = jnp.zeros_like(x)
    corrector = jnp.asarray(corrections(steps), jnp.float32) if solver.corrects else None
    for i, weights in enumerate(jnp.asarray(coefficients(steps, solver), jnp.float32)):
        timestep = jnp.full(x.shape[:1], steps.timesteps[i], jnp.float32)
        alpha = jnp.full(x.shape[:1], steps.alphas[i], jnp.float32)
        sigma = jnp.full(x.shape[:1], steps.sigmas[i], jnp.float32)
        x0 = denoise(x, timestep, alpha, sigma)
        if solver.draws_noise and key is not None:
            z = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        if corrector is not None and i > 0:
            x = update(x_start, x0_before, x0_prev, x0, corrector[i - 1])
        x_start = x
        x = update(x, x0, x0_prev, z, weights)
        x0_before, x0_prev = x0_prev, x0
        if on_step is not None:
            on_step(i, x0)
    return x


def renoise(key: PRNGKeyArray, x0: Views, steps: Steps) -> Views:
    """Adds noise to clean views, up to the level at which `steps` begins (Sec. 3.4)."""
    return add_noise(x0, jax.random.normal(key, x0.shape), steps.alphas[0], steps.sigmas[0])
