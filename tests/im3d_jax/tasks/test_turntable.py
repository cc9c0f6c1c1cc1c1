"""The loss of Sec. 3.1 against float64 on a network of one number, what it is told, and what it is asked."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from im3d_jax import backbones, checkpoint, costs, sharding
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.conditions.text import NoText
from im3d_jax.data.sources import ProceduralSource
from im3d_jax.tasks import turntable
from im3d_jax.tasks.turntable import NUM_LEVELS, Draws, Stream
from im3d_jax.trainable import Part
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

TOKENS, TEXT = (2, 5), (3, 6)
EVERYTHING = Stream(keep_image=1.0, keep_text=1.0, timestep_shift=1.0)


class Scale:
    """A backbone that predicts its input times a parameter, and shows what else it was given."""

    latent_shape, prediction_type, num_views, traceable = (2, 2, 64), "v", None, True
    temporal_pattern, partition_rules = "scale", ()

    def __init__(self):
        self.seen = None

    def init(self, key):
        return {"scale": jnp.ones(())}

    def apply(self, params, noisy, timestep, conditioning):
        self.seen = noisy, timestep, conditioning
        return params["scale"] * noisy

    def empty_conditioning(self, batch):
        text, mask = (jnp.zeros((batch, *TEXT)),), (jnp.zeros((batch, TEXT[0])),)
        image = jnp.zeros((batch, *self.latent_shape)), jnp.zeros(batch)
        return Conditioning(*image, text, mask, jnp.zeros((batch, *TOKENS)), jnp.zeros(batch))


class Letters:
    words = ("a", "b")

    def encode(self, prompts):
        text = np.stack([np.full(TEXT, len(prompt), np.float32) for prompt in prompts])
        return (text,), (np.ones(text.shape[:2], np.float32),)

    def warnings(self, prompt):
        return []

    def understands(self, prompt):
        return True


class Tokens:
    def encode(self, rgb):
        return np.broadcast_to(np.asarray(rgb).mean((1, 2, 3))[:, None, None], (len(rgb), *TOKENS))


@pytest.fixture
def task(shrunk, monkeypatch):
    """The task with `Scale`, encoders of a few numbers, and a schedule with zero terminal SNR."""
    config = shrunk()
    monkeypatch.setattr("im3d_jax.conditions.text.build_text", lambda *_: Letters())
    monkeypatch.setattr(backbones, "build", lambda *_: Scale())
    made = turntable.build(config, sharding.make_mesh(devices=jax.devices()[:1]))
    made.generator = dataclasses.replace(made.generator, image_encoder=Tokens())
    return made


@pytest.fixture(scope="module")
def examples():
    return ProceduralSource(0, 20_000, 8, 3).batch(range(4))


def draws(numbers, keep_image=1, keep_text=1, start=0.0):
    count = len(numbers)
    keys = jax.random.split(jax.random.key(5), count)
    kept = (jnp.full(count, bool(keep)) for keep in (keep_image, keep_text))
    return Draws(jnp.asarray(numbers), keys, *kept, jnp.full(count, start))


def test_the_loss_is_that_of_float64(task, examples):
    batch = task.collate(examples)
    drawn = draws([0, 350, 700, 999])
    loss, sums = task.loss({"scale": jnp.float32(0.5)}, task.constants, batch, drawn, EVERYTHING)

    x0 = np.float64(task.generator.codec.encode(batch["rgb"], batch["alpha"]))
    noise = np.stack([np.asarray(jax.random.normal(key, x0.shape[1:])) for key in drawn.noise_key])
    alpha, sigma = (
        np.asarray(level)[np.asarray(drawn.number)].reshape(-1, 1, 1, 1, 1) for level in task.schedule[:2]
    )
    noisy = alpha * x0 + sigma * noise
    errors = np.mean((0.5 * noisy - (alpha * noise - sigma * x0)) ** 2, (1, 2, 3, 4))
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
    expected = np.zeros(NUM_LEVELS)
    expected[[0, 3, 7, 9]] = errors
    np.testing.assert_allclose(sums["loss_by_level"], expected, rtol=1e-5)
    np.testing.assert_array_equal(sums["count_by_level"], expected > 0)
    seen, timestep, given = task.model.seen
    np.testing.assert_allclose(seen, noisy, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(timestep, [0, 350, 700, 999])
    np.testing.assert_allclose(given.image, x0[:, 0], rtol=1e-6, atol=1e-6)


def test_the_loss_of_flow_matching_is_that_of_float64(shrunk, monkeypatch, examples):
    """The mean square of the velocity's error; the network is told 1000 s; a perfect one has no loss."""

    class Velocity(Scale):
        prediction_type = "flow"

    monkeypatch.setattr("im3d_jax.conditions.text.build_text", lambda *_: Letters())
    monkeypatch.setattr(backbones, "build", lambda *_: Velocity())
    config = shrunk()
    config.schedule.update(kind="flow", shift=3.0)
    config.train.streams.turntable.update(timestep_draw="logit_normal", logit_mean=0.5)
    task = turntable.build(config, sharding.make_mesh(devices=jax.devices()[:1]))
    task.generator = dataclasses.replace(task.generator, image_encoder=Tokens())
    assert task.stream("turntable").logit_mean == 0.5
    batch, drawn = task.collate(examples), draws([0, 350, 700, 999])
    loss, _ = task.loss({"scale": jnp.float32(0.5)}, task.constants, batch, drawn, EVERYTHING)
    x0 = np.float64(task.generator.codec.encode(batch["rgb"], batch["alpha"]))
    noise = np.stack([np.asarray(jax.random.normal(key, x0.shape[1:])) for key in drawn.noise_key])
    unit = (np.array([0, 350, 700, 999]) + 1) / 1000
    s = (3 * unit / (1 + 2 * unit)).reshape(-1, 1, 1, 1, 1)
    noisy = (1 - s) * x0 + s * noise
    np.testing.assert_allclose(loss, np.mean((0.5 * noisy - (noise - x0)) ** 2), rtol=1e-5)
    seen, timestep, _ = task.model.seen
    np.testing.assert_allclose(seen, noisy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(timestep, 1000 * s.ravel(), rtol=1e-6)
    task.model.apply = lambda *_: jnp.asarray(noise - x0, jnp.float32)
    loss, _ = task.loss({"scale": jnp.float32(0.5)}, task.constants, batch, drawn, EVERYTHING)
    assert loss < 1e-12


def test_draws_and_predictions_that_do_not_go_with_the_rest_are_refused(shrunk, user_error):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = shrunk()
    config.train.streams.turntable.logit_std = 0.5
    with user_error("config.train.streams.turntable: logit_mean 0 and logit_std 0.5 change nothing"):
        turntable.build(config, mesh)
    config = shrunk()
    config.backbone.kwargs.update(prediction_type="flow", copy_gate=False)
    with user_error("the backbone predicts 'flow', and config.schedule preserves variance, which goes with"):
        turntable.build(config, mesh)


def test_what_the_network_is_told(task, examples):
    batch = task.collate(examples)
    for keep_image, keep_text in ((1, 1), (0, 1), (1, 0)):
        drawn = draws([10] * 4, keep_image, keep_text)
        task.loss(task.model.init(None), task.constants, batch, drawn, EVERYTHING)
        given = task.model.seen[2]
        np.testing.assert_array_equal(given.image_mask, [keep_image] * 4)
        tokens = [np.full(TOKENS, views[0].mean() * keep_image) for views in np.asarray(batch["rgb"])]
        np.testing.assert_allclose(given.image_tokens, tokens, rtol=1e-5)
        text = [np.full(TEXT, len(example["caption"]) * keep_text) for example in examples]
        np.testing.assert_array_equal(given.text[0], text)
        np.testing.assert_allclose(given.elevation_rad, [each["elevation_rad"] for each in examples])


def test_a_turntable_that_starts_elsewhere_is_the_turned_object(task, examples):
    batch, params = task.collate(examples), task.model.init(None)
    turned = {name: np.roll(batch[name], -2, axis=1) for name in ("rgb", "alpha")}
    loss, expected = (
        task.loss(params, task.constants, views, draws([0, 350, 700, 999], start=start), EVERYTHING)[0]
        for views, start in ((batch, 0.7), (batch | turned, 0.0))  # floor(0.7 * 3) = 2
    )
    unturned, _ = task.loss(params, task.constants, batch, draws([0, 350, 700, 999]), EVERYTHING)
    assert float(loss) == float(expected) != float(unturned)
    with pytest.raises(UserError, match="random_start does not go with a backbone that attends"):
        turntable.TurntableTask(task.generator, {"turntable": EVERYTHING._replace(random_start=0.5)})


class Unasked(NoText):
    def encode(self, prompts):
        raise AssertionError("cached text is encoded again")


def test_cached_is_as_good_as_computed(task, examples):
    """Latents, text and tokens of a data set take the place of encoders that would raise."""
    fresh = task.collate(examples)
    latents = np.asarray(task.generator.codec.encode(fresh["rgb"], fresh["alpha"]))
    cached = [
        {
            **{name: example[name] for name in ("id", "caption", "elevation_rad")},
            "latents": latents[row],
            "text": (fresh["text"][0][row].astype(np.float16),),
            "text_mask": (fresh["text_mask"][0][row],),
            "image_tokens": fresh["image_tokens"][row],
        }
        for row, example in enumerate(examples)
    ]
    params, drawn = task.model.init(None), draws([0, 350, 700, 999])
    expected, _ = task.loss(params, task.constants, fresh, drawn, EVERYTHING)
    task.generator = dataclasses.replace(task.generator, text=Unasked(), image_encoder=None)
    batch = task.collate(cached)
    assert "rgb" not in batch
    loss, _ = task.loss(params, task.constants, batch, drawn, EVERYTHING)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)

    with pytest.raises(UserError, match="image_encoder.path, or build the data set with image tokens"):
        task.collate([{name: each[name] for name in each if name != "image_tokens"} for each in cached])
    wrong = copy.deepcopy(cached)
    for each in wrong:
        each["latents"] = each["latents"][..., :4]
    with pytest.raises(UserError, match=r"latents have shape \(2, 2, 4\), the backbone takes \(2, 2, 64\)"):
        task.collate(wrong)


def test_draws_have_the_shares_and_levels_that_a_stream_asks_for(task):
    stream = Stream(keep_image=0.9, keep_text=0.3, timestep_shift=3.0, random_start=0.8)
    drawn = task.draw(jax.random.key(0), 4000, stream)
    np.testing.assert_allclose(drawn.keep_image.mean(), 0.9, atol=0.03)
    np.testing.assert_allclose(drawn.keep_text.mean(), 0.3, atol=0.03)
    # Of the turntables that start anywhere, one in K starts at view 0.
    of_16 = np.bincount(np.floor(np.asarray(drawn.start) * 16).astype(int), minlength=16) / 4000
    np.testing.assert_allclose(of_16, [0.2 + 0.05] + [0.05] * 15, atol=0.02)
    # Median of u = 1/2 under 3 u / (1 + 2 u).
    np.testing.assert_allclose(np.median(drawn.number), 750, atol=5)
    assert len(np.unique(jax.random.key_data(drawn.noise_key), axis=0)) == 4000


def test_flops_are_three_times_a_call_and_leave_out_what_nothing_needs(shrunk):
    """Forward, and backward to inputs and to weights; with frozen weights less, and remat makes no more."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    whole, temporal = (
        turntable.build(shrunk(), mesh).flops(Part(pattern), 8, 3) for pattern in (".*", "temporal")
    )
    config = shrunk()
    with config.unlocked():
        config.backbone.kwargs.remat = "nothing_saveable"
    assert turntable.build(config, mesh).flops(Part(".*"), 8, 3) == whole
    task = turntable.build(shrunk(), mesh)
    model, batch = task.model, 8
    noisy = jax.ShapeDtypeStruct((batch, 3, *model.latent_shape), jnp.float32)
    program = costs.trace(
        model.apply,
        jax.eval_shape(model.init, jax.random.key(0)),
        noisy,
        jax.ShapeDtypeStruct((batch,), jnp.float32),
        jax.eval_shape(lambda: model.empty_conditioning(batch)),
    )
    forward = costs.count_flops(program)
    assert 0.5 * whole < temporal < 0.95 * whole
    assert 2.7 * forward < whole <= 3.0 * forward


def test_samples_are_turntables_of_prompts_and_pictures(shrunk, random_params, tmp_path):
    from flax import traverse_util
    from PIL import Image

    picture = np.full((16, 16, 4), 255, np.uint8)
    picture[:4], picture[..., 1] = 0, 30
    Image.fromarray(picture).save(tmp_path / "picture.png")
    config = shrunk()
    config.num_views = 3
    config.text_to_image.num_steps = config.video.num_steps = 2
    config.train.sample.update(prompts=("a red chair",), images=(str(tmp_path / "picture.png"),))
    config.train.weights_dtype = "bfloat16"
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    task = turntable.build(config, mesh)
    params = traverse_util.unflatten_dict(random_params, sep="/")
    params = jax.device_put(params, sharding.of_tree(params, task.partition_rules, mesh))
    videos = task.sample(params, jax.random.key(0))
    assert list(videos) == ["00", "01"] and {each.shape for each in videos.values()} == {(3, 8, 8, 3)}
    again = task.sample(params, jax.random.key(0))
    for name, frames in videos.items():
        assert frames.min() >= 0 and frames.max() <= 1
        np.testing.assert_array_equal(frames, again[name])
    # View 0 of the picture's turntable is the picture: it is tied to it (config.video.tie_first_view).
    red, blue = videos["00"][0, 5, 4, 0], videos["00"][0, 5, 4, 1]
    assert red > 0.9 and blue < 0.3
    path = task.save(tmp_path, params, {"step": 3})
    assert checkpoint.load_weights(path, params)[1] == {
        "step": 3,
        "words": list(config.text.kwargs.words),
    }
    assert {str(each.dtype) for each in load_file(path).values()} == {"bfloat16"}
