"""The solver against diffusers, and against the exact solution for data that are Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from im3d_jax.diffusion import objective, sampler, schedules

SHAPE = (2, 3, 4, 4, 2)
MEAN, STD = 0.4, 0.6  # of the Gaussian data


def network(x: np.ndarray, timestep: int) -> np.ndarray:
    """Any smooth function of what a network is given; both sides of the parity tests call it.

    Its slope is under 1, so that it does not amplify the float32 rounding of diffusers' step sizes.
    """
    return (0.6 * np.sin(0.8 * x + 0.004 * timestep)).astype(np.float32)


def diffusers_sample(x, timesteps, begin, solver, key, **config):
    """Run diffusers' scheduler from its step `begin`, with the noise that `sampler.sample` draws."""
    betas = dict(beta_start=8.5e-4, beta_end=1.2e-2, beta_schedule="scaled_linear")
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(**betas, **config)
    else:
        scheduler = DPMSolverMultistepScheduler(
            solver_order=2 if solver.endswith("2m") else 1,
            algorithm_type="sde-dpmsolver++" if solver.startswith("sde") else "dpmsolver++",
            solver_type="midpoint",
            **betas,
            **config,
        )
    scheduler.set_timesteps(**timesteps)
    scheduler.set_begin_index(begin)
    x = torch.tensor(np.array(x))
    for i, timestep in enumerate(scheduler.timesteps[begin:]):
        z = torch.tensor(np.array(jax.random.normal(jax.random.fold_in(key, i), SHAPE)))
        prediction = torch.tensor(network(x.numpy(), int(timestep)))
        drawn = {} if solver == "unipc" else dict(variance_noise=z)
        x = scheduler.step(prediction, timestep, x, **drawn).prev_sample
    return x.numpy()


def im3d_sample(x, steps, solver, key, prediction_type):
    def denoise(x, timestep, alpha, sigma):
        prediction = jnp.asarray(network(np.asarray(x), int(timestep[0])))
        return objective.to_x0(prediction_type, prediction, x, alpha, sigma)

    return np.asarray(sampler.sample(denoise, x, steps, solver=solver, key=key))


def assert_agree(actual, expected):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


SPACINGS = {
    "linspace": dict(timestep_spacing="linspace"),
    "karras": dict(use_karras_sigmas=True),
    "trailing": dict(timestep_spacing="trailing", rescale_betas_zero_snr=True),
}


@pytest.mark.parametrize("start_level", [1.0, 0.6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", sampler.Solver)
def test_agrees_with_diffusers(solver, spacing, prediction_type, start_level):
    schedule = schedules.make_schedule(zero_terminal_snr=spacing == "trailing")
    full = sampler.make_steps(schedule, 20, spacing)
    steps = sampler.tail(full, start_level)
    begin = len(full.timesteps) - len(steps.timesteps)
    assert (begin == 0) == (start_level == 1.0)
    key = jax.random.key(3)
    x = sampler.renoise(key, jnp.full(SHAPE, 0.3), steps)
    config = dict(
        SPACINGS[spacing],
        prediction_type={"v": "v_prediction", "x0": "sample"}.get(prediction_type, prediction_type),
    )
    expected = diffusers_sample(x, dict(num_inference_steps=20), begin, solver, key, **config)
    assert_agree(im3d_sample(x, steps, solver, key, prediction_type), expected)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("solver", [each for each in sampler.Solver if each != "unipc"])  # takes no timesteps
def test_restart_with_exactly_ten_steps_agrees_with_diffusers(solver, spacing):
    steps = sampler.make_steps(schedules.make_schedule(), 10, spacing, start_level=0.5)
    key = jax.random.key(4)
    x = sampler.renoise(key, jnp.full(SHAPE, 0.3), steps)
    timesteps = dict(timesteps=steps.timesteps.tolist())
    expected = diffusers_sample(x, timesteps, 0, solver, key, prediction_type="v_prediction")
    assert_agree(im3d_sample(x, steps, solver, key, "v"), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("start_level", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_steps_are_as_many_as_asked_and_start_at_the_level(
    spacing, num_steps, start_level, zero_terminal_snr
):
    schedule = schedules.make_schedule(zero_terminal_snr=zero_terminal_snr)
    steps = sampler.make_steps(schedule, num_steps, spacing, start_level)
    assert len(steps.timesteps) == num_steps and len(steps.sigmas) == len(steps.alphas) == num_steps + 1
    np.testing.assert_allclose(steps.alphas**2 + steps.sigmas**2, 1, rtol=1e-12)
    assert (np.diff(steps.sigmas) < 0).all()
    assert steps.sigmas[-1] == 0 and steps.alphas[-1] == 1 and steps.alphas[0] >= 2.0**-12
    reached = min(start_level, schedule.sigmas[-1])
    np.testing.assert_allclose(steps.sigmas[0], reached, atol=1e-9 if spacing == "karras" else 2e-3)
    # what the network is told is the level it sees: exactly, or for Karras between the neighbouring timesteps
    if spacing == "karras":
        above = schedule.sigmas[np.minimum(steps.timesteps + 1, 999)]
        below = schedule.sigmas[np.maximum(steps.timesteps - 1, 0)]
        assert (below - 1e-6 <= steps.sigmas[:-1]).all() and (steps.sigmas[:-1] <= above + 1e-6).all()
    else:
        assert (np.diff(steps.timesteps) < 0).all()
        np.testing.assert_allclose(schedule.sigmas[steps.timesteps], steps.sigmas[:-1], atol=1e-6)
    assert np.isfinite(sampler.coefficients(steps, "sde_2m")).all()


@pytest.mark.parametrize("solver", sampler.Solver)
def test_ends_on_the_last_estimate(solver):
    """The last step goes to sigma = 0, where the result is the estimate itself; every step is one call."""
    estimates = []
    steps = sampler.make_steps(schedules.make_schedule(zero_terminal_snr=True), 5)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    result = sampler.sample(
        gaussian_denoiser,
        x,
        steps,
        solver=solver,
        key=jax.random.key(1),
        on_step=lambda i, x0: estimates.append((i, x0)),
    )
    assert [i for i, _ in estimates] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(result, estimates[-1][1])


@pytest.mark.parametrize("solver", sampler.Solver)
def test_constant_estimate_is_a_fixed_point_with_the_right_noise(solver):
    """If the network always says x0, then x stays alpha x0 + sigma eps in mean and variance."""
    steps = sampler.make_steps(schedules.make_schedule(), 12)
    mean, variance = steps.alphas[0], steps.sigmas[0] ** 2
    for i, (x, x0, x0_prev, z) in enumerate(sampler.coefficients(steps, solver)):
        mean, variance = x * mean + x0 + x0_prev, x**2 * variance + z**2
        np.testing.assert_allclose(mean, steps.alphas[i + 1], rtol=1e-12)
        np.testing.assert_allclose(variance, steps.sigmas[i + 1] ** 2, rtol=1e-10, atol=1e-15)


def gaussian_denoiser(x, timestep, alpha, sigma):
    """E[x0 | x] where x0 is N(MEAN, STD^2) in every pixel."""
    alpha, sigma = objective.expand(alpha, x), objective.expand(sigma, x)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def ode_error(solver: str, num_steps: int) -> float:
    """Distance to the exact solution of the probability-flow ODE, seen through the last estimate.

    (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2) is constant along it. The last step, to sigma = 0, has
    the same length for any number of Karras steps, so it is left out.
    """
    steps = sampler.make_steps(schedules.make_schedule(), num_steps, "karras")
    unit = jnp.linspace(-2, 2, np.prod(SHAPE)).reshape(SHAPE)

    def exact(i):
        alpha, sigma = steps.alphas[i], steps.sigmas[i]
        return alpha * MEAN + np.sqrt(alpha**2 * STD**2 + sigma**2) * unit

    estimates = []
    sampler.sample(
        gaussian_denoiser, exact(0), steps, solver=solver, on_step=lambda i, x0: estimates.append(x0)
    )
    expected = gaussian_denoiser(exact(-2), None, steps.alphas[-2], steps.sigmas[-2])
    return float(jnp.abs(estimates[-1] - expected).max())


@pytest.mark.parametrize("solver, order", [("1", 1), ("2m", 2), ("unipc", 3)])
def test_order_of_convergence(solver, order):
    errors = [ode_error(solver, num_steps) for num_steps in (20, 40, 80)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, order, atol=0.25)


@pytest.mark.parametrize("solver", sampler.Solver)
@pytest.mark.parametrize("start_level", [1.0, 0.7])
@pytest.mark.slow
def test_samples_of_gaussian_data_have_its_mean_and_spread(solver, start_level):
    schedule = schedules.make_schedule(zero_terminal_snr=True)
    steps = sampler.make_steps(schedule, 60 if solver.endswith("2m") else 200, start_level=start_level)
    data = MEAN + STD * jax.random.normal(jax.random.key(0), (4, 4, 32, 32, 4))
    x = sampler.renoise(jax.random.key(1), data, steps)
    samples = sampler.sample(gaussian_denoiser, x, steps, solver=solver, key=jax.random.key(2))
    np.testing.assert_allclose(samples.mean(), MEAN, atol=0.01)
    np.testing.assert_allclose(samples.std(), STD, rtol=0.02 if solver.endswith("2m") else 0.04)


def test_same_key_same_samples():
    steps = sampler.make_steps(schedules.make_schedule(), 6)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    first, again, other = (
        sampler.sample(gaussian_denoiser, x, steps, solver="sde_2m", key=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_restart_keeps_more_of_the_views_at_a_lower_level():
    """Sec. 3.4 depends on it: a low level stays near the renders, the highest forgets them."""
    renders = jnp.linspace(-1, 1, np.prod(SHAPE)).reshape(SHAPE)
    distances = []
    for start_level in (0.2, 0.6, 0.95, 1.0):
        steps = sampler.make_steps(
            schedules.make_schedule(zero_terminal_snr=True), 10, start_level=start_level
        )
        x = sampler.renoise(jax.random.key(0), renders, steps)
        distances.append(float(jnp.abs(sampler.sample(gaussian_denoiser, x, steps) - renders).mean()))
    assert distances == sorted(distances) and distances[0] < 0.25 < distances[-1]


def test_mistakes_are_one_clear_line():
    schedule = schedules.make_schedule()
    steps = sampler.make_steps(schedule, 4)
    x = jnp.zeros(SHAPE)
    for call in (
        lambda: sampler.make_steps(schedule, 0),
        lambda: sampler.make_steps(schedule, 1001),
        lambda: sampler.make_steps(schedule, 40, "linspace", start_level=0.05),
        lambda: sampler.make_steps(schedule, 40, "karras", start_level=0.01),
        lambda: sampler.make_steps(schedule, 10, start_level=0.0),
        lambda: sampler.make_steps(schedule, 10, start_level=1.5),
        lambda: sampler.make_steps(schedule, 10, "leading"),
        lambda: sampler.tail(steps, 0.01),
        lambda: sampler.coefficients(steps, "3m"),
        lambda: sampler.sample(gaussian_denoiser, x, steps, solver="sde_2m"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)
