"""Guidance against Emu Video's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax.diffusion.guidance import Branch, Guidance, predict
from im3d_jax.settings import VideoSettings

SHAPE = (2, 3, 4, 4, 2)


@pytest.fixture
def predictions():
    return np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def guided(predictions, guidance, sigma=0.5):
    """`predict` with a network that looks its prediction up, and how many it had to look up."""
    batches = []

    def lookup(noisy, timestep, condition):
        batches.append(len(noisy))
        assert len(timestep) == len(noisy) == len(condition["prediction"])
        return condition["prediction"]

    conditions = {
        name: {"prediction": jnp.asarray(p)}
        for name, p in zip(("null", "image", "full"), predictions, strict=True)
    }
    weights, rescale = guidance.weights(sigma), guidance.rescale
    arguments = jnp.zeros(SHAPE), jnp.zeros(SHAPE[0], jnp.int32), conditions
    result = predict(lookup, *arguments, weights, rescale)
    traced = jax.jit(lambda weights: predict(lookup, *arguments, weights, rescale))(weights)
    np.testing.assert_allclose(traced, result, atol=1e-5)
    del batches[1:]
    assert len(batches) == 1
    return result, batches[0] // SHAPE[0]


@pytest.mark.parametrize(
    "w_image, w_text, evaluations",
    [(2.0, 7.5, 3), (1.0, 1.0, 1), (1.0, 7.5, 2), (2.0, 2.0, 2), (3.0, 0.0, 2), (1.0, 0.0, 1), (0.0, 0.0, 1)],
)
def test_guidance_is_emu_videos_formula_in_one_call(w_image, w_text, evaluations, predictions):
    null, image, full = predictions
    guidance = Guidance(w_image, w_text)
    result, computed = guided(predictions, guidance)
    expected = null + w_image * (image - null) + w_text * (full - image)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert [computed] == guidance.evaluations([0.5]) == [evaluations]


def test_guidance_per_view(predictions):
    null, image, full = predictions
    w_image = np.array([1.0, 2.0, 2.5])
    result, _ = guided(predictions, Guidance(w_image, 2 * w_image))
    for k, w in enumerate(w_image):
        expected = null[:, k] + w * (image - null)[:, k] + 2 * w * (full - image)[:, k]
        np.testing.assert_allclose(result[:, k], expected, atol=1e-5)


def test_rescale_restores_the_contrast_of_the_conditional_prediction(predictions):
    axes = (1, 2, 3, 4)
    plain, _ = guided(predictions, Guidance())
    half, _ = guided(predictions, Guidance(rescale=0.5))
    full, _ = guided(predictions, Guidance(rescale=1.0))
    assert (plain.std(axes) > 2 * predictions[2].std(axes)).all()
    np.testing.assert_allclose(full.std(axes), predictions[2].std(axes), rtol=1e-5)
    np.testing.assert_allclose(half, (plain + full) / 2, atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.0])
def test_scales_go_on_a_line_in_the_noise_level(sigma, predictions):
    null, image, full = predictions
    along = np.array([1.0, 2.0, 3.0])  # of the views, as SVD has it
    guidance = Guidance(along, 7.0, w_image_end=2.0, w_text_end=1.0)
    result, _ = guided(predictions, guidance, sigma)
    w_text = 1 + 6 * sigma
    for k, w in enumerate(along):
        w_image = 2 + (w - 2) * sigma
        expected = null[:, k] + w_image * (image - null)[:, k] + w_text * (full - image)[:, k]
        np.testing.assert_allclose(result[:, k], expected, atol=2e-5)


def test_outside_its_interval_guidance_is_one_evaluation_of_all_conditions(predictions):
    guidance = Guidance(2.0, 7.5, interval=(0.3, 0.7))
    for sigma, evaluations in [(1.0, 1), (0.71, 1), (0.7, 3), (0.3, 3), (0.29, 1), (0.0, 1)]:
        result, computed = guided(predictions, guidance, sigma)
        assert [computed] == guidance.evaluations([sigma]) == [evaluations]
        if evaluations == 1:
            np.testing.assert_array_equal(result, predictions[2])
    assert list(guidance.weights(0.9)) == [Branch.FULL]


def test_settings_reach_guidance_by_their_names():
    settings = VideoSettings(
        w_image=2.0, w_text=3.0, w_image_end=4.0, w_text_end=5.0, rescale=0.5, guidance_interval=(0.1, 0.9)
    )
    found = Guidance.of_video(settings)
    assert found == Guidance(2.0, 3.0, 0.5, 4.0, 5.0, (0.1, 0.9))
    assert found.with_scales(lambda scale: 2 * scale) == Guidance(4.0, 6.0, 0.5, 8.0, 10.0, (0.1, 0.9))
    assert Guidance(1.0, 2.0).with_scales(lambda scale: 2 * scale) == Guidance(2.0, 4.0)
