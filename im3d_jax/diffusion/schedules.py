"""Noise schedules (Sec. 3.1): how much signal and noise there is at each timestep of training.

There are two families. The paper's is variance preserving, alpha^2 + sigma^2 = 1. Flow matching (Lipman et
al. 2022, https://arxiv.org/abs/2210.02747; Liu et al. 2022, https://arxiv.org/abs/2209.03003) goes from the
clean views to noise on a straight line, alpha + sigma = 1.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from im3d_jax.registry import Registry
from im3d_jax.training_settings import TimestepDraw
from recon_torch.errors import UserError, choice
from recon_torch.ranges import Range

NumSteps = Annotated[int, Range(2, 100_000)]
Beta = Annotated[float, Range(above=0, below=1)]
Sigma = Annotated[float, Range(above=0, most=1e6)]
Shift = Annotated[float, Range(above=0, most=1000)]
NumTokens = Annotated[int, Range(1, 1_000_000_000)]
TokenShift = Annotated[float, Range(-20, 1000)]

MIN_LEVEL = 2.0**-12
"""The smallest alpha and sigma that anything is divided by.

Its square is the smallest positive float16, which is also where diffusers stops a schedule of zero terminal
SNR.
"""


class Schedule(NamedTuple):
    """The N noise levels of training, in float64; under jit read them through `level`."""

    alphas: Float[np.ndarray, " N"]  # falling, in [0, 1]
    sigmas: Float[np.ndarray, " N"]  # rising, in [0, 1]
    timesteps: Float[np.ndarray, " N"] | Int[np.ndarray, " N"]  # rising: what the network is told of a level
    shift: float | None = None  # of a schedule of flow matching, see `flow`; None: variance preserving

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    @property
    def is_flow(self) -> bool:
        return self.shift is not None


SCHEDULES = Registry(
    key="config.schedule.kind",
    attribute="schedule",
    ours={kind: f"{__name__}:{kind}" for kind in ("scaled_linear", "linear", "cosine", "edm", "flow")}
    | {"diffusers": "im3d_jax.diffusion.public_schedulers:diffusers"},
)
"""Functions of the other entries of `config.schedule` that return a `Schedule`."""


def make_schedule(kind: str = "scaled_linear", num_steps: int = 1000, **kwargs) -> Schedule:
    """The schedule that a network was trained with, one of `SCHEDULES`.

    An argument of None has not been given: a config may list what only some kinds take.

    Raises UserError as `Registry.make` does, and for a schedule of neither family.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    schedule = SCHEDULES.make(kind, {"num_steps": num_steps} | given)
    if not isinstance(schedule, Schedule):
        raise UserError(f"{SCHEDULES.key}: {kind} returns no im3d_jax.diffusion.schedules.Schedule")
    power, law = (1, "alpha + sigma = 1") if schedule.is_flow else (2, "alpha^2 + sigma^2 = 1")
    if not np.allclose(schedule.alphas**power + schedule.sigmas**power, 1, rtol=0, atol=1e-6):
        raise UserError(
            f"{SCHEDULES.key}: in the Schedule of {kind} {law} does not hold; see `Schedule.shift`"
        )
    return schedule


def scaled_linear(
    num_steps: NumSteps, beta_start: Beta = 8.5e-4, beta_end: Beta = 1.2e-2, zero_terminal_snr: bool = False
) -> Schedule:
    """sqrt(beta) is linear (Rombach et al. 2022). The defaults are Emu Video's (arXiv 2311.10709, appendix).

    zero_terminal_snr: shift and scale alpha so that the last timestep is pure noise (Lin et al. 2023,
        https://arxiv.org/abs/2305.08891), as in Emu Video's 512 px stages. The network then has to predict
        "v" or "x0", because at alpha = 0 epsilon says nothing about x0.
    """
    return _of_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2, zero_terminal_snr)


def linear(
    num_steps: NumSteps, beta_start: Beta = 8.5e-4, beta_end: Beta = 1.2e-2, zero_terminal_snr: bool = False
) -> Schedule:
    """beta is linear (Ho et al. 2020). zero_terminal_snr: see `scaled_linear`."""
    return _of_betas(np.linspace(beta_start, beta_end, num_steps), zero_terminal_snr)


def cosine(
    num_steps: NumSteps,
    zero_terminal_snr: bool = False,
    beta_start: Beta | None = None,
    beta_end: Beta | None = None,
) -> Schedule:
    """alpha^2 falls like a squared cosine (Nichol & Dhariwal 2021). zero_terminal_snr: see `scaled_linear`.

    The betas are those of the other kinds, which every config has, and are ignored.
    """
    alpha_bar = np.cos((np.linspace(0, 1, num_steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return _of_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), zero_terminal_snr)


def edm(
    num_steps: NumSteps,
    sigma_min: Sigma = 0.002,
    sigma_max: Sigma = 700.0,
    beta_start: Beta | None = None,
    beta_end: Beta | None = None,
    zero_terminal_snr: bool | None = None,
) -> Schedule:
    """EDM's levels (Karras et al. 2022, https://arxiv.org/abs/2206.00364); the defaults are SVD's and SV3D's.

    The noise-to-signal ratios are even in the logarithm between sigma_min and sigma_max, and the network is
    told c_noise = ln(ratio) / 4. EDM's c_in makes of its noisy input what is noisy here, and with c_skip =
    1 / (1 + ratio^2) its denoiser is "v" prediction, so nothing else differs. The betas and zero_terminal_snr
    are those of the other kinds, which every config has, and are ignored.
    """
    ratios = np.geomspace(sigma_min, sigma_max, num_steps)
    alphas = 1 / np.sqrt(1 + ratios**2)
    return Schedule(alphas, ratios * alphas, np.log(ratios) / 4)


def _of_betas(betas: Float[np.ndarray, " N"], zero_terminal_snr: bool) -> Schedule:
    """The schedule of a network that is told the number of the step."""
    alphas = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return Schedule(alphas, np.sqrt(1 - alphas**2), np.arange(len(betas)))


# ---- Flow matching ----


class TokenRule(StrEnum):
    """What the number mu that grows with the number of tokens stands for, see `flow`."""

    EXPONENTIAL = "exponential"  # shift = e^mu
    LINEAR = "linear"  # shift = mu


def flow(
    num_steps: NumSteps,
    shift: Shift = 1.0,
    num_tokens: NumTokens | None = None,
    base_shift: TokenShift = 0.5,
    max_shift: TokenShift = 1.15,
    base_tokens: NumTokens = 256,
    max_tokens: NumTokens = 4096,
    token_rule: TokenRule | str = TokenRule.EXPONENTIAL,
    beta_start: Beta | None = None,
    beta_end: Beta | None = None,
    zero_terminal_snr: bool | None = None,
) -> Schedule:
    """x_s = (1 - s) x0 + s eps at the N shifted levels s of u = 1/N, 2/N, ..., 1; the network is told N s.

    These are the levels that diffusers' FlowMatchEulerDiscreteScheduler is made with, and at which public
    trainers draw. s = 1 is pure noise, so the network predicts "flow" or "x0".

    Args:
        num_steps: N, and the unit of what the network is told: 1000 for all public models.
        shift: s = shift u / (1 + (shift - 1) u): above 1 towards noisier levels, as larger pictures and
            longer videos need (Esser et al. 2024, https://arxiv.org/abs/2403.03206, sec. 5.3.2).
        num_tokens: of one sample in the network. If it is given, the shift follows from it, as in diffusers'
            `use_dynamic_shifting`: mu is on the line through (base_tokens, base_shift) and (max_tokens,
            max_shift), and `token_rule` makes the shift of it. Otherwise the next five are not read.
        beta_start, beta_end, zero_terminal_snr: are those of other kinds, which every config has, and are
            ignored.

    Raises UserError for a number of tokens beside a shift, and one that leads to no shift in its range.
    """
    if num_tokens is not None:
        if shift != 1:
            raise UserError(
                "config.schedule: give shift or num_tokens, from which the shift follows, not both"
            )
        rule = choice(TokenRule, token_rule, "config.schedule.token_rule")
        shift = _shift_of_tokens(num_tokens, (base_tokens, base_shift), (max_tokens, max_shift), rule)
    levels = shifted(np.arange(1, num_steps + 1) / num_steps, shift)
    levels[-1] = 1  # exactly, also where the formula rounds
    return Schedule(1 - levels, levels, num_steps * levels, float(shift))


def _shift_of_tokens(
    num_tokens: int, base: tuple[int, float], most: tuple[int, float], rule: TokenRule
) -> float:
    """The shift at a number of tokens, on the line through two of (number of tokens, mu)."""
    if base[0] == most[0]:
        raise UserError(f"config.schedule: base_tokens and max_tokens are both {base[0]}; make them differ")
    mu = base[1] + (num_tokens - base[0]) * (most[1] - base[1]) / (most[0] - base[0])
    shift = math.exp(min(mu, 700.0)) if rule == TokenRule.EXPONENTIAL else mu
    if not 0 < shift <= 1000:
        raise UserError(
            f"config.schedule: {num_tokens} tokens lead to a shift of {shift:.4g}; it must be above 0 and at"
            " most 1000, so check num_tokens, base_shift and max_shift"
        )
    return shift


def shifted(unit: Float[np.ndarray, "*n"] | float, shift: float) -> Float[np.ndarray, "*n"]:
    """shift u / (1 + (shift - 1) u) of u in [0, 1]; the shift 1 / shift undoes it."""
    return np.asarray(shift * unit / (1 + (shift - 1) * unit))


# ---- Levels ----


def level(schedule: Schedule, timestep: Int[Array, " *B"]) -> tuple[Float[Array, " *B"], Float[Array, " *B"]]:
    """(alpha, sigma) of the levels with these numbers, which are in [0, N)."""
    alphas, sigmas = (jnp.asarray(values, jnp.float32) for values in schedule[:2])
    return alphas[timestep], sigmas[timestep]


def sample_timesteps(
    key: PRNGKeyArray,
    batch: int,
    num_timesteps: int,
    stratified: bool = True,
    shift: float = 1.0,
    draw: TimestepDraw | str = TimestepDraw.UNIFORM,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Int[Array, " {batch}"]:
    """Draws the timesteps of one training step, in [0, num_timesteps).

    stratified: one draw shifts an even grid over the batch, so that every batch covers all noise levels and
        the loss varies less (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, app. I.1). Otherwise the
        draws are independent.
    shift: 1 changes nothing; above 1 turns u into shift u / (1 + (shift - 1) u), towards noisier levels
        (Esser et al. 2024, https://arxiv.org/abs/2403.03206, sec. 5.3.2), because what the views share
        survives more noise. It comes on top of a schedule's own: shifts a and b are one of a b.
    draw: how u, the share of the schedule, is distributed before the shift. "logit_normal": ln(u / (1 - u))
        is normal with `logit_mean` and `logit_std` (the same, sec. 3.1).
    """
    if stratified:
        unit = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    else:
        unit = jax.random.uniform(key, (batch,))
    if choice(TimestepDraw, draw, "timestep draw") == TimestepDraw.LOGIT_NORMAL:
        # The quantile function keeps the strata: each draw is in its own part of the distribution.
        unit = jax.nn.sigmoid(logit_mean + logit_std * jax.scipy.special.ndtri(unit))
    unit = shift * unit / (1 + (shift - 1) * unit)
    return jnp.minimum(jnp.floor(unit * num_timesteps).astype(jnp.int32), num_timesteps - 1)
