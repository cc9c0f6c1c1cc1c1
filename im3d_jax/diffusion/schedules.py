"""Noise schedules (Sec. 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from recon_torch.errors import UserError

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
