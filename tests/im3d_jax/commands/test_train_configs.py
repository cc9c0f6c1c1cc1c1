"""What configs ask of `im3d train`: shipped ones take a step, what is frozen stays, mistakes are one line."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from im3d_jax import backbones, checkpoint, config_flags, config_sections
from im3d_jax.commands import train
from im3d_jax.conditions import text
from im3d_jax.data import objects, procedural
from im3d_jax.training_settings import StreamSettings, TrainSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quick_draws")
def test_a_shipped_config_takes_a_step(tmp_path, shrunk):
    """At initialisation the last layer is zero: only what the gate lets through of view 0 is predicted."""
    config = shrunk(num_steps=1)
    streams = config_sections.settings(config, "train", TrainSettings).streams
    stream = train.stream_of(streams, 0)
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

    def warnings(self, prompt):
        return []

    def understands(self, prompt):
        return True


@pytest.mark.usefixtures("quick_draws")
def test_the_papers_config_trains_its_temporal_layers(tmp_path, monkeypatch):
    """In bfloat16, over float32 of what trains, and computing again what the backward pass needs."""
    config = config_flags.load(ROOT / "configs/paper_512.py")
    config.size = 4
    config.backbone.kwargs.update(latent_shape=(2, 2, 4), model_channels=8, channel_mult=(1,))
    assert config.backbone.kwargs.dtype == "bfloat16" and config.backbone.kwargs.remat
    config.backbone.kwargs.update(
        num_res_blocks=(0,), attention_levels=(0,), head_dim=8, text_dims=(6, 10), num_transformer_layers=1
    )
    sizes = dict(block_out_channels=(32, 32), layers_per_block=1, latent_channels=4)
    config.autoencoder.unlock()
    config.autoencoder.kwargs = dict(path="random", **sizes)
    config.train.update(num_steps=2, warmup_steps=1, log_every=1)
    config.train.streams.turntable.update(batch_size=8, num_views=2)
    monkeypatch.setattr(text, "build_text", lambda *_: RandomText())
    state, _ = train.train(config, tmp_path)
    assert state.step == 2 and all("temporal" in path for path in state.trained)
    held = jax.tree.leaves((state.trained, state.ema, state.opt_state))
    assert {leaf.dtype for leaf in held if leaf.ndim} == {jnp.dtype("float32")}
    # A network that predicts v starts at zero, and v has the variance of latents and noise.
    first = read_log(tmp_path)[0]
    assert 0.1 < first["turntable_loss"] < 10 and first["turntable_grad_norm"] > 0


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


def test_streams_take_their_turns():
    sizes = dict(batch_size=8, num_views=1)
    streams = {"image": StreamSettings(every=6, **sizes), "turntable": StreamSettings(every=1, **sizes)}
    names = [train.stream_of(streams, step) for step in range(18)]
    assert names == (["turntable"] * 5 + ["image"]) * 3


def run(config_name, workdir, *flags):
    train.main([f"--config={ROOT}/configs/{config_name}", "--workdir", str(workdir), *flags])


def test_mistakes_are_one_line(tmp_path, user_error):
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
        (
            (some, tmp_path, "--config.train.trainable=["),
            r"trainable is '\[', which is no regular expression",
        ),
        ((some, tmp_path, "--config.train.learning_rat=1"), "train.learning_rate"),
        (("tiny.py", tmp_path), "has no `train` section"),
    ]
    for arguments, words in cases:
        with user_error(words):
            run(*arguments)
