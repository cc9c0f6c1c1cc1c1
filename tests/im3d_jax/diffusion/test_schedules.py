"""Schedules against diffusers, the timesteps of training against counts, and schedules of a user's module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler

from im3d_jax.diffusion import schedules
from recon_torch.errors import UserError


@pytest.mark.parametrize(
    "kind, diffusers_kind",
    [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")],
)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_agrees_with_diffusers(kind, diffusers_kind, zero_terminal_snr):
    peer = DDIMScheduler(
        beta_start=8.5e-4,
        beta_end=1.2e-2,
        beta_schedule=diffusers_kind,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    schedule = schedules.make_schedule(kind, zero_terminal_snr=zero_terminal_snr)
    # diffusers accumulates the product in float32
    np.testing.assert_allclose(schedule.alphas**2, peer.alphas_cumprod.numpy(), atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_is_variance_preserving_and_monotonic(zero_terminal_snr):
    schedule = schedules.make_schedule(zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, 1, rtol=1e-14)
    assert (np.diff(schedule.alphas) < 0).all() and (np.diff(schedule.sigmas) > 0).all()
    np.testing.assert_allclose(schedule.alphas[0], np.sqrt(1 - 8.5e-4), rtol=1e-12)
    assert (schedule.alphas[-1] == 0) == zero_terminal_snr
    assert (schedule.sigmas[-1] == 1) == zero_terminal_snr


def test_level_reads_the_schedule_under_jit_and_vmap():
    schedule = schedules.make_schedule()
    timesteps = jnp.array([0, 17, 999])
    for read in (schedules.level, jax.jit(schedules.level), jax.vmap(schedules.level, in_axes=(None, 0))):
        alpha, sigma = read(schedule, timesteps)
        np.testing.assert_allclose(alpha, schedule.alphas[np.array(timesteps)], rtol=1e-6)
        np.testing.assert_allclose(sigma, schedule.sigmas[np.array(timesteps)], rtol=1e-6)
        assert alpha.dtype == jnp.float32


def test_stratified_timesteps_fall_one_in_each_stratum():
    for seed in range(20):
        timesteps = np.asarray(schedules.sample_timesteps(jax.random.key(seed), 8, 1000))
        assert sorted(timesteps // 125) == list(range(8))


@pytest.mark.parametrize("stratified", [False, True])
def test_timesteps_are_uniform_and_repeatable(stratified):
    def draw(key):
        return schedules.sample_timesteps(key, 4, 10, stratified)

    keys = jax.random.split(jax.random.key(0), 5000)
    timesteps = np.asarray(jax.vmap(draw)(keys))
    assert timesteps.min() == 0 and timesteps.max() == 9
    np.testing.assert_allclose(np.bincount(timesteps.ravel()) / timesteps.size, 0.1, atol=0.01)
    np.testing.assert_array_equal(draw(keys[0]), timesteps[0])


def test_kinds_ignore_what_a_base_config_says_for_other_kinds():
    others = dict(beta_start=8.5e-4, beta_end=1.2e-2)
    for kind, ignored in (("cosine", others), ("edm", others | dict(zero_terminal_snr=True))):
        plain, given = schedules.make_schedule(kind), schedules.make_schedule(kind, **ignored)
        for mine, theirs in zip(plain, given, strict=True):
            np.testing.assert_array_equal(mine, theirs)


USERS = """
    import numpy as np
    from im3d_jax.diffusion.schedules import Schedule

    def schedule(num_steps, slope=1.0):
        sigmas = np.linspace(0.01, 0.99, num_steps) ** slope
        return Schedule(np.sqrt(1 - sigmas**2), sigmas, np.arange(num_steps))
"""


def test_a_users_schedule_is_made_by_the_name_of_its_module(user_module):
    schedule = schedules.make_schedule(user_module(USERS), num_steps=10, slope=2.0)
    assert schedule.num_timesteps == 10
    np.testing.assert_allclose(schedule.sigmas[[0, -1]], [1e-4, 0.9801])


def test_mistakes_are_one_line(user_module):
    with pytest.raises(UserError, match="config.schedule.num_steps is 1; give a whole number from 2"):
        schedules.make_schedule(num_steps=1)
    with pytest.raises(UserError, match="no 'quadratic'; there is scaled_linear"):
        schedules.make_schedule("quadratic")
    with pytest.raises(UserError, match="linear takes no argument sigma_min; remove it"):
        schedules.make_schedule("linear", sigma_min=0.1)
    bare = user_module("def schedule(num_steps): return range(num_steps)")
    with pytest.raises(UserError, match="user_pkg.part returns no im3d_jax.diffusion.schedules.Schedule"):
        schedules.make_schedule(bare)
