"""Noise schedules (Sec. 3.1): how much signal and noise there is at each timestep of training."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from im3d_jax.registry import Registry
from recon_torch.errors import UserError
from recon_torch.ranges import Range

NumSteps = Annotated[int, Range(2, 100_000)]
Beta = Annotated[float, Range(above=0, below=1)]
Sigma = Annotated[float, Range(above=0, most=1e6)]

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

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)


SCHEDULES = Registry(
    key="config.schedule.kind",
    attribute="schedule",
    ours={kind: f"{__name__}:{kind}" for kind in ("scaled_linear", "linear", "cosine", "edm")},
)
"""Functions of the other entries of `config.schedule` that return a `Schedule`."""


def make_schedule(kind: str = "scaled_linear", num_steps: int = 1000, **kwargs) -> Schedule:
    """The schedule that a network was trained with, one of `SCHEDULES`.

    Raises UserError as `Registry.make` does.
    """
    schedule = SCHEDULES.make(kind, {"num_steps": num_steps} | kwargs)
    if not isinstance(schedule, Schedule):
        raise UserError(f"{SCHEDULES.key}: {kind} returns no im3d_jax.diffusion.schedules.Schedule")
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


def level(schedule: Schedule, timestep: Int[Array, " *B"]) -> tuple[Float[Array, " *B"], Float[Array, " *B"]]:
    """(alpha, sigma) of the levels with these numbers, which are in [0, N)."""
    alphas, sigmas = (jnp.asarray(values, jnp.float32) for values in schedule[:2])
    return alphas[timestep], sigmas[timestep]


def sample_timesteps(
    key: PRNGKeyArray, batch: int, num_timesteps: int, stratified: bool = True, shift: float = 1.0
) -> Int[Array, " {batch}"]:
    """Draws the timesteps of one training step, in [0, num_timesteps).

    stratified: one draw shifts an even grid over the batch, so that every batch covers all noise levels and
        the loss varies less (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, app. I.1). Otherwise the
        draws are independent.
    shift: 1 is uniform; above 1 turns u into shift u / (1 + (shift - 1) u), towards noisier levels (Esser et
        al. 2024, https://arxiv.org/abs/2403.03206, sec. 5.3.2), because what the views share survives more
        noise.
    """
    if stratified:
        unit = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    else:
        unit = jax.random.uniform(key, (batch,))
    unit = shift * unit / (1 + (shift - 1) * unit)
    return jnp.minimum(jnp.floor(unit * num_timesteps).astype(jnp.int32), num_timesteps - 1)
