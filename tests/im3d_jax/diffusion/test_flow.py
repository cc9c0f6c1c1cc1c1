"""Flow matching: levels and samples against diffusers' schedulers, draws and loss against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from im3d_jax.diffusion import objective, sampler, schedules
from im3d_jax.settings import Solver, Spacing
from recon_torch.errors import UserError

SHAPE = (2, 3, 4, 4, 2)
SHIFTS = [0.5, 1.0, 3.0, 5.0, 12.0]
OF_FLOW = [each for each in Spacing if each.is_of_flow]


def network(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth function of what a network is given, of slope below 1; both sides of the tests call it."""
    return (0.6 * np.sin(0.8 * x + 0.004 * timestep)).astype(np.float32)


def noise(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), SHAPE)


def ours(x, steps, solver, key=None):
    def denoise(x, timestep, alpha, sigma):
        prediction = jnp.asarray(network(np.asarray(x), float(timestep[0])))
        return objective.to_x0("flow", prediction, x, alpha, sigma)

    return np.asarray(sampler.sample(denoise, x, steps, solver=solver, key=key))


def theirs(scheduler, x, begin=0, key=None):
    """The rest of a run of diffusers' scheduler from its step `begin`, with the noise of `sampler.sample`."""
    scheduler.set_begin_index(begin)
    x = torch.tensor(np.array(x))
    for i, timestep in enumerate(scheduler.timesteps[begin:]):
        drawn = {}
        if key is not None:
            drawn["variance_noise"] = torch.tensor(
                np.array(jax.random.normal(jax.random.fold_in(key, i), SHAPE))
            )
        prediction = torch.tensor(network(x.numpy(), float(timestep)))
        x = scheduler.step(prediction, timestep, x, **drawn).prev_sample
    return x.numpy()


def assert_agree(actual, expected):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


def unipc(shift, **config):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **config
    )


def dpm(shift, solver="2m"):
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2 if solver.endswith("2m") else 1,
        algorithm_type="sde-dpmsolver++" if solver.startswith("sde") else "dpmsolver++",
    )


PEERS = {
    "flow_euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "flow_unipc": unipc,
    "flow_dpm": dpm,
}


# ---- Levels ----


@pytest.mark.parametrize("spacing", PEERS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_each_spacing_has_the_levels_of_its_scheduler(spacing, shift):
    schedule = schedules.make_schedule("flow", shift=shift)
    for num_steps in [*range(2, 61), 100]:
        peer = PEERS[spacing](shift)
        peer.set_timesteps(num_steps)
        steps = sampler.make_steps(schedule, num_steps, spacing)
        np.testing.assert_allclose(steps.sigmas, peer.sigmas, atol=1e-7)
        # Whole numbers are the same; the others are float32 there.
        np.testing.assert_allclose(steps.timesteps, peer.timesteps.numpy(), rtol=2e-7)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("start_level", [1.0, 0.7, 0.2])
def test_trailing_has_the_levels_that_pipelines_give_to_flow_match_euler(shift, start_level):
    """As those of Flux and HunyuanVideo do: sigmas from 1 to 1 / T, which the scheduler shifts."""
    steps = sampler.make_steps(schedules.make_schedule("flow", shift=shift), 10, "trailing", start_level)
    first = start_level / (shift - (shift - 1) * start_level)
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=np.linspace(first, first / 10, 10))
    np.testing.assert_allclose(steps.sigmas, peer.sigmas, atol=1e-6)
    np.testing.assert_allclose(steps.timesteps, peer.timesteps, rtol=2e-6)


def test_the_last_level_before_the_clean_views_is_what_spacings_differ_in():
    schedule = schedules.make_schedule("flow", shift=3.0)
    last = {each: sampler.make_steps(schedule, 10, each).sigmas[-2] for each in (*OF_FLOW, "trailing")}
    found = [round(float(last[each]), 3) for each in ("flow_euler", "flow_unipc", "flow_dpm", "trailing")]
    assert found == [0.009, 0.252, 0.25, 0.25]


@pytest.mark.parametrize("spacing", [*OF_FLOW, Spacing.TRAILING])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("start_level", [1.0, 0.999, 0.7, 0.2])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_a_run_goes_from_its_level_to_clean_views(spacing, shift, start_level, num_steps):
    schedule = schedules.make_schedule("flow", shift=shift)
    steps = sampler.make_steps(schedule, num_steps, spacing, start_level)
    assert len(steps.timesteps) == num_steps and (np.diff(steps.sigmas) < 0).all()
    np.testing.assert_allclose(steps.alphas + steps.sigmas, 1, rtol=1e-15)
    assert (steps.alphas[-1], steps.sigmas[-1]) == (1, 0)
    reached = min(start_level, schedule.sigmas[-2]) if spacing == "flow_dpm" else start_level
    np.testing.assert_allclose(steps.sigmas[0], reached, atol=1.1e-6)
    assert np.abs(steps.timesteps - 1000 * steps.sigmas[:-1]).max() < 1
    if start_level == 1 and spacing in ("trailing", "flow_euler"):
        assert (steps.alphas[0], steps.sigmas[0], steps.timesteps[0]) == (0, 1, 1000)
    for solver in Solver:
        assert np.isfinite(sampler.coefficients(steps, solver)).all()
    assert np.isfinite(sampler.corrections(steps)).all()


def test_the_table_of_training_is_that_of_flow_match_euler():
    for shift in SHIFTS:
        schedule, peer = (
            schedules.make_schedule("flow", shift=shift),
            FlowMatchEulerDiscreteScheduler(shift=shift),
        )
        np.testing.assert_allclose(schedule.sigmas[::-1], peer.sigmas, atol=1e-6)
        np.testing.assert_allclose(schedule.timesteps[::-1], peer.timesteps, rtol=1e-6)
        assert schedule.sigmas[-1] == 1 and schedule.alphas[-1] == 0


@pytest.mark.parametrize("rule", schedules.TokenRule)
@pytest.mark.parametrize("num_tokens", [1, 256, 1280, 4096, 5376])
def test_the_shift_of_a_number_of_tokens_is_that_of_dynamic_shifting(rule, num_tokens):
    mu = 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (
        4096 - 256
    )  # on the line through the scheduler's defaults
    peer = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=rule.value)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    steps = sampler.make_steps(schedules.make_schedule("flow", num_tokens=num_tokens, token_rule=rule), 8)
    np.testing.assert_allclose(steps.sigmas, peer.sigmas, atol=1e-6)


# ---- Solvers ----


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_first_order_is_eulers_method_also_on_the_schedule_rescaled_to_preserve_variance(shift):
    """x of flow matching divided by sqrt(alpha^2 + sigma^2) preserves variance, at the same ratios."""
    flow = sampler.make_steps(schedules.make_schedule("flow", shift=shift), 20)
    s = flow.sigmas
    # Euler: x + (t - s) v with v = (x - x0) / s
    euler = np.stack([s[1:] / s[:-1], 1 - s[1:] / s[:-1]], 1)
    np.testing.assert_allclose(sampler.coefficients(flow, "1")[:, :2], euler, atol=3e-16)
    size = np.hypot(flow.alphas, flow.sigmas)
    rescaled = flow._replace(alphas=flow.alphas / size, sigmas=flow.sigmas / size)
    weights = sampler.coefficients(rescaled, "1")[:, :2]
    weights *= size[1:, None] / np.stack([size[:-1], np.ones(20)], 1)
    np.testing.assert_allclose(weights, euler, atol=3e-16)


@pytest.mark.parametrize("spacing", ["flow_euler", "trailing"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [2, 10, 40])
@pytest.mark.parametrize("start_level", [1.0, 0.6])
def test_first_order_agrees_with_flow_match_euler(spacing, shift, num_steps, start_level):
    schedule = schedules.make_schedule("flow", shift=shift)
    full = sampler.make_steps(schedule, num_steps, spacing)
    steps = sampler.tail(full, start_level) if full.sigmas[-2] <= start_level else full
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    given = {} if spacing == "flow_euler" else dict(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    peer.set_timesteps(num_steps, **given)
    x = sampler.renoise(jax.random.key(1), jnp.full(SHAPE, 0.3), steps)
    assert_agree(ours(x, steps, "1"), theirs(peer, x, num_steps - len(steps.timesteps)))


@pytest.mark.parametrize("solver", [each for each in Solver if each != "unipc"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [2, 10, 40])
@pytest.mark.parametrize("start_level", [1.0, 0.6])
def test_every_dpm_solver_agrees_with_diffusers(solver, shift, num_steps, start_level):
    full = sampler.make_steps(schedules.make_schedule("flow", shift=shift), num_steps, "flow_dpm")
    steps = sampler.tail(full, start_level) if full.sigmas[-2] <= start_level else full
    peer = dpm(shift, solver)
    peer.set_timesteps(num_steps)
    key = jax.random.key(3)
    x = sampler.renoise(key, jnp.full(SHAPE, 0.3), steps)
    assert_agree(ours(x, steps, solver, key), theirs(peer, x, num_steps - len(steps.timesteps), key))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 40])
@pytest.mark.parametrize("start_level", [1.0, 0.6123])  # not 0.6: the network is told a whole number near it
def test_unipc_agrees_with_diffusers(shift, num_steps, start_level):
    """From its own levels, and for a restart with as many steps below a level, which it takes as sigmas."""
    steps = sampler.make_steps(
        schedules.make_schedule("flow", shift=shift), num_steps, "flow_unipc", start_level
    )
    peer = unipc(shift)
    if start_level == 1:
        peer.set_timesteps(num_steps)
    else:
        first = start_level / (shift - (shift - 1) * start_level)
        peer.set_timesteps(sigmas=np.linspace(first, 1e-3, num_steps + 1)[:-1])
    x = sampler.renoise(jax.random.key(2), jnp.full(SHAPE, 0.3), steps)
    assert_agree(ours(x, steps, "unipc"), theirs(peer, x))


def test_a_tail_of_unipc_agrees_with_diffusers():
    full = sampler.make_steps(schedules.make_schedule("flow", shift=5.0), 20, "flow_unipc")
    steps = sampler.tail(full, 0.8)
    peer = unipc(5.0)
    peer.set_timesteps(20)
    x = sampler.renoise(jax.random.key(2), jnp.full(SHAPE, 0.3), steps)
    assert_agree(ours(x, steps, "unipc"), theirs(peer, x, 20 - len(steps.timesteps)))


def test_the_corrected_step_is_exact_for_a_quadratic_function_of_lambda():
    """dx = (d log sigma) x + alpha x0 d lambda, integrated by quadrature from a point on each step."""
    steps = sampler.make_steps(schedules.make_schedule("flow", shift=3.0), 8)
    lambdas = np.log(steps.alphas[1:-1] / steps.sigmas[1:-1])

    def x0(of):
        return 0.3 - 0.2 * of + 0.05 * of**2

    nodes, heights = np.polynomial.legendre.leggauss(20)
    for i in range(2, 6):  # the steps with a finite step before them
        s, t = lambdas[i - 1], lambdas[i]
        at = (s + t) / 2 + (t - s) / 2 * nodes
        # x_t / sigma_t = x_s / sigma_s + integral of exp(lambda) x0
        integral = (heights * np.exp(at) * x0(at)).sum() * (t - s) / 2
        from_x, *weights = sampler.corrections(steps)[i]
        np.testing.assert_allclose(from_x, steps.sigmas[i + 1] / steps.sigmas[i])
        found = np.dot(weights, x0(np.array([lambdas[i - 2], s, t])))
        np.testing.assert_allclose(found, steps.sigmas[i + 1] * integral, rtol=1e-10)


def test_a_start_at_pure_noise_is_the_limit_of_starts_below_it():
    schedule = schedules.make_schedule("flow", shift=3.0)
    for solver in Solver:
        at, *below = (
            sampler.coefficients(sampler.make_steps(schedule, 6, "trailing", level), solver)
            for level in (1.0, 1 - 1e-9, 1 - 1e-12)
        )
        distances = [np.abs(each - at).max() for each in below]
        # The step after it extrapolates by h / (2 h_prev), which falls as slowly as 1 / log does.
        assert distances[1] < distances[0] < 0.05
        if not solver.is_second_order:
            assert distances[1] < 1e-9


# ---- Training ----


def test_perfect_predictions_have_no_loss_and_the_gradient_is_the_closed_form():
    rng = np.random.default_rng(0)
    x0, eps, prediction = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(3))
    alpha, sigma = schedules.level(schedules.make_schedule("flow", shift=5.0), jnp.array([100, 999]))
    target = objective.target("flow", x0, eps, alpha, sigma)
    weight = objective.loss_weight("uniform", "flow", alpha, sigma)
    np.testing.assert_array_equal(objective.loss(eps - x0, target, weight), 0)
    gradient = jax.grad(lambda p: objective.loss(p, target, weight).sum())(prediction)
    expected = 2 * (np.asarray(prediction) - (np.asarray(eps) - np.asarray(x0))) / np.prod(SHAPE[1:])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)
    step = np.zeros(SHAPE)
    step[1, 2, 3, 1, 0] = 1e-3
    up, down = (
        ((np.float64(prediction) + sign * step - np.float64(target)) ** 2).mean((1, 2, 3, 4)).sum()
        for sign in (1, -1)
    )
    np.testing.assert_allclose(gradient[1, 2, 3, 1, 0], (up - down) / 2e-3, rtol=1e-4)


QUANTILES = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
NORMAL = np.array([-2.326348, -1.281552, -0.674490, 0, 0.674490, 1.281552, 2.326348])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("mean, std", [(None, None), (0.0, 1.0), (-0.5, 1.5)])
def test_draws_have_the_quantiles_of_their_distribution(mean, std, shift, stratified):
    schedule = schedules.make_schedule("flow", num_steps=100_000, shift=shift)
    normal = dict(draw="logit_normal", logit_mean=mean, logit_std=std) if std else {}

    def draw(key):
        return schedules.sample_timesteps(key, 50, 100_000, stratified, **normal)

    number = jax.vmap(draw)(jax.random.split(jax.random.key(0), 1000)).ravel()
    found = np.quantile(schedule.sigmas[np.asarray(number)], QUANTILES)
    unit = 1 / (1 + np.exp(-(mean + std * NORMAL))) if std else QUANTILES
    expected = unit / (unit + (1 - unit) / shift)
    np.testing.assert_allclose(found, expected, atol=0.012)


def test_the_shifts_of_a_schedule_and_of_a_draw_are_one():
    key = jax.random.key(0)
    once = schedules.make_schedule("flow", num_steps=100_000, shift=6.0)
    twice = schedules.make_schedule("flow", num_steps=100_000, shift=2.0)
    found = [
        schedule.sigmas[np.asarray(schedules.sample_timesteps(key, 64, 100_000, shift=shift))]
        for schedule, shift in ((once, 1.0), (twice, 3.0))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_predictions_and_schedules_that_do_not_go_together_are_refused():
    flow, preserving = schedules.make_schedule("flow"), schedules.make_schedule()
    for prediction_type in ("epsilon", "v"):
        objective.check_goes_with(prediction_type, preserving)
        with pytest.raises(UserError, match=f"predicts '{prediction_type}'.*flow matching.*flow, x0; take"):
            objective.check_goes_with(prediction_type, flow)
    with pytest.raises(UserError, match="predicts 'flow'.*preserves variance.*kind 'flow'"):
        objective.check_goes_with("flow", preserving)
    for schedule in (flow, preserving):
        objective.check_goes_with("x0", schedule)
    objective.check_goes_with("flow", flow)


def test_mistakes_are_one_line(user_module):
    flow, preserving = schedules.make_schedule("flow"), schedules.make_schedule()
    for spacing in ("linspace", "karras"):
        with pytest.raises(
            UserError, match=f"{spacing}' is not one of a flow matching .* trailing, flow_euler"
        ):
            sampler.make_steps(flow, 10, spacing)
    with pytest.raises(UserError, match="flow_dpm' is not one of a variance preserving .* karras$"):
        sampler.make_steps(preserving, 10, "flow_dpm")
    with pytest.raises(UserError, match="no 10 distinct steps"):
        sampler.make_steps(flow, 10, "flow_euler", start_level=1e-4)
    with pytest.raises(UserError, match="scaled_linear takes no argument shift"):
        schedules.make_schedule("scaled_linear", shift=3.0)
    with pytest.raises(UserError, match="shift is 0.0; give a number above 0"):
        schedules.make_schedule("flow", shift=0.0)
    with pytest.raises(UserError, match="shift or num_tokens"):
        schedules.make_schedule("flow", shift=3.0, num_tokens=256)
    with pytest.raises(UserError, match="lead to a shift of -"):
        schedules.make_schedule("flow", num_tokens=1, base_shift=-1.0, token_rule="linear")
    with pytest.raises(UserError, match="make them differ"):
        schedules.make_schedule("flow", num_tokens=1, max_tokens=256)
    neither = user_module("""
        import numpy as np
        from im3d_jax.diffusion.schedules import Schedule

        def schedule(num_steps):
            return Schedule(np.linspace(1, 0, num_steps), np.linspace(0, 1, num_steps), np.arange(num_steps))
    """)
    with pytest.raises(UserError, match=r"alpha\^2 \+ sigma\^2 = 1 does not hold; see `Schedule.shift`"):
        schedules.make_schedule(neither)
