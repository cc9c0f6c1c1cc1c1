"""The training loop on a toy: resumption, meshes, stops, whose files are whose, what may change."""

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import safe_open

from configs import base
from im3d_jax import checkpoint, config_flags, sharding
from im3d_jax.commands import dataset, train
from im3d_jax.data import input_pipeline, sources, turntables, views
from im3d_jax.training import hosts
from im3d_jax.training import run as run_module
from im3d_jax.training.watch import NotFinite
from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def run(workdir, *flags):
    train.main([f"--config={ROOT}/configs/tiny_turntable.py", "--workdir", str(workdir), *flags])


def depends_on(config):
    return run_module.depends_on(config_flags.as_json(config))


class Toy:
    """A task that compiles at once: predicts colours of objects from noisy numbers, by two layers."""

    partition_rules = ((r"spatial/kernel", ("embed", "mlp")), (r"temporal/kernel", ("mlp", "embed")))

    def __init__(self, config, mesh):
        self.constants = jax.device_put(np.float32(0.5), sharding.replicated(mesh))
        self.rate = config.train.learning_rate

    def init(self, key):
        keys = jax.random.split(key, 2)
        spatial, temporal = jax.random.normal(keys[0], (4, 8)), jax.random.normal(keys[1], (8, 4))
        return {"spatial": {"kernel": spatial}, "temporal": {"kernel": temporal}}

    def load(self, path):
        return checkpoint.load_weights(path, jax.eval_shape(self.init, jax.random.key(0)))[0]

    def stream(self, name):
        return name

    def collate(self, examples):
        of = [each["numbers"] if "numbers" in each else each["rgb"].ravel()[:4] for each in examples]
        return np.stack(of)

    def draw(self, key, num_examples, stream):
        return jax.random.normal(key, (num_examples, 4))

    def loss(self, params, constants, batch, draws, stream):
        x = batch + (0.1 if stream == "image" else 0.2) * draws
        predicted = jnp.tanh(x @ params["spatial"]["kernel"]) @ params["temporal"]["kernel"]
        losses = jnp.square(predicted - constants * batch).mean(-1)
        return losses.mean(), {"loss_by_level": losses.sum()[None], "count_by_level": jnp.full(1, len(x))}

    def flops(self, trains, num_examples, num_views):
        return 0.0

    def sample(self, params, key):
        return {"toy": np.full((2, 16, 16, 3), float(params["temporal"]["kernel"].mean()) % 1, np.float32)}

    def save(self, directory, params, metadata):
        checkpoint.save_weights(directory / "weights.safetensors", params, metadata)
        return directory / "weights.safetensors"


class Numbers:
    """A source of what `Toy` learns from."""

    def __init__(self, first, broken=()):
        self.first, self.broken = first, broken

    def __len__(self):
        return 2**20

    def __getitem__(self, index):
        numbers = np.random.default_rng(self.first + index).normal(size=4).astype(np.float32)
        return {"id": f"number/{index}", "numbers": numbers * (np.nan if index in self.broken else 1)}


@pytest.fixture
def toy(monkeypatch):
    """`shrunk` configs train `Toy` on `Numbers`."""

    def open_numbers(data, **_):
        return Numbers(data.first_object)

    monkeypatch.setattr(train.tasks, "build", Toy)
    monkeypatch.setattr(sources, "open_source", open_numbers)


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    task = Toy(ConfigDict({"train": {"learning_rate": 1}}), sharding.make_mesh())
    checkpoint.save_weights(path, task.init(jax.random.key(1)), {})
    return str(path)


@pytest.fixture
def start(shrunk, toy, toy_weights):
    """Trains `Toy` from its weights; returns what `train.train` does."""

    def run(workdir, **settings):
        return train.train(shrunk(init_from=toy_weights, **settings), workdir)

    return run


def leaves_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(*map(as_numbers, pair)) for pair in pairs)


def as_numbers(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(tmp_path, start):
    """(state, directory) of 4 steps without interruption on 8 devices."""
    return start(tmp_path / "whole")[0], tmp_path / "whole"


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, whole, start):
    uninterrupted, workdir = whole
    start(tmp_path / "parts", num_steps=2, log_every=2)
    resumed, _ = start(tmp_path / "parts")
    assert uninterrupted.step == resumed.step == 4
    assert leaves_equal(uninterrupted, resumed)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    whole_log, parts_log = read_log(workdir), read_log(tmp_path / "parts")
    assert [line["step"] for line in whole_log] == [1, 2, 3, 4]
    assert [line["step"] for line in parts_log] == [2, 3, 4]
    assert ["image_loss" in line for line in whole_log] == [False, True] * 2
    assert whole_log[-1]["image_loss"] == parts_log[-1]["image_loss"]


def test_a_lora_resumes_bit_for_bit_and_leaves_its_adapters_alone(tmp_path, start, toy_weights, shrunk, toy):
    def run(workdir, **settings):
        config = shrunk(init_from=toy_weights, **settings)
        config.train.lora.update(rank=2, alpha=6.0, targets="spatial")
        return train.train(config, workdir)

    uninterrupted, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", num_steps=2)
    resumed, _ = run(tmp_path / "parts")
    assert leaves_equal(uninterrupted, resumed) and uninterrupted.step == 4
    names = {"spatial/kernel.lora_A", "spatial/kernel.lora_B"}
    assert resumed.trained.keys() == names and resumed.trained["spatial/kernel.lora_B"].any()
    weights = [tmp_path / name / "weights.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with safe_open(weights[0], "np") as file:
        assert set(file.keys()) == names
        np.testing.assert_array_equal(
            file.get_tensor("spatial/kernel.lora_B"), resumed.ema["spatial/kernel.lora_B"]
        )
        told = json.loads(file.metadata()["im3d"])["lora"]
    assert (told["rank"], told["alpha"], told["targets"]) == (2, 6.0, "spatial")
    assert told["base_fingerprint"] == checkpoint.fingerprint(toy_weights)


def test_a_damaged_newest_checkpoint_is_made_again(tmp_path, whole, start, capsys):
    kept = dict(every=2, keep=2, keep_every=0, weights_every=0)
    start(tmp_path / "parts", checkpoint=kept)
    directory = tmp_path / "parts" / "checkpoints"
    for path in (directory / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    for warnings in (1, 0):
        resumed, is_done = start(tmp_path / "parts", checkpoint=kept)
        assert is_done and leaves_equal(whole[0], resumed)
        assert capsys.readouterr().err.count("checkpoint 4 cannot be read") == warnings
        assert sorted(path.name for path in directory.iterdir()) == ["2", "4"]


def test_a_checkpoint_is_of_its_step_though_the_loop_went_on(tmp_path, start, shrunk, toy_weights):
    """Saved at every step while later steps ran, each as a run that ended there."""
    kept = dict(every=1, keep=10, keep_every=0, weights_every=0)
    start(tmp_path / "all", checkpoint=kept)
    for num_steps in (1, 3):
        state, _ = start(tmp_path / f"{num_steps}", num_steps=num_steps)
        shutil.copytree(tmp_path / "all", tmp_path / f"cut{num_steps}")
        for step in range(num_steps + 1, 5):
            shutil.rmtree(tmp_path / f"cut{num_steps}" / "checkpoints" / str(step))
        with checkpoint.Checkpoints(tmp_path / f"cut{num_steps}") as checkpoints:
            settings = depends_on(shrunk(init_from=toy_weights))
            restored, meta = checkpoints.restore(state, settings)
        assert leaves_equal(state, restored)
        assert sum(meta["batches"].values()) == num_steps and meta["config"]["size"] == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(number, tmp_path, whole, start, monkeypatch):
    take, read = input_pipeline.Stream.__next__, []

    def signalled(stream):
        read.append(1)
        if len(read) == 2:
            os.kill(os.getpid(), number)
        return take(stream)

    monkeypatch.setattr(input_pipeline.Stream, "__next__", signalled)
    state, is_done = start(tmp_path / "run")
    assert 1 <= state.step < 4 and not is_done
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    for _ in range(2):  # to the end, and not beyond it
        resumed, is_done = start(tmp_path / "run")
        assert is_done and leaves_equal(whole[0], resumed)


def test_processes_that_make_objects_change_nothing(tmp_path, shrunk, toy_weights, monkeypatch):
    class Angles(Toy):
        def collate(self, examples):
            return np.float32([[each["elevation_rad"]] * 4 for each in examples])

    def start(workdir, num_workers):
        config = shrunk(init_from=toy_weights, num_workers=num_workers)
        return train.train(config, tmp_path / workdir)

    monkeypatch.setattr(train.tasks, "build", Angles)
    whole, _ = start("whole", 0)
    with monkeypatch.context() as patch:
        stop = hosts.StopSignal.at
        patch.setattr(hosts.StopSignal, "at", lambda self, step: step == 2 or stop(self, step))
        _, is_done = start("parts", 2)
    assert not is_done and not multiprocessing.active_children()
    resumed, is_done = start("parts", 1)
    assert is_done and not multiprocessing.active_children()
    assert leaves_equal(whole, resumed)


def test_a_stopped_command_asks_to_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: (None, False))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == hosts.EXIT_REQUEUE == 75


def test_a_workdir_is_of_one_run_at_a_time(tmp_path, monkeypatch, user_error):
    """A second run is refused by the process of the first, and goes on when that has ended."""
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)

    def second(*_):
        with ThreadPoolExecutor(1) as thread, user_error(f"in use by process {os.getpid()} on .* since"):
            thread.submit(run, tmp_path).result()
        return None, True

    monkeypatch.setattr(train, "train", second)
    run(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/7/mine.txt", "weights.safetensors"])
def test_files_of_a_users_in_a_workdir_are_refused(tmp_path, monkeypatch, user_error, name):
    monkeypatch.setattr(train, "train", lambda *_: (None, True))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with user_error(f"{name.split('/')[0]} is not of an earlier run"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_run_is_known_by_its_checkpoints_and_does_not_replace_its_start(whole, monkeypatch, user_error):
    """`whole` was trained without the command, as a run of an earlier version has no marker."""
    _, workdir = whole
    monkeypatch.setattr(train, "train", lambda *_: (None, True))
    run(workdir, "--config.train.init_from=")
    with user_error("weights.safetensors is what it is to read"):
        run(workdir, f"--config.train.init_from={workdir / 'weights.safetensors'}")


def test_a_run_goes_on_on_another_mesh(tmp_path, whole, start):
    """4 x 2 -> 8 x 1 -> 2 x 2 x 2: parameters, moments and averages move to where they then live."""
    for num_steps, mesh in (
        (1, "data=4,fsdp=2"),
        (2, "data=8"),
        (3, "data=2,fsdp=2,tensor=2"),
        (4, "fsdp=8"),
    ):
        state, _ = start(tmp_path / "run", num_steps=num_steps, mesh=mesh)
    assert {path: leaf.addressable_shards[0].data.shape for path, leaf in state.trained.items()} == {
        "spatial/kernel": (4, 8),  # 4 does not divide by 8 devices
        "temporal/kernel": (8, 4),
    }
    losses = [
        [line.get("turntable_loss", line.get("image_loss")) for line in read_log(directory)]
        for directory in (whole[1], tmp_path / "run")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for path, value in whole[0].ema.items():
        np.testing.assert_allclose(state.ema[path], value, atol=2e-5)


def test_another_config_is_refused_with_all_that_differs(whole, start):
    expected = r"config\.train\.clip_norm 1\.0, now 0\.5; config\.train\.learning_rate 0\.001, now 0\.002"
    with pytest.raises(UserError, match=expected + ".*--workdir"):
        start(whole[1], num_steps=5, learning_rate=2e-3, clip_norm=0.5)


def test_weights_are_known_wherever_they_lie(tmp_path, shrunk, toy_weights):
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    content = Path(toy_weights).read_bytes()
    moved.write_bytes(content)
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    first, same, different = (depends_on(shrunk(init_from=str(path))) for path in (toy_weights, moved, other))
    assert first == same != different


def test_what_a_run_writes_beside_checkpoints(tmp_path, start, capsys):
    kept = dict(every=4, keep=2, keep_every=0, weights_every=2)
    start(tmp_path, checkpoint=kept, sample=dict(every=2), tensorboard=True)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "toy_0000002.mp4",
        "toy_0000004.mp4",
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))
    printed = capsys.readouterr().out
    assert printed.count("wrote ") == 2 and "spatial/kernel" in printed
    assert "mesh data=8, fsdp=1, tensor=1; a device holds: trained 0.0 MB" in printed


def test_training_from_disk_resumes_exactly_past_a_corrupt_record(tmp_path, shrunk, monkeypatch):
    monkeypatch.setattr(train.tasks, "build", Toy)
    monkeypatch.setattr(turntables, "OBJECTS_PER_SHARD", 1)
    noise = np.random.default_rng(0)
    for number in range(9):
        rgba = noise.uniform(size=(3, 8, 8, 4))
        views.write_object(tmp_path / f"views/{number}", rgba, orbit(3, 0.2, 8), "a red mug", 0.2)
    dataset.main(["build", f"--views={tmp_path / 'views'}", f"--out={tmp_path / 'data'}", "--split=train=1"])
    (tmp_path / "data/turntables-train.array_record-00004").write_bytes(b"damaged")

    def run_until(num_steps, workdir):
        config = shrunk(num_steps=num_steps)
        with config.unlocked():
            del config.train.streams["image"]
        config.train.streams.turntable.data.path = str(tmp_path / "data")
        config.train.loader.max_corrupt = 1
        return train.train(config, tmp_path / workdir)[0]

    whole = run_until(4, "whole")
    run_until(2, "parts")
    assert leaves_equal(whole, run_until(4, "parts"))
    assert read_log(tmp_path / "whole")[-1]["skipped_records"] == 1


class Mixed(Toy):
    """`Toy` on views, stored or rendered now. It notes the objects of each batch."""

    batches: list = []

    def collate(self, examples):
        Mixed.batches.append([each["id"].split("/")[0] for each in examples])
        rgb = np.asarray(input_pipeline.stack_views(examples)[0])
        return rgb[:, 0, 4, 3:5, :2].reshape(len(rgb), 4)


def test_training_on_a_mixture_resumes_exactly(tmp_path, shrunk, monkeypatch):
    monkeypatch.setattr(train.tasks, "build", Mixed)
    for number in range(3):
        rgba = np.random.default_rng(number).uniform(size=(3, 8, 8, 4))
        views.write_object(tmp_path / f"views/{number}", rgba, orbit(3, 0.2, 8), "a red mug", 0.2)
    dataset.main(["build", f"--views={tmp_path / 'views'}", f"--out={tmp_path / 'data'}", "--split=train=1"])
    mix = {"stored": {"weight": 0.25, "path": str(tmp_path / "data")}, "shapes": {"weight": 0.75}}

    def run_until(num_steps, workdir):
        config = shrunk(num_steps=num_steps)
        with config.unlocked():
            del config.train.streams["image"]
            config.train.streams.turntable = base.stream(batch_size=8, num_views=3, mix=mix)
        return train.train(config, tmp_path / workdir)[0]

    whole = run_until(3, "whole")
    assert [batch.count("train-00000") for batch in Mixed.batches[:3]] == [2, 2, 2]
    assert [batch.count("procedural") for batch in Mixed.batches[:3]] == [6, 6, 6]
    run_until(2, "parts")
    assert leaves_equal(whole, run_until(3, "parts"))


@pytest.fixture
def broken_object(toy, monkeypatch):
    """Object 3 of each stream has a NaN."""
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: Numbers(0, broken=(3,)))


def test_training_stops_at_nan_and_saves_nothing(tmp_path, start, broken_object):
    with pytest.raises(NotFinite, match=r"step 1 of turntable.*number/3"):
        start(tmp_path, num_steps=1, log_every=100)
    assert not (tmp_path / "weights.safetensors").exists()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []


def test_a_step_that_is_not_finite_is_skipped_where_allowed(tmp_path, start, broken_object, toy_weights):
    state, _ = start(tmp_path, num_steps=1, max_skipped=1)
    assert state.skipped == 1 and state.step == 1
    task = Toy(ConfigDict({"train": {"learning_rate": 1}}), sharding.make_mesh())
    before = traverse_util.flatten_dict(task.load(toy_weights), sep="/")
    assert all(np.array_equal(state.trained[path], value) for path, value in before.items())
    assert read_log(tmp_path)[0]["skipped"]


def test_what_a_run_depends_on(shrunk):
    settings = depends_on(shrunk())
    assert settings["backbone.kwargs.model_channels"] == 8 and settings["train.streams.image.every"] == 2
    same = shrunk(num_steps=9, decay_steps=2, log_every=7, mesh="fsdp=8", checkpoint=dict(every=3))
    same.video.num_steps = 10
    assert depends_on(same) == settings
