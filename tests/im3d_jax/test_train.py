"""The training loop on shrunk configs: resumption, meshes, stops, what may change, mistakes."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from im3d_jax import backbones, checkpoint, config_flags, train
from im3d_jax.data import objects, pipeline, procedural
from im3d_jax.tasks import turntable
from im3d_jax.training import hosts
from im3d_jax.training.watch import NotFinite
from recon_torch.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ["tiny_text_to_image.py", "tiny_turntable.py"]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory):
    """Compiling takes the time here: little optimisation, and each program once."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def leaves_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(*map(as_numbers, pair)) for pair in pairs)


def as_numbers(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_take_a_step(name, tmp_path, shrunk):
    """At initialisation the last layer is zero: only what the gate lets through of view 0 is predicted."""
    config = shrunk(name, num_steps=1)
    stream = train.stream_of(config.train.streams, 0)
    drawn = config.train.streams[stream]
    drawn.keep_image = float(drawn.num_views > 1)
    state, is_done = train.train(config, tmp_path)
    (line,) = read_log(tmp_path)
    first = objects.SPLITS["train"][0] + drawn.data.first_object
    views = procedural.turntables(
        config.seed, range(first, first + 8), size=8, num_views=drawn.num_views
    ).views
    pixels = np.concatenate([views.rgb, views.alpha], -1).astype(np.float64) * 2 - 1
    assert config.backbone.kwargs.prediction_type == "x0" and config.train.loss_weight == "uniform"
    copied = drawn.keep_image / (1 + np.exp(3.0)) * pixels[:, :1]
    assert line[f"{stream}_loss"] == pytest.approx(np.mean((copied - pixels) ** 2), rel=1e-4)
    assert line["step"] == state.step == 1 and is_done
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
    config.train.update(num_steps=2, warmup_steps=1, log_every=1)
    config.train.streams.turntable.update(batch_size=8, num_views=2)
    monkeypatch.setattr(turntable.conditioning, "build_text", lambda *_: RandomText())
    state, _ = train.train(config, tmp_path)
    assert state.step == 2 and all("temporal" in path for path in state.trained)
    # A network that predicts v starts at zero, and v has the variance of latents and noise.
    first = read_log(tmp_path)[0]
    assert 0.1 < first["turntable_loss"] < 10 and first["turntable_grad_norm"] > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shrunk, random_weights):
    """(state, directory) of 4 steps without interruption on 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    return train.train(shrunk(init_from=random_weights), workdir)[0], workdir


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, whole, shrunk, random_weights):
    uninterrupted, workdir = whole
    train.train(shrunk(init_from=random_weights, num_steps=2, log_every=2), tmp_path)
    resumed, _ = train.train(shrunk(init_from=random_weights), tmp_path)
    assert uninterrupted.step == resumed.step == 4
    assert leaves_equal(uninterrupted, resumed)
    weights = [(path / "weights.safetensors").read_bytes() for path in (workdir, tmp_path)]
    assert weights[0] == weights[1]
    whole_log, parts_log = read_log(workdir), read_log(tmp_path)
    assert [line["step"] for line in whole_log] == [1, 2, 3, 4]
    assert [line["step"] for line in parts_log] == [2, 3, 4]
    assert ["image_loss" in line for line in whole_log] == [False, True] * 2
    assert whole_log[-1]["image_loss"] == parts_log[-1]["image_loss"]


def test_a_signal_saves_and_the_next_start_goes_on(tmp_path, whole, shrunk, random_weights, monkeypatch):
    """The signal comes while step 2 is done; the run ends with it, and is then the uninterrupted one."""
    take = pipeline.Stream.__next__
    read = []

    def signalled(stream):
        read.append(1)
        if len(read) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(stream)

    monkeypatch.setattr(pipeline.Stream, "__next__", signalled)
    config = shrunk(init_from=random_weights)
    state, is_done = train.train(config, tmp_path)
    assert 1 <= state.step < 4 and not is_done
    assert not (tmp_path / "weights.safetensors").exists()
    monkeypatch.undo()
    resumed, is_done = train.train(config, tmp_path)
    assert is_done and leaves_equal(whole[0], resumed)
    again, _ = train.train(config, tmp_path)
    assert leaves_equal(whole[0], again)


def test_a_stopped_command_asks_to_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: (None, False))
    with pytest.raises(SystemExit) as stopped:
        run("tiny_turntable.py", tmp_path)
    assert stopped.value.code == hosts.EXIT_REQUEUE == 75


def test_a_run_goes_on_on_another_mesh(tmp_path, whole, shrunk, random_weights):
    """4 x 2 -> 8 x 1 -> 2 x 2 x 2: parameters, moments and averages move to where they then live."""
    settings = dict(init_from=random_weights, log_every=1)
    for num_steps, mesh in ((2, "data=4,fsdp=2"), (3, "data=8"), (4, "data=2,fsdp=2,tensor=2")):
        config = shrunk(**settings, num_steps=num_steps, mesh=mesh)
        state, _ = train.train(config, tmp_path)
    kernels = [leaf for path, leaf in state.trained.items() if path.endswith("conv1/kernel")]
    assert kernels and all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in kernels)
    losses = [[line.get("turntable_loss", line.get("image_loss")) for line in read_log(directory)]
              for directory in (whole[1], tmp_path)]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for path, value in whole[0].ema.items():
        np.testing.assert_allclose(state.ema[path], value, atol=2e-4)


def test_another_config_is_refused_with_all_that_differs(whole, shrunk, random_weights):
    other = shrunk(init_from=random_weights, num_steps=5, learning_rate=2e-3, clip_norm=0.5)
    expected = r"config\.train\.clip_norm 1\.0, now 0\.5; config\.train\.learning_rate 0\.001, now 0\.002"
    with pytest.raises(UserError, match=expected + ".*--workdir"):
        train.train(other, whole[1])


def test_weights_are_known_wherever_they_lie(tmp_path, shrunk, random_weights):
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    content = Path(random_weights).read_bytes()
    moved.write_bytes(content)
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    first, same, different = (
        train.run_settings(shrunk(init_from=str(path))) for path in (random_weights, moved, other)
    )
    assert first == same != different


def test_frozen_parameters_stay(tmp_path, shrunk, random_params, random_weights):
    config = shrunk(trainable="temporal", init_from=random_weights, num_steps=1)
    state, _ = train.train(config, tmp_path)
    assert state.trained.keys() == {path for path in random_params if "temporal" in path}
    assert 0 < len(state.trained) < len(random_params)
    assert all((np.asarray(value) != random_params[path]).any() for path, value in state.trained.items())
    shapes = traverse_util.unflatten_dict(random_params, sep="/")
    written, _ = checkpoint.load_weights(tmp_path / "weights.safetensors", shapes)
    for path, value in traverse_util.flatten_dict(written, sep="/").items():
        assert np.array_equal(value, random_params[path]) == ("temporal" not in path), path


@pytest.fixture
def broken_object(monkeypatch):
    """The 4th object of each stream has a NaN."""
    batch = pipeline.ProceduralSource.batch

    def broken(source, indices):
        examples = batch(source, indices)
        for index, example in zip(indices, examples, strict=True):
            if index == 3:
                example["rgb"] = np.full_like(example["rgb"], np.nan)
        return examples

    monkeypatch.setattr(pipeline.ProceduralSource, "batch", broken)


def test_training_stops_at_nan_and_saves_nothing(tmp_path, shrunk, random_weights, broken_object):
    config = shrunk(init_from=random_weights, num_steps=1, log_every=100)
    number = objects.SPLITS["train"][0] + config.train.streams.turntable.data.first_object + 3
    with pytest.raises(NotFinite, match=rf"step 1 of turntable.*procedural/{number}"):
        train.train(config, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []


def test_a_step_that_is_not_finite_is_skipped_where_allowed(
    tmp_path, shrunk, random_weights, random_params, broken_object
):
    config = shrunk(init_from=random_weights, num_steps=1, max_skipped=1)
    state, _ = train.train(config, tmp_path)
    assert state.skipped == 1 and state.step == 1
    assert all(np.array_equal(state.trained[path], value) for path, value in random_params.items())
    assert read_log(tmp_path)[0]["skipped"]


def test_streams_take_their_turns():
    streams = ConfigDict({"image": {"every": 6}, "turntable": {"every": 1}})
    names = [train.stream_of(streams, step) for step in range(18)]
    assert names == (["turntable"] * 5 + ["image"]) * 3


def run(config_name, workdir, *flags):
    train.main([f"--config={ROOT}/configs/{config_name}", "--workdir", str(workdir), *flags])


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    some = "tiny_text_to_image.py"
    cases = [
        ((some, tmp_path, "--config.train.streams.image.batch_size=12"), r"image\.batch_size is 12.* 8 dev"),
        ((some, tmp_path, "--config.train.accumulate=16"), r"batch_size is 64.* 8 devices x 16 accumulated"),
        ((some, tmp_path, "--config.train.streams.image.every=2"), "some steps have no stream"),
        ((some, tmp_path, "--config.train.mesh=data=3"), "asks for 3 x 1 x 1 devices, there are 8"),
        ((some, tmp_path, "--config.train.mesh=data=-1,fsdp=3"), "does not divide 8 devices"),
        ((some, tmp_path, "--config.train.task=nothing"), "no 'nothing'; there is turntable"),
        ((some, tmp_path / "file" / "run"), "cannot be made"),
        ((some, tmp_path, "--config.size=128"), r"config\.size 128 makes latents"),
        ((some, tmp_path, "--config.train.init_from=none.safetensors"), "no weights at none.safetensors"),
        ((some, tmp_path, "--config.train.trainable=nothing"), "'nothing' matches none"),
        ((some, tmp_path, "--config.train.learning_rat=1"), "train.learning_rate"),
        (("tiny.py", tmp_path), "has no `train` section"),
    ]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words) as error:
            run(*arguments)
        assert "\n" not in str(error.value)


def test_what_a_run_depends_on(shrunk):
    settings = train.run_settings(shrunk())
    assert settings["backbone.kwargs.model_channels"] == 8 and settings["train.streams.image.every"] == 2
    same = shrunk(num_steps=9, decay_steps=2, log_every=7, mesh="fsdp=8", checkpoint=dict(every=3))
    same.video.num_steps = 10
    assert train.run_settings(same) == settings
