"""Guidance against Emu Video's formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax.diffusion.guidance import Guidance

SHAPE = (2, 3, 4, 4, 2)


@pytest.fixture
def predictions():
    return np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)


def guided(predictions, guidance):
    """`Guidance.predict` with a network that looks its prediction up, and how many it had to look up."""
    batches = []

    def lookup(noisy, timestep, condition):
        batches.append(len(noisy))
        assert len(timestep) == len(noisy) == len(condition["prediction"])
        return condition["prediction"]

    conditions = {
        name: {"prediction": jnp.asarray(p)}
        for name, p in zip(("null", "image", "full"), predictions, strict=True)
    }
    result = guidance.predict(lookup, jnp.zeros(SHAPE), jnp.zeros(SHAPE[0], jnp.int32), conditions)
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
    assert computed == guidance.num_evaluations == evaluations


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
