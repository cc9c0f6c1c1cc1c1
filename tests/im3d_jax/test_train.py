"""Training of the shipped configs, shrunk: loss, frozen layers, resumption, sharding, schedules, refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from im3d_jax import backbones, checkpoint, config_flags, sharding, train
from im3d_jax.autoencoder import Patches
from im3d_jax.data import objects, procedural
from im3d_jax.diffusion import make_schedule
from recon_torch.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in ROOT.glob("configs/tiny*.py") if "train" in config_flags.load(path))
RANDOM_WEIGHTS = "random.safetensors"


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling takes the time here: little optimisation, and one optimiser for all that train alike."""
    made = {}

    def make_once(settings, make=train.make_optimizer):
        return made.setdefault((settings.trainable, settings.learning_rate), make(settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", make_once)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def shrunk(name="tiny_turntable.py", **settings):
    """A shipped config with 8 px views, a tiny network without attention, and no warm-up or decay."""
    config = config_flags.load(ROOT / "configs" / name)
    config.size = 8
    config.backbone.kwargs.update(
        latent_shape=(2, 2, 64),
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=(1,),
        attention_levels=(),
    )
    config.backbone.kwargs.update(head_dim=8, temporal_span=("pixel",), text_dims=(8,), ff_mult=1)
    shared = dict(init_from="", num_steps=4, warmup_steps=0, decay_steps=0, learning_rate=1e-3, log_every=1)
    config.train.update(shared | dict(checkpoint_every=4) | settings)
    for stream_name, stream in config.train.streams.items():
        image = stream_name == "image" and len(config.train.streams) > 1
        stream.update(batch_size=8, num_views=min(stream.num_views, 3), every=2 if image else 1)
    return config


@pytest.fixture(scope="module")
def random_params():
    """Parameters that are random also where initialisation has zeros, so that every gradient flows."""
    model = backbones.build("emu_video", shrunk().backbone.kwargs.to_dict())
    rng = np.random.default_rng(0)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    flat = {
        path: (path.endswith("scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float16)
        for path, leaf in shapes.items()
    }
    return {path: np.float32(value) for path, value in flat.items()}


@pytest.fixture(scope="module")
def random_weights(random_params, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / RANDOM_WEIGHTS
    checkpoint.save_weights(path, traverse_util.unflatten_dict(random_params, sep="/"), {})
    return str(path)


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_take_a_step(name, tmp_path):
    """At initialisation the last layer is zero: only what the gate lets through of view 0 is predicted."""
    config = shrunk(name, num_steps=1)
    stream = train.stream_of(config.train.streams, 0)
    drawn = config.train.streams[stream]
    drawn.keep_image = float(drawn.num_views > 1)
    state = train.train(config, tmp_path)
    (line,) = read_log(tmp_path)
    views = procedural.turntables(
        config.seed,
        range(20_000 + drawn.first_object, 20_000 + drawn.first_object + 8),
        size=8,
        num_views=drawn.num_views,
    ).views
    pixels = np.concatenate([views.rgb, views.alpha], -1).astype(np.float64) * 2 - 1
    assert config.backbone.kwargs.prediction_type == "x0" and config.train.loss_weight == "uniform"
    copied = drawn.keep_image / (1 + np.exp(3.0)) * pixels[:, :1]
    assert line[f"{stream}_loss"] == pytest.approx(np.mean((copied - pixels) ** 2), rel=1e-4)
    assert line["step"] == state.step == 1
    model = backbones.build("emu_video", config.backbone.kwargs.to_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    _, metadata = checkpoint.load_weights(tmp_path / "weights.safetensors", shapes)
    assert metadata["words"] == objects.vocabulary() and metadata["step"] == 1


class RandomText:
    """Stands in for frozen text encoders."""

    words = ()

    def encode(self, prompts):
        rng = np.random.default_rng(len(prompts))
        text = tuple(rng.normal(size=(len(prompts), 3, dim)).astype(np.float32) for dim in (6, 10))
        return text, tuple(np.ones(each.shape[:2], np.float32) for each in text)


def test_the_papers_config_trains_its_temporal_layers(tmp_path, monkeypatch):
    config = config_flags.load(ROOT / "configs/paper_512.py")
    config.size = 16
    config.backbone.kwargs.update(
        latent_shape=(2, 2, 4), model_channels=8, channel_mult=(1,), dtype="float32"
    )
    config.backbone.kwargs.update(num_res_blocks=(1,), attention_levels=(0,), head_dim=8, text_dims=(6, 10))
    sizes = dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4)
    config.autoencoder.unlock()
    config.autoencoder.kwargs = dict(path="random", **sizes)
    config.train.update(num_steps=2, warmup_steps=1, log_every=1, checkpoint_every=2)
    config.train.streams.turntable.update(batch_size=8, num_views=2)
    monkeypatch.setattr(train.conditioning, "build_text", lambda *_: RandomText())
    state = train.train(config, tmp_path)
    assert state.step == 2 and all("temporal" in path for path in state.trained)
    # A network that predicts v starts at zero, and v has the variance of latents and noise.
    first = read_log(tmp_path)[0]
    assert 0.1 < first["turntable_loss"] < 10 and first["turntable_grad_norm"] > 0


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, random_weights):
    config = shrunk(init_from=random_weights)
    whole = train.train(config, tmp_path / "whole")
    train.train(shrunk(init_from=random_weights, num_steps=2, log_every=2), tmp_path / "parts")
    resumed = train.train(config, tmp_path / "parts")
    assert whole.step == resumed.step == 4
    assert leaves_equal(whole, resumed)
    weights = [(tmp_path / run / "weights.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
    whole_log, parts_log = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
    assert [line["step"] for line in whole_log] == [1, 2, 3, 4] and [line["step"] for line in parts_log] == [
        2,
        3,
        4,
    ]
    assert ["image_loss" in line for line in whole_log] == [False, True] * 2
    assert whole_log[-1]["image_loss"] == parts_log[-1]["image_loss"]

    other = shrunk(init_from=random_weights, num_steps=5, learning_rate=2e-3)
    with pytest.raises(
        UserError, match=r"parts holds a run with config\.train\.learning_rate 0\.001.*--workdir"
    ):
        train.train(other, tmp_path / "parts")


def test_frozen_parameters_have_no_gradient_nor_moments_and_stay(tmp_path, random_params, random_weights):
    config = shrunk(trainable="temporal", init_from=random_weights, num_steps=1)
    state = train.train(config, tmp_path)
    assert state.trained.keys() == {path for path in random_params if "temporal" in path}
    assert 0 < len(state.trained) < len(random_params)
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} - {()}
    assert moments == {value.shape for value in state.trained.values()}
    assert all((np.asarray(value) != random_params[path]).any() for path, value in state.trained.items())
    shapes = traverse_util.unflatten_dict(random_params, sep="/")
    written, _ = checkpoint.load_weights(tmp_path / "weights.safetensors", shapes)
    for path, value in traverse_util.flatten_dict(written, sep="/").items():
        assert np.array_equal(value, random_params[path]) == ("temporal" not in path), path


def one_step(config, params, devices, step=0):
    """(state before, state after, metrics) of one step on turntables, from parameters without history."""
    mesh = sharding.make_mesh(devices)
    optimizer = train.make_optimizer(config.train)
    ema = {path: value + 1 for path, value in params.items()}
    state = train.TrainState(jnp.int32(step), params, ema, optimizer.init(params))
    before = jax.tree.map(np.array, state)
    model = backbones.build("emu_video", config.backbone.kwargs.to_dict())
    text = train.conditioning.build_text(config.text.name, config.text.kwargs)
    batch = train.load_batch(config, text, "turntable", 0)
    state, metrics = train.train_step(
        jax.device_put(state, sharding.replicated(mesh)),
        jax.device_put({}, sharding.replicated(mesh)),
        Patches(4),
        jax.device_put(batch, sharding.along_batch(mesh)),
        model.empty_conditioning(1),
        jax.random.key(1),
        make_schedule(**config.schedule),
        config.train.ema_decay,
        model=model,
        optimizer=optimizer,
        loss_weight=config.train.loss_weight,
        keep_image=config.train.streams.turntable.keep_image,
        keep_text=config.train.streams.turntable.keep_text,
        timestep_shift=config.train.streams.turntable.timestep_shift,
    )
    return before, state, metrics


def test_eight_devices_train_as_one_does(random_params):
    (_, sharded, metrics), (_, single, expected) = (
        one_step(shrunk(), random_params, devices) for devices in (jax.devices(), jax.devices()[:1])
    )
    assert len(sharded.step.sharding.device_set) == 8 and len(single.step.sharding.device_set) == 1
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    first_moments = [
        jax.tree.leaves(optimizer_state[1][0].mu) for optimizer_state in (sharded.opt_state, single.opt_state)
    ]
    for ours, theirs in zip(*first_moments, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("step, decay", [(0, 1 / 10), (90, 91 / 100), (5000, 0.995)])
def test_the_average_of_parameters(step, decay, random_params):
    before, after, _ = one_step(shrunk(), random_params, jax.devices(), step)
    assert after.step == step + 1
    for path, old in before.ema.items():
        expected = decay * old + (1 - decay) * np.asarray(after.trained[path])
        np.testing.assert_allclose(after.ema[path], expected, rtol=1e-5, atol=1e-6)


def test_training_stops_at_nan_and_saves_nothing(tmp_path, random_weights, monkeypatch):
    load_batch = train.load_batch

    def broken(*arguments):
        batch = load_batch(*arguments)
        return batch._replace(rgb=batch.rgb.at[3, 0, 0, 0, 0].set(jnp.nan))

    monkeypatch.setattr(train, "load_batch", broken)
    config = shrunk(init_from=random_weights, num_steps=1, log_every=100, checkpoint_every=100)
    with pytest.raises(FloatingPointError, match="by step 1"):
        train.train(config, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    manager = checkpoint.open_manager(tmp_path)
    assert manager.latest_step() is None
    manager.close()


def test_learning_rate_rises_stays_and_falls():
    """Adam moves a parameter with a constant gradient by the learning rate."""
    settings = ConfigDict(
        dict(warmup_steps=3, decay_steps=4, num_steps=12, learning_rate=0.1, weight_decay=0.0)
    )
    settings.update(clip_norm=1e9, trainable="rates")
    optimizer = train.make_optimizer(settings)
    value, gradient = jnp.zeros(1), jnp.ones(1)
    state, moved, update = optimizer.init(value), [], jax.jit(optimizer.update)
    for _ in range(12):
        change, state = update(gradient, state, value)
        moved.append(-float(change[0]))
    expected = np.concatenate([np.arange(3) / 3, np.ones(5), 1 - np.arange(4) / 4]) * 0.1
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)


def test_streams_take_their_turns():
    streams = ConfigDict({"image": {"every": 6}, "turntable": {"every": 1}})
    names = [train.stream_of(streams, step) for step in range(18)]
    assert names == (["turntable"] * 5 + ["image"]) * 3


def test_no_object_is_met_twice_and_none_of_another_split(monkeypatch):
    seen = []

    def record(seed, indices, *, size, num_views):
        seen.extend(indices)
        captions = [objects.make_object(seed, i).caption for i in indices]
        return procedural.Turntables(procedural.Views(None, None, None), None, captions)

    monkeypatch.setattr(procedural, "turntables", record)
    monkeypatch.setattr(jnp, "asarray", np.asarray)
    config = config_flags.load(ROOT / "configs/tiny_turntable.py")
    text = train.conditioning.build_text(config.text.name, config.text.kwargs)
    for step in (*range(8), 10_000, config.train.num_steps - 1):
        train.load_batch(config, text, train.stream_of(config.train.streams, step), step)
    assert len(seen) == len(set(seen)) > 40
    first, last = objects.SPLITS["train"]
    assert all(first <= index < last for index in seen)


def run(config_name, workdir, *flags):
    train.main([f"--config={ROOT}/configs/{config_name}", "--workdir", str(workdir), *flags])


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    some = "tiny_text_to_image.py"
    cases = [
        (
            (some, tmp_path, "--config.train.streams.image.batch_size=12"),
            r"image\.batch_size is 12.* 8 devices",
        ),
        ((some, tmp_path, "--config.train.streams.image.every=2"), "some steps have no stream"),
        ((some, tmp_path / "file" / "run"), "cannot be made"),
        ((some, tmp_path, "--config.size=128"), r"config\.size 128 makes latents"),
        ((some, tmp_path, "--config.train.init_from=none.safetensors"), "no weights at none.safetensors"),
        ((some, tmp_path, "--config.train.learning_rat=1"), "train.learning_rate"),
        (("tiny.py", tmp_path), "has no `train` section"),
    ]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words) as error:
            run(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="'nothing' matches none"):
        train.split_params({"a": {"kernel": 1}}, "nothing")


def test_checkpoints_go_on_only_with_what_they_were_trained_by():
    settings = train.run_settings(shrunk())
    assert settings["backbone.kwargs.model_channels"] == 8 and settings["train.streams.image.every"] == 2
    same = shrunk(num_steps=9, decay_steps=2, log_every=7, checkpoint_every=3)
    same.video.num_steps = 10
    assert train.run_settings(same) == settings
    for key in ("seed", "size"):
        other = shrunk()
        other[key] += 1
        assert train.run_settings(other) != settings
