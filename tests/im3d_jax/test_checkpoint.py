"""Weights as safetensors, states by Orbax: whole or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from im3d_jax import checkpoint
from recon_torch.errors import UserError


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 4)).astype(np.float32), np.zeros(4, np.float32)
    return {"block": {"kernel": kernel, "bias": bias}, "mix": np.float32(0.25)}


@pytest.fixture
def path(tmp_path, params):
    checkpoint.save_weights(tmp_path / "w.safetensors", params, {"step": 7, "words": ["a", "b"]})
    return tmp_path / "w.safetensors"


def test_weights_come_back_as_float16_rounded(path, params):
    loaded, metadata = checkpoint.load_weights(path, jax.eval_shape(lambda: params))
    assert metadata == {"step": 7, "words": ["a", "b"]}
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, original in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert ours.dtype == jnp.float32
        assert np.array_equal(ours, original.astype(np.float16).astype(np.float32))
    assert load_file(path)["block/kernel"].dtype == np.float16


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
        ("truncated", "damaged"),
        ("no safetensors", "damaged"),
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
        "values": jax.random.normal(key, (8, 2)),
        "moments": [jnp.ones(3, jnp.bfloat16)],
    }


def test_states_come_back_bit_for_bit_and_placed(tmp_path, state):
    manager = checkpoint.open_manager(tmp_path)
    settings = {"seed": 0, "sizes": (1, 2)}
    assert checkpoint.restore(manager, state, settings) is None
    for step in (1, 2, 3):
        checkpoint.save(manager, step, state | {"step": jnp.int32(step)}, settings)
    manager.close()
    assert sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()) == [2, 3]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = state | {"values": jax.device_put(state["values"], sharding)}
    manager = checkpoint.open_manager(tmp_path)
    restored = checkpoint.restore(manager, like, settings)
    manager.close()
    assert restored["step"] == 3 and restored["values"].sharding == sharding
    for ours, original in zip(jax.tree.leaves(restored), jax.tree.leaves(state | {"step": 3}), strict=True):
        assert np.array_equal(ours, original)


@pytest.mark.parametrize("now", [{"rate": 2.0}, {}, {"rate": 1.0, "more": 1}])
def test_other_settings_are_refused(tmp_path, state, now):
    manager = checkpoint.open_manager(tmp_path / "run")
    checkpoint.save(manager, 1, state, {"rate": 1.0})
    manager.wait_until_finished()
    with pytest.raises(UserError, match=r"config\.(rate|more).*use another --workdir") as error:
        checkpoint.restore(manager, state, now)
    assert str(tmp_path / "run") in str(error.value)
    manager.close()
