"""One step of training: on several devices, in parts, against optax and float64, and what it costs."""

import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from im3d_jax import sharding
from im3d_jax.lora.adapters import Adapters
from im3d_jax.trainable import Part
from im3d_jax.training.state import OptimizerSettings, create, learning_rate, make_optimizer
from im3d_jax.training.step import make_step
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

FEATURES, HIDDEN, NUM_EXAMPLES = 6, 16, 16
RULES = ((r"spatial/kernel", ("embed", "mlp")), (r"temporal/kernel", ("mlp", "embed")))


class Regression(NamedTuple):
    """A task whose network has two layers: tanh(x S) T against y, with noise drawn for each example."""

    noise: float = 0.1
    partition_rules = RULES

    def init(self, key):
        keys = jax.random.split(key, 2)
        return {
            "spatial": {"kernel": jax.random.normal(keys[0], (FEATURES, HIDDEN)) / 3},
            "temporal": {"kernel": jax.random.normal(keys[1], (HIDDEN, FEATURES)) / 3},
        }

    def draw(self, key, num_examples, stream):
        return jax.random.split(key, num_examples)

    def loss(self, params, constants, batch, draws, stream):
        x, y = batch
        noise = jax.vmap(lambda key: jax.random.normal(key, (FEATURES,)))(draws)
        predicted = jnp.tanh((x + self.noise * noise) @ params["spatial"]["kernel"])
        predicted = predicted @ params["temporal"]["kernel"] + constants
        losses = jnp.square(predicted - y).mean(-1)
        return losses.mean(), {"loss_by_level": losses.reshape(-1, 1).sum(0), "error": losses.sum()}


class Kinked(Regression):
    """The same, with a root whose gradient is not finite where x is 0."""

    def loss(self, params, constants, batch, draws, stream):
        loss, sums = super().loss(params, constants, batch, draws, stream)
        scale = params["spatial"]["kernel"][0, 0] ** 2
        return loss + jnp.sqrt(jnp.abs(batch[0][:, 0]) * scale).mean(), sums


def settings(**changed):
    rates = dict(num_steps=12, warmup_steps=0, decay_steps=0, learning_rate=0.1)
    return OptimizerSettings(**(rates | dict(weight_decay=0.0, clip_norm=1e9) | changed))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(NUM_EXAMPLES, FEATURES)).astype(np.float32) for _ in range(2))


def start(mesh="data=8", trainable=".*", frozen_dtype="float32", **changed):
    """(step function, its arguments) of a run's first step."""
    task, sizes = changed.pop("task", Regression()), sharding.parse_mesh(mesh)
    num_devices = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sizes, jax.devices()[:num_devices])
    trains = trainable if not isinstance(trainable, str) else Part(trainable)
    options = dict(
        trains=trains, accumulate=changed.pop("accumulate", 1), ema_decay=changed.pop("ema_decay", 0.9)
    )
    optimizer = make_optimizer(settings(**changed))
    state, frozen = create(
        task.init,
        None,
        RULES,
        mesh,
        optimizer,
        trains=trains,
        frozen_dtype=frozen_dtype,
        key=jax.random.key(0),
    )
    placed = jax.device_put(batch(), sharding.along_batch(mesh))
    constants = jax.device_put(np.float32(0.5), sharding.replicated(mesh))
    where = jax.tree.map(lambda array: array.sharding, state)
    step = make_step(task, optimizer, mesh, rate=learning_rate(settings(**changed)), where=where, **options)
    return step, [state, frozen, constants, placed, "stream"]


def test_a_loaded_parameter_that_the_frozen_type_does_not_hold_is_named():
    task, mesh = Regression(), sharding.make_mesh({"data": 8})
    loaded = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e5, np.float32), task.init(jax.random.key(0)))
    options = dict(trains=Part("temporal"), frozen_dtype="float16", key=jax.random.key(0))
    with pytest.raises(UserError, match="parameter spatial/kernel holds 100000, which float16 does not hold"):
        create(task.init, loaded, RULES, mesh, make_optimizer(settings()), **options)


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


def test_a_step_is_that_of_float64_and_optax():
    """Without noise: gradients of the loss by hand, and Adam's first step, which is the rate's size."""
    step, arguments = start(task=Regression(noise=0.0), ema_decay=0.05)
    before = as_numpy(arguments[0].trained)
    spatial, temporal = (np.float64(before[f"{name}/kernel"]) for name in ("spatial", "temporal"))
    x, y = (np.float64(each) for each in batch())
    hidden = np.tanh(x @ spatial)
    error = hidden @ temporal + 0.5 - y
    outer = 2 * error / error.size
    grads = {
        "spatial/kernel": x.T @ ((outer @ temporal.T) * (1 - hidden**2)),
        "temporal/kernel": hidden.T @ outer,
    }
    state, metrics = step(*arguments)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    norm = np.sqrt(sum(np.sum(each**2) for each in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(
        [metrics["error"], metrics["learning_rate"]], [np.mean(error**2), 0.1], rtol=1e-5
    )
    np.testing.assert_allclose(metrics["loss_by_level"], [np.mean(error**2, -1).sum()], rtol=1e-5)
    for path, old in before.items():
        np.testing.assert_allclose(state.trained[path], old - 0.1 * np.sign(grads[path]), atol=1e-4)
        averaged = 0.05 * old + 0.95 * np.asarray(state.trained[path])
        np.testing.assert_allclose(state.ema[path], averaged, rtol=1e-5, atol=1e-7)
    assert state.step == 1 and state.skipped == 0 and metrics["is_finite"]


def after_three_steps(**options):
    step, arguments = start(**options)
    before, compiled = jax.tree.map(lambda array: array.sharding, arguments[0]), []
    arguments[0], _ = step(*arguments)
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    for _ in range(2):
        arguments[0], metrics = step(*arguments)
    jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "compile" in event]  # as the state stays where it was:
    assert jax.tree.map(lambda array: array.sharding, arguments[0]) == before
    return as_numpy((arguments[0].trained, arguments[0].ema, metrics))


@pytest.fixture(scope="module")
def on_eight_devices():
    return after_three_steps(mesh="data=8")


@pytest.mark.parametrize(
    "mesh, accumulate", [("data=1", 4), ("data=2,fsdp=4", 1), ("data=2,fsdp=2,tensor=2", 2), ("tensor=8", 1)]
)
def test_meshes_and_parts_change_nothing(mesh, accumulate, on_eight_devices):
    """The noise of an example too is that of its row, wherever it is computed."""
    result = after_three_steps(mesh=mesh, accumulate=accumulate)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), result, on_eight_devices
    )


def test_adapters_train_alike_on_one_device_and_divided():
    """They lie where their kernels do, and kernels do not change."""
    adapters = Adapters(2, 4.0, "kernel")
    alone = after_three_steps(mesh="data=1", trainable=adapters)
    mesh = "data=2,fsdp=2,tensor=2"
    divided = after_three_steps(mesh=mesh, accumulate=2, trainable=adapters, frozen_dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), divided, alone)
    _, (state, frozen, *_) = start(mesh=mesh, trainable=adapters)
    assert frozen.keys() == {"spatial/kernel", "temporal/kernel"}
    halves = {path: 2 * x.addressable_shards[0].data.size == x.size for path, x in state.trained.items()}
    assert all(halves.values()) and len(halves) == 4
    assert not any(x.any() for path, x in state.trained.items() if path.endswith(".lora_B"))


def test_parameters_and_what_hangs_on_them_are_divided():
    _, (state, frozen, *_) = start(mesh="data=2,fsdp=2,tensor=2", trainable="temporal")
    (kernel,) = state.trained.values()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    for leaf in (kernel, *state.ema.values(), *moments, *frozen.values()):
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    assert len(moments) == 2
    assert kernel.addressable_shards[0].data.shape == (HIDDEN // 2, FEATURES // 2)


def state_bytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.trained, state.ema, state.opt_state)))


def test_only_what_trains_costs():
    """Equal layers, of which the later trains: state halves, and the backward pass of the other is gone.

    Matrix products: forward 2, backward of the later layer 1 (its weights), of the earlier 2 more (the later
    layer's input and its own weights).
    """
    (step, whole), (half_step, half) = start(), start(trainable="temporal", frozen_dtype="bfloat16")
    scalars = 8  # two counters of the optimiser
    assert state_bytes(half[0]) == (state_bytes(whole[0]) - scalars) / 2 + scalars
    (frozen,) = half[1].values()
    assert frozen.dtype == jnp.bfloat16 and not whole[1]
    product = 2 * NUM_EXAMPLES * FEATURES * HIDDEN / 8  # a device's
    flops = [
        each.lower(*arguments).compile().cost_analysis()["flops"]
        for each, arguments in ((step, whole), (half_step, half))
    ]
    assert flops[0] - flops[1] > 1.9 * product
    _, metrics = half_step(*half)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(where):
    step, arguments = start(accumulate=2, task=Kinked())
    before = as_numpy((arguments[0].trained, arguments[0].ema, arguments[0].opt_state))
    x, y = arguments[3]
    arguments[3] = x.at[3, 0].set(jnp.nan if where == "loss" else 0.0), y
    state, metrics = step(*arguments)
    assert not metrics["is_finite"] and np.isfinite(metrics["loss"]) == (where == "gradient")
    after = as_numpy((state.trained, state.ema, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert state.step == 1 and state.skipped == 1
    arguments[0], arguments[3] = state, (x, y)
    state, metrics = step(*arguments)
    assert metrics["is_finite"] and state.step == 2 and state.skipped == 1


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = make_optimizer(settings(clip_norm=0.5))
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    (clipped, _) = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.5, rtol=1e-6)
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["b"], 0.1 * 0.4, rtol=1e-5)


@pytest.mark.parametrize("step, decay", [(0, 1 / 10), (90, 91 / 100), (5000, 0.995)])
def test_the_average_follows_closely_at_first(step, decay):
    train_step, arguments = start(ema_decay=0.995)
    state = arguments[0]
    before = np.array(state.ema["temporal/kernel"]) + 1
    arguments[0] = state._replace(
        step=jnp.full_like(state.step, step), ema=jax.tree.map(lambda each: each + 1, state.ema)
    )
    after, _ = train_step(*arguments)
    expected = decay * before + (1 - decay) * np.asarray(after.trained["temporal/kernel"])
    np.testing.assert_allclose(after.ema["temporal/kernel"], expected, rtol=1e-5)


def test_learning_rate_rises_stays_and_falls():
    """Adam moves a parameter with a constant gradient by the learning rate."""
    rates = settings(warmup_steps=3, decay_steps=4)
    optimizer = make_optimizer(rates)
    value, gradient = jnp.zeros(1), jnp.ones(1)
    state, moved, update = optimizer.init(value), [], jax.jit(optimizer.update)
    for _ in range(12):
        change, state = update(gradient, state, value)
        moved.append(-float(change[0]))
    expected = np.concatenate([np.arange(3) / 3, np.ones(5), 1 - np.arange(4) / 4]) * 0.1
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose([learning_rate(rates)(n) for n in range(12)], expected, atol=1e-7)


EIGHTY = """
import sys
import jax
import numpy as np
from im3d_jax import config_flags, sharding, tasks
from im3d_jax.trainable import Part
from im3d_jax.training.state import OptimizerSettings, create, make_optimizer
from im3d_jax.training.step import make_step

config = config_flags.load("configs/tiny_turntable.py")
config.size = 8
config.backbone.kwargs.update(
    latent_shape=(2, 2, 64), model_channels=8, channel_mult=(1,), num_res_blocks=(0,), attention_levels=(),
    head_dim=8, temporal_span=("pixel",), text_dims=(8,), ff_mult=1,
)
mesh = sharding.make_mesh(sharding.parse_mesh(sys.argv[1], jax.device_count()))
task, optimizer = tasks.build(config, mesh), make_optimizer(OptimizerSettings.of(config.train))
state, frozen = create(task.init, None, task.partition_rules, mesh, optimizer, trains=Part("temporal"),
                       frozen_dtype="bfloat16", key=jax.random.key(0))
rng = np.random.default_rng(0)
views = [dict(rgb=rng.random((2, 8, 8, 3), np.float32), alpha=np.ones((2, 8, 8, 1), np.float32), caption="")
         for _ in range(240)]
batch = jax.device_put(task.collate(views), sharding.along_batch(mesh))
where = jax.tree.map(lambda array: array.sharding, state)
step = make_step(task, optimizer, mesh, trains=Part("temporal"), where=where,
                 rate=lambda step: 0.0, accumulate=1, ema_decay=0.9)
state, metrics = step(state, frozen, task.constants, batch, task.stream("turntable"))
print(len(metrics["loss"].sharding.device_set), len(batch["rgb"].addressable_shards[0].data), metrics["loss"])
"""


def test_eighty_devices_divide_the_papers_batch():
    losses = []
    for num_devices, mesh in ((80, "data=20,fsdp=4"), (1, "data=1")):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}",
        }
        command = [sys.executable, "-c", EIGHTY, mesh]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        devices, rows, loss = done.stdout.split()
        assert (int(devices), int(rows)) == (num_devices, 240 // num_devices)
        losses.append(float(loss))
    np.testing.assert_allclose(*losses, rtol=1e-5)
