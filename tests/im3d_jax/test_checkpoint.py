"""Weights as safetensors, states by Orbax: whole or refused."""

import gc
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from im3d_jax import checkpoint
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 4)).astype(np.float32), np.zeros(4, np.float32)
    return {"block": {"kernel": kernel, "bias": bias}, "mix": np.float32(0.25)}


@pytest.fixture
def path(tmp_path, params):
    checkpoint.save_weights(tmp_path / "w.safetensors", params, {"step": 7, "words": ["a", "b"]})
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_back_rounded_to_their_type(path, params, dtype):
    metadata = {"step": 7, "words": ["a", "b"]}
    checkpoint.save_weights(path, params, metadata, dtype)
    loaded, found = checkpoint.load_weights(path, jax.eval_shape(lambda: params))
    assert found == metadata
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, original in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert ours.dtype == jnp.float32
        rounded = torch.tensor(original).to(getattr(torch, dtype)).float()
        assert np.array_equal(ours, rounded.numpy())
    assert load_file(path)["block/kernel"].dtype == dtype


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e5, "float16", "block/bias holds 100000, which float16 does not hold; choose bfloat16"),
        (-3.4e38, "bfloat16", "block/bias holds -3.4e[+]38, which bfloat16"),
        (np.nan, "float32", "block/bias holds nan"),
        (np.inf, "bfloat16", "block/bias holds inf"),
    ],
)
def test_no_value_becomes_infinite_by_rounding(path, params, value, dtype, words):
    before = path.read_bytes()
    params["block"]["bias"][2] = value
    with pytest.raises(UserError, match=words):
        checkpoint.save_weights(path, params, {}, dtype)
    assert path.read_bytes() == before


def test_a_public_checkpoint_is_told_from_weights(path, params):
    save_file({"conv_in.weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(UserError, match="public checkpoint, with tensors like conv_in.weight; convert"):
        checkpoint.load_weights(path, params)


def test_writing_leaves_one_readable_file_or_the_old_one(path, params, monkeypatch):
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o444 == 0o444  # for all to read, as far as the umask allows
    before = path.read_bytes()

    def fail(arrays, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_weights(path, params, {})
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def damage(path, how):
    arrays = load_file(path)
    if how == "lacks":
        del arrays["block/bias"]
    elif how == "has more":
        arrays["block/extra"] = np.zeros(2, np.float16)
    elif how == "float64":
        arrays["block/kernel"] = np.full((3, 4), 1e39)
    elif how == "complex":
        arrays["block/kernel"] = arrays["block/kernel"].astype(np.complex64)
    elif how == "integers":
        arrays["block/kernel"] = arrays["block/kernel"].astype(np.int8)
    elif how == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        return
    elif how == "other shape":
        arrays["block/kernel"] = arrays["block/kernel"].T.copy()
    elif how == "nan":
        arrays["block/kernel"][1, 1] = np.nan
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
        return
    elif how == "no safetensors":
        path.write_bytes(b"PK\x03\x04 a pickle, perhaps")
        return
    elif how == "missing":
        path.unlink()
        return
    save_file(arrays, path)


@pytest.mark.parametrize(
    "how, words",
    [
        ("lacks", "lack block/bias"),
        ("has more", "unknown block/extra"),
        ("other shape", r"block/kernel is \(4, 3\), the config makes it \(3, 4\)"),
        ("nan", "block/kernel holds NaN"),
        ("truncated", "cut off"),
        ("no safetensors", "is no safetensors file"),
        ("float64", "block/kernel holds 1e[+]39, which is too large"),
        ("complex", "block/kernel is complex64"),
        ("integers", "block/kernel is int8"),
        ("pointer", "git-lfs pointer"),
        ("missing", "no weights at"),
    ],
)
def test_unfit_weights_are_refused_in_one_line(path, params, how, words):
    damage(path, how)
    with pytest.raises(UserError, match=words) as error:
        checkpoint.load_weights(path, params)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def state():
    key = jax.random.key(3)
    return {
        "step": jnp.int32(5),
        "key": jax.random.key(3),
        "values": jax.random.normal(key, (8, 2)),
        "moments": [jnp.ones(3, jnp.bfloat16)],
    }


def test_states_come_back_bit_for_bit_and_placed(tmp_path, state):
    settings, meta = {"seed": 0, "sizes": (1, 2)}, {"batches": {"turntable": 7}, "skipped": ["one"]}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, settings) is None
        for step in (1, 2, 3):
            saved = state | {"step": jnp.int32(step)}
            checkpoints.save(step, saved, meta | {"settings": settings})
    assert sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()) == [2, 3]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = state | {"values": jax.device_put(state["values"], sharding)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, found = checkpoints.restore(like, settings)
    assert restored["step"] == 3 and restored["values"].sharding == sharding
    assert {name: found[name] for name in meta} == meta
    for ours, original in zip(jax.tree.leaves(restored), jax.tree.leaves(state | {"step": 3}), strict=True):
        assert np.array_equal(*(jax.random.key_data(x) if is_key(x) else x for x in (ours, original)))


def is_key(leaf):
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)


def test_some_stay_for_good(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, {"step": jnp.int32(step)}, {"settings": {}})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 8, 9]


@pytest.mark.parametrize("now", [{"rate": 2.0}, {}, {"rate": 1.0, "more": 1}])
def test_other_settings_are_refused(tmp_path, state, now):
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, {"settings": {"rate": 1.0}})
    refused = pytest.raises(UserError, match=r"config\.(rate|more).*use another --workdir")
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints, refused as error:
        checkpoints.restore(state, now)
    assert str(tmp_path / "run") in str(error.value)


def save_two(directory, state):
    with checkpoint.Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state | {"step": jnp.int32(step)}, {"settings": {}})


def test_one_that_was_cut_off_is_never_taken(tmp_path, state, capsys):
    """A process killed in mid-write leaves a directory under a name that is no step's."""
    save_two(tmp_path, state)
    whole, cut = tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(whole, cut)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, {})[0]["step"] == 2
    assert "warning" not in capsys.readouterr().err


def cut_files(directory):
    """Cuts every file of the state's arrays in half."""
    files = [path for path in (directory / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert files


def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, state, capsys):
    save_two(tmp_path, state)
    cut_files(tmp_path / "checkpoints" / "2")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, {})[0]["step"] == 1
    assert "checkpoint 2 cannot be read" in capsys.readouterr().err
    cut_files(tmp_path / "checkpoints" / "1")
    refused = pytest.raises(UserError, match="no checkpoint of .* can be read")
    with checkpoint.Checkpoints(tmp_path) as checkpoints, refused:
        checkpoints.restore(state, {})


def damage_state(directory, how):
    """Makes a checkpoint of which something cannot be read."""
    if how == "empty":
        shutil.rmtree(directory)
        directory.mkdir()
    elif how == "no meta":
        shutil.rmtree(directory / "meta")
    elif how == "no state":
        shutil.rmtree(directory / "state")
    else:
        cut_files(directory)


@pytest.mark.parametrize("how", ["empty", "no meta", "no state", "cut"])
def test_a_damaged_one_is_replaced_when_its_step_is_made_again(tmp_path, state, how, capsys):
    save_two(tmp_path, state)
    directory = tmp_path / "checkpoints"
    damage_state(directory / "2", how)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, {})[0]["step"] == 1
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2.unreadable"]  # nothing is lost yet
    for start in range(2):  # also if the run stops before it has come so far
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(state, {})[0]["step"] == 1
            if start:
                checkpoints.save(2, state | {"step": jnp.int32(2)}, {"settings": {}})
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state, {})[0]["step"] == 2
    assert capsys.readouterr().err.count("cannot be read") == 1


KILLED = """
import os, sys
import jax.numpy as jnp
from pathlib import Path
from im3d_jax import checkpoint

checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]))
for step in (1, 2):
    state = {"step": jnp.int32(step), "values": jnp.full((2000, 2000), step)}
    checkpoints.save(step, state, {"settings": {}})
    if step == 1:
        checkpoints._manager.wait_until_finished()
os.kill(os.getpid(), 9)
"""


def test_a_process_killed_while_it_saves_loses_nothing_that_was_saved(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    like = {"step": jnp.int32(0), "values": jnp.zeros((2000, 2000), jnp.int32)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(like, {})
    assert restored["step"] in (1, 2)
    assert (np.asarray(restored["values"]) == int(restored["step"])).all()


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_one_before(
    tmp_path, capfd, caplog, user_error
):
    """Files may not grow beyond 100 kB, as on a disk that is full for those of a large state."""
    small, large = ({"numbers": jnp.asarray(np.random.default_rng(0).random(n))} for n in (8, 2**18))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            user_error(r"cannot write to .*checkpoints \(File too large\)"),
            checkpoint.Checkpoints(tmp_path) as checkpoints,
        ):
            checkpoints.save(1, small, {"settings": {}})
            checkpoints.save(2, large, {"settings": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()  # asyncio logs what nobody has asked for when it is collected
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(small, {})
    assert np.array_equal(state["numbers"], small["numbers"])
