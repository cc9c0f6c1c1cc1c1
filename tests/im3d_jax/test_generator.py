"""The generator: how often it calls the network, with which conditions, and that its samples repeat."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import checkpoint, config_flags, generator, sampling_checks
from im3d_jax.diffusion import sampler
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
LATENT = (2, 2, 64)


@pytest.fixture
def config():
    config = config_flags.load(CONFIG)
    config.size = 8
    config.backbone.kwargs.update(latent_shape=LATENT, channel_mult=(1,), num_res_blocks=(1,))
    return config


def make_stub(config):
    """A generator whose network predicts from what it is told, and notes each call."""
    made = generator.load(config, params={"scale": jnp.float32(0.9)})
    calls = []

    class Network:
        latent_shape, num_views, prediction_type, traceable = LATENT, None, "x0", True
        temporal_pattern, partition_rules = "", ()
        empty_conditioning = staticmethod(made.model.empty_conditioning)

        @staticmethod
        def init(key):
            raise AssertionError("its parameters are given")

        @staticmethod
        def apply(params, noisy, timestep, given):
            jax.debug.callback(
                lambda *told: calls.append(told), timestep, given.image_mask, given.text_mask[0]
            )
            words = given.text[0].sum(1).astype(jnp.float32) / 1000
            told = words[:, None, None, None] + given.image * given.image_mask[:, None, None, None]
            return 0.2 * noisy * params["scale"] + told[:, None] + timestep[:, None, None, None, None] * 1e-4

    return dataclasses.replace(made, model=Network), calls


def image_of(made, batch):
    """A picture (rgb, alpha) for each asset."""
    latents = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (batch, *LATENT)), jnp.float32)
    return made.codec.decode(latents)


def test_the_shipped_config_makes_the_papers_80_calls(config):
    """40 for the first video and 2 runs of 10 steps in each of 2 rounds (A.1, Table 4)."""
    made, _ = make_stub(config)
    given = made.condition(["a red car"], *image_of(made, 1))
    latents = made.turntable(given, jax.random.key(0))
    assert made.count.calls == 40
    for _ in config.rounds.at_steps:
        for _ in range(config.rounds.num_runs):
            latents = made.refine(latents, given, jax.random.key(1))
    assert made.count.calls == 80
    assert latents.shape == (1, 16, *LATENT)


@pytest.mark.parametrize("solver", ["2m", "sde_2m"])
def test_views_that_pictures_show_are_denoised_to_them_at_the_level_of_every_step(config, solver):
    """By the ODE with one noise throughout, as which the start has it; by the SDE with noise of its size."""
    config.video.update(num_steps=6, solver=solver)
    made, _ = make_stub(config)
    seen = []

    class Watched(made.model):
        traceable = False

        @staticmethod
        def apply(params, noisy, timestep, given):
            assert given.sides is None
            seen.append((noisy, float(timestep[0])))
            return 0.2 * noisy

    made = dataclasses.replace(made, model=Watched)
    rgb, alpha = image_of(made, 2)
    given = made.condition(["a car"], rgb[:1], alpha[:1], shown={5: (rgb[1:], alpha[1:])})
    made.turntable(given, jax.random.key(0))
    steps = sampler.make_steps(made.schedule, 6, made.video.spacing)
    known = made.codec.encode(rgb[1:, None], alpha[1:, None])[0, 0]
    noises = []
    for step in range(6):
        front, turned = seen[2 * step : 2 * step + 2]
        np.testing.assert_array_equal(turned[0], jnp.roll(front[0], -5, 1))
        assert front[1] == turned[1] == steps.timesteps[step]
        noises.append((turned[0][0, 0] - steps.alphas[step] * known) / steps.sigmas[step])
    assert made.count.calls == len(seen) == 12
    if solver == "2m":
        np.testing.assert_allclose(noises, [noises[0]] * 6, atol=2e-2)
    assert all(0.75 < float(jnp.std(each)) < 1.25 for each in noises)


def test_a_restart_holds_the_views_that_pictures_show(config):
    config.rounds.num_steps = 3
    made, _ = make_stub(config)
    rgb, alpha = image_of(made, 2)
    alone = made.condition(["a car"], rgb[:1], alpha[:1])
    given = made.condition(["a car"], rgb[:1], alpha[:1], shown={5: (rgb[1:], alpha[1:])})
    renders = jnp.zeros((1, 16, *LATENT))
    first, both = (made.refine(renders, each, jax.random.key(1)) for each in (alone, given))
    known = made.codec.encode(rgb[:, None], alpha[:, None])[:, 0]
    np.testing.assert_allclose(both[0, [0, 5]], known, atol=1e-6)
    moved = (both != first).any((0, 2, 3, 4))  # the network here makes each view by itself
    np.testing.assert_array_equal(np.flatnonzero(moved), range(2, 9))


def test_a_picture_has_its_share_in_the_views_on_its_side():
    half = np.cos(np.pi / 4) ** generator.SHARPNESS
    np.testing.assert_allclose(generator.side_shares([4], 8), [[0, 0, 0, half, 1, half, 0, 0]], atol=1e-7)
    crowded = generator.side_shares([3, 4], 8)
    np.testing.assert_allclose(crowded[:, 3], np.array([1, half]) / (1 + half), atol=1e-7)
    assert crowded.sum(0).max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "w_image, w_text, per_call", [(1.0, 1.0, 1), (2.0, 2.0, 2), (1.0, 3.0, 2), (2.0, 7.5, 3), (0.0, 0.0, 1)]
)
def test_guidance_is_one_call_of_several_evaluations(config, w_image, w_text, per_call):
    config.video.update(num_steps=3, w_image=w_image, w_text=w_text)
    made, calls = make_stub(config)
    made.turntable(made.condition(["a car", "a duck"], *image_of(made, 2)), jax.random.key(0))
    jax.effects_barrier()
    assert made.count.calls == len(calls) == 3
    assert made.count.evaluations == 3 * per_call
    for timestep, image_mask, text_mask in calls:
        assert len(timestep) == 2 * per_call and len(set(timestep.tolist())) == 1
        told = {(bool(i), int(t.sum()) > 1) for i, t in zip(image_mask, text_mask, strict=True)}
        assert len(told) == per_call
    assert [int(call[0][0]) for call in calls] == sorted((int(call[0][0]) for call in calls), reverse=True)


def test_outside_the_interval_of_guidance_evaluations_are_saved_and_not_only_counted(config):
    config.video.update(num_steps=6, w_image=2.0, w_text=7.5, guidance_interval=(0.5, 0.9))
    made, calls = make_stub(config)
    made.turntable(made.condition(["a car"], *image_of(made, 1)), jax.random.key(0))
    jax.effects_barrier()
    sigmas = sampler.make_steps(made.schedule, 6, made.video.spacing).sigmas[:-1]
    inside = (sigmas >= 0.5) & (sigmas <= 0.9)
    assert 0 < inside.sum() < 6
    by_level = sorted(calls, key=lambda call: -int(call[0][0]))
    assert [len(timestep) for timestep, *_ in by_level] == np.where(inside, 3, 1).tolist()
    assert (made.count.calls, made.count.evaluations) == (6, 6 + 2 * inside.sum())
    for (_, image_mask, text_mask), guided in zip(by_level, inside, strict=True):
        if not guided:
            assert image_mask.all() and text_mask.sum() > 1


def test_a_negative_prompt_is_what_the_other_branches_are_told(config):
    """Its words take the place of the empty prompt's, and the result is that of the formula."""
    config.video.update(num_steps=1, w_image=1.0, w_text=3.0, negative_prompt="duck", tie_first_view=False)
    made, calls = make_stub(config)
    clean = made.turntable(made.condition(["a red car"], *image_of(made, 1)), jax.random.key(0))
    jax.effects_barrier()
    [(_, _, text_mask)] = calls
    words = [int(made.text.encode([prompt])[1][0].sum()) for prompt in ("duck", "a red car")]
    np.testing.assert_array_equal(text_mask.sum(1), words)
    told = [float(made.text.encode([prompt])[0][0].sum()) / 1000 for prompt in ("duck", "a red car", "")]
    config.video.negative_prompt = ""
    plain, _ = make_stub(config)
    other = plain.turntable(plain.condition(["a red car"], *image_of(plain, 1)), jax.random.key(0))
    # The prediction is the sum of a part that does not depend on text and what the words tell, times 1 - 3.
    free = np.maximum(np.abs(clean), np.abs(other)) < 0.9  # the codec clips the rest
    assert free.mean() > 0.5
    difference = (np.asarray(clean) - np.asarray(other))[free]
    np.testing.assert_allclose(difference, (1 - 3) * (told[0] - told[2]), atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"guidance_interval": (0.5, 0.5)},
            r"config.video.guidance_interval is \(0.5, 0.5\); give the lowest",
        ),
        ({"guidance_interval": (0.5,)}, r"config.video.guidance_interval is \(0.5,\); give the lowest"),
        ({"guidance_interval": (0.1, 0.9), "w_text": 1.0}, "no guidance to leave out"),
        ({"guidance_interval": (0.9991, 0.9992)}, "has none of the levels of the 40 steps"),
        (
            {"negative_prompt": "duck", "w_text": 1.0},
            "video.negative_prompt changes nothing without guidance",
        ),
        ({"w_text_end": (1.0, 2.0)}, "w_text_end has 2 scales; give a number, or one for each of the 16"),
    ],
)
def test_guidance_that_changes_nothing_is_refused(config, changes, message, user_error):
    config.video.update({"w_image": 1.0, "w_text": 3.0} | changes)
    with user_error(message):
        sampling_checks.check(config)


def test_a_pipeline_that_draws_is_told_no_negative_prompt(config, user_error):
    config.text_to_image.update(pipeline="some/directory", negative_prompt="duck")
    with user_error("the pipeline that draws the picture is not told it"):
        sampling_checks.check(config)


def test_a_negative_prompt_that_is_not_encoded_is_refused(config, user_error):
    config.video.negative_prompt = "duck qwertz"
    with user_error("config.video.negative_prompt: .*qwertz"):
        make_stub(config)
    config.video.negative_prompt, config.text.name, config.text.kwargs = "duck", "none", {}
    with user_error("none encodes no text; leave it empty|config.text makes widths"):
        make_stub(config)


def test_flow_matching_samples_and_restarts(config):
    """A network that sees the clean views in x = (1 - s) x0 + s eps, from pure noise and from renders."""
    config.schedule.update(kind="flow", shift=3.0)
    config.video.update(num_steps=4, solver="unipc", spacing="flow_unipc", tie_first_view=False)
    config.rounds.update(num_steps=3)
    made, calls = make_stub(config)
    found = []

    class Velocity(made.model):
        prediction_type, traceable = "flow", False

        @staticmethod
        def apply(params, noisy, timestep, given):
            found.append((noisy, float(timestep[0])))
            return (noisy - 0.3) / (1e-3 * timestep[0])

    made = dataclasses.replace(made, model=Velocity)
    given = made.condition(["a car"], *image_of(made, 1))
    np.testing.assert_allclose(made.turntable(given, jax.random.key(0)), 0.3, atol=2e-2)
    assert [timestep for _, timestep in found] == [999, 900, 750, 500] or len(found) == 4
    del found[:]
    renders = jnp.full((1, 16, *LATENT), 0.5)
    made.refine(renders, given, jax.random.key(1))
    noisy, timestep = found[0]
    assert len(found) == 3 and abs(timestep - 700) <= 1
    np.testing.assert_allclose(noisy.mean(), 0.3 * 0.5, atol=0.03)
    np.testing.assert_allclose(noisy.std(), 0.7, atol=0.03)


def test_images_come_from_text_alone(config):
    config.text_to_image.update(num_steps=2, w_text=2.0)
    made, calls = make_stub(config)
    rgb, alpha = made.text_to_image(["a red car", "a duck", ""], jax.random.key(0))
    jax.effects_barrier()
    assert rgb.shape == (3, 8, 8, 3) and alpha.shape == (3, 8, 8, 1)
    assert (made.count.calls, made.count.evaluations) == (2, 4)
    assert all(not image_mask.any() for _, image_mask, _ in calls)


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_view_is_the_image_if_tied(config, tied):
    config.video.update(num_steps=2, tie_first_view=tied)
    made, _ = make_stub(config)
    given = made.condition(["a car"], *image_of(made, 1))
    for latents in (
        made.turntable(given, jax.random.key(0)),
        made.refine(jnp.zeros((1, 16, *LATENT)), given, jax.random.key(0)),
    ):
        assert np.allclose(latents[:, 0], given.image, atol=1e-6) == tied
        assert np.abs(latents).max() <= 1 + 1e-6


def test_samples_repeat_with_the_key_and_differ_without(config):
    config.video.update(num_steps=2, solver="sde_2m")
    made, _ = make_stub(config)
    given = made.condition(["a car"], *image_of(made, 1))
    first, again, other = (made.turntable(given, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first[:, 1:], other[:, 1:])


def test_restarting_keeps_more_of_the_renders_at_lower_levels(config):
    """The stub returns a fifth of what it sees, so what is left says how much noise was put on."""
    renders = jnp.ones((1, 16, *LATENT))
    distances = []
    for start_level in (0.1, 0.5, 0.9):
        config.rounds.update(num_steps=1, start_level=start_level)
        made, _ = make_stub(config)
        given = made.condition([""], jnp.full((1, 8, 8, 3), 0.5), jnp.full((1, 8, 8, 1), 0.5))
        distances.append(float(made.refine(renders, given, jax.random.key(0))[:, 1:].std()))
    assert distances[0] < distances[1] < distances[2]
    np.testing.assert_allclose(np.array(distances) / distances[2], np.array([0.1, 0.5, 0.9]) / 0.9, rtol=0.02)


def test_weights_of_other_words_are_refused(config, tmp_path, monkeypatch):
    config.weights = str(tmp_path / "w.safetensors")
    shapes = {"scale": jnp.float32(1)}
    monkeypatch.setattr(generator.jax, "eval_shape", lambda *_: shapes)
    checkpoint.save_weights(tmp_path / "w.safetensors", shapes, {"words": list(config.text.kwargs.words)})
    assert generator.load(config).params == shapes
    checkpoint.save_weights(
        tmp_path / "w.safetensors", shapes, {"words": list(config.text.kwargs.words)[::-1]}
    )
    with pytest.raises(UserError, match="other words than config.text"):
        generator.load(config)
