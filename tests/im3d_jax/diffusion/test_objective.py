"""Conversions against algebra, the loss against NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax.diffusion import objective, schedules

SHAPE = (3, 2, 4, 4, 3)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(SHAPE).astype(np.float32)) for _ in range(3)]


@pytest.fixture
def levels():
    """Three assets at low, middle and high noise."""
    return schedules.level(schedules.make_schedule(), jnp.array([30, 400, 900]))


FITTING = [("epsilon", "cosine"), ("v", "cosine"), ("x0", "cosine"), ("x0", "flow"), ("flow", "flow")]
"""Prediction types with a kind of schedule that they go with."""


def levels_of(kind):
    return schedules.level(schedules.make_schedule(kind), jnp.array([30, 400, 900]))


@pytest.mark.parametrize("prediction_type, kind", FITTING)
def test_perfect_prediction_returns_views_and_noise(prediction_type, kind, arrays):
    x0, eps, _ = arrays
    levels = levels_of(kind)
    noisy = objective.add_noise(x0, eps, *levels)
    prediction = objective.target(prediction_type, x0, eps, *levels)
    np.testing.assert_allclose(objective.to_x0(prediction_type, prediction, noisy, *levels), x0, atol=2e-5)
    np.testing.assert_allclose(objective.to_eps(prediction_type, prediction, noisy, *levels), eps, atol=2e-5)


@pytest.mark.parametrize("prediction_type, kind", FITTING)
def test_any_prediction_explains_the_noisy_views(prediction_type, kind, arrays):
    """alpha x0 + sigma eps = x holds for a wrong prediction too."""
    prediction, _, noisy = arrays
    levels = levels_of(kind)
    x0 = objective.to_x0(prediction_type, prediction, noisy, *levels)
    eps = objective.to_eps(prediction_type, prediction, noisy, *levels)
    np.testing.assert_allclose(objective.add_noise(x0, eps, *levels), noisy, atol=2e-5)


def test_pure_noise_and_clean_views(arrays):
    """alpha = 0: v is -x0. sigma = 0: v is eps. Where nothing can be known the value is still finite."""
    x0, eps, _ = arrays
    nothing, all_ = jnp.zeros(SHAPE[0]), jnp.ones(SHAPE[0])
    np.testing.assert_array_equal(objective.add_noise(x0, eps, nothing, all_), eps)
    np.testing.assert_array_equal(objective.target("v", x0, eps, nothing, all_), -x0)
    np.testing.assert_array_equal(objective.to_x0("v", -x0, eps, nothing, all_), x0)
    np.testing.assert_array_equal(objective.to_eps("v", eps, x0, all_, nothing), eps)
    assert np.isfinite(objective.to_x0("epsilon", x0, eps, nothing, all_)).all()
    assert np.isfinite(objective.to_eps("x0", eps, x0, all_, nothing)).all()


def test_bfloat16_prediction_is_converted_in_float32(arrays, levels):
    prediction = jnp.asarray(arrays[0], jnp.bfloat16)
    for prediction_type in objective.PredictionType:
        assert objective.to_x0(prediction_type, prediction, arrays[1], *levels).dtype == jnp.float32
    assert objective.loss(prediction, prediction, levels[0]).dtype == jnp.float32


def from_x0(prediction_type, x0, noisy, alpha, sigma):
    """The prediction that says x0, given the noisy views."""
    eps = objective.to_eps("x0", x0, noisy, alpha, sigma)
    return objective.target(prediction_type, x0, eps, alpha, sigma)


@pytest.mark.parametrize(
    "kind, on_x0", [("min_snr_5", lambda snr: min(snr, 5)), ("truncated_snr", lambda snr: max(snr, 1))]
)
def test_weights_mean_the_same_loss_in_every_prediction_space(kind, on_x0, arrays):
    prediction, target, noisy = arrays
    for prediction_type, schedule in FITTING:
        levels = levels_of(schedule)
        alpha, sigma = (np.asarray(level, np.float64) for level in levels)
        expected = np.array([on_x0(r) for r in (alpha / sigma) ** 2]) * ((prediction - target) ** 2).mean(
            (1, 2, 3, 4)
        )
        weight = objective.loss_weight(kind, prediction_type, *levels)
        in_its_space = [from_x0(prediction_type, x0, noisy, *levels) for x0 in (prediction, target)]
        np.testing.assert_allclose(objective.loss(*in_its_space, weight), expected, rtol=2e-4)


def test_weights_are_finite_at_both_ends():
    alpha, sigma = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
    for prediction_type in objective.PredictionType:
        for kind in ("uniform", "min_snr_5", "truncated_snr"):
            assert np.isfinite(objective.loss_weight(kind, prediction_type, alpha, sigma)).all()
    np.testing.assert_allclose(objective.loss_weight("min_snr_5", "epsilon", alpha, sigma)[0], 1)
    np.testing.assert_allclose(objective.loss_weight("min_snr_5", "x0", alpha, sigma)[1], 5)
    np.testing.assert_array_equal(objective.loss_weight("uniform", "v", alpha, sigma), 1)


def numpy_loss(prediction, target, weight):
    return weight * ((prediction - target) ** 2).mean((1, 2, 3, 4))


def test_loss_and_its_gradient(arrays):
    prediction, target, _ = (np.asarray(array, np.float64) for array in arrays)
    weight = np.array([0.5, 1.0, 3.0])
    arguments = jnp.asarray(prediction, jnp.float32), arrays[1], jnp.asarray(weight, jnp.float32)
    np.testing.assert_allclose(objective.loss(*arguments), numpy_loss(prediction, target, weight), rtol=1e-5)
    gradient = jax.grad(lambda *each: objective.loss(*each).sum())(*arguments)
    for index in [(0, 0, 0, 0, 0), (0, 1, 1, 2, 0), (1, 0, 3, 1, 2), (2, 1, 3, 3, 2)]:
        step = np.zeros(SHAPE)
        step[index] = 1e-4
        up, down = (numpy_loss(prediction + s, target, weight).sum() for s in (step, -step))
        np.testing.assert_allclose(gradient[index], (up - down) / 2e-4, rtol=1e-4, atol=1e-9)


def test_gradient_reaches_the_network_through_every_conversion(arrays, levels):
    """d x0 / d prediction is -sigma / alpha, -sigma, 1 or -sigma."""
    prediction, noisy, _ = arrays
    alpha, sigma = (np.asarray(level) for level in levels)
    expected = {"epsilon": -sigma / alpha, "v": -sigma, "x0": np.ones_like(alpha), "flow": -sigma}
    for prediction_type, slope in expected.items():
        gradient = jax.grad(lambda p, kind=prediction_type: objective.to_x0(kind, p, noisy, *levels).sum())(
            prediction
        )
        np.testing.assert_allclose(
            gradient, np.broadcast_to(slope[:, None, None, None, None], SHAPE), rtol=1e-5
        )


def test_unknown_names_are_one_clear_line():
    x = jnp.zeros(SHAPE)
    ones = jnp.ones(SHAPE[0])
    for call in (
        lambda: objective.target("noise", x, x, ones, ones),
        lambda: objective.to_x0("noise", x, x, ones, ones),
        lambda: objective.loss_weight("max_snr", "v", ones, ones),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)
