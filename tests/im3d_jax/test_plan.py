"""The plan of a config against counts by hand, XLA's own counts, and arrays that are divided over devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding

from im3d_jax import config_flags, costs, plan, sharding
from im3d_jax.backbones import emu_video
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.lora.adapters import Adapters
from im3d_jax.trainable import Part
from im3d_jax.training.state import OptimizerSettings, make_optimizer
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(one_level):
    """Arguments of a network whose parameters can be counted by hand."""
    sizes = dict(latent_shape=(32, 32, 3), head_dim=4, text_dims=(6,))
    return one_level | sizes | dict(num_transformer_layers=1, ff_mult=2)


def test_parameters_are_those_that_one_counts_by_hand(small):
    width, latent, text = 8, 3, 6

    def linear(i, o):
        return i * o + o

    def conv(i, o):
        return 9 * i * o + o

    def conv_over_time(c):
        return 3 * c * c + c

    def res_block(i, o):
        shortcut = linear(i, o) if i != o else 0
        return 2 * i + conv(i, o) + linear(4 * width, o) + 2 * o + conv(o, o) + shortcut

    c = width
    feed_forward = linear(c, 2 * 2 * c) + linear(2 * c, c)
    self_attention, cross_attention = 3 * c * c + linear(c, c), c * c + 2 * text * c + linear(c, c)
    spatial = linear(width, 4 * width) + linear(4 * width, 4 * width)
    spatial += conv(2 * latent + 1, width) + 3 * res_block(c, c) + 2 * res_block(2 * c, c)
    spatial += 2 * c + 2 * linear(c, c) + self_attention + cross_attention + feed_forward + 3 * 2 * c
    spatial += 2 * c + conv(width, latent)
    temporal = 11 * conv_over_time(width) + conv_over_time(latent) + 8 * 4 * width
    temporal += 2 * c + 2 * linear(c, c) + linear(8, c) + self_attention + feed_forward + 2 * 2 * c
    model = emu_video.Model(**small)
    counts = plan.count_parameters(jax.eval_shape(model.init, jax.random.key(0)), model.temporal_pattern)
    assert counts == {"total": spatial + temporal, "spatial": spatial, "temporal": temporal}


@pytest.mark.parametrize("training", [False, True])
def test_flops_of_the_network_are_nearly_those_that_xla_counts(small, training):
    """XLA leaves out what a convolution multiplies with padding, and adds elementwise arithmetic."""
    model = emu_video.Model(**{**small, "model_channels": 64, "head_dim": 16})
    arguments = jax.eval_shape(model.init, jax.random.key(0)), *plan.network_inputs(model, 2, 3)

    def loss(params, *inputs):
        return jnp.square(model.apply(params, *inputs)).mean()

    function = jax.grad(loss) if training else model.apply
    counted = costs.count_flops(costs.trace(function, *arguments))
    assert counted == pytest.approx(jax.jit(function).lower(*arguments).cost_analysis()["flops"], rel=0.06)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=4", "fsdp=2, tensor=4", "tensor=8"])
def test_bytes_per_device_are_those_of_arrays_on_the_devices(small, mesh):
    sizes = sharding.parse_mesh(mesh)
    devices = np.array(jax.devices()).reshape(*sizes.values())
    real = jax.sharding.Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 3)
    model = emu_video.Model(**small)
    params = jax.eval_shape(model.init, jax.random.key(0))
    held = 0
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        spec = sharding.partition_spec(path, leaf.shape, model.partition_rules, sizes)
        array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), NamedSharding(real, spec))
        held += array.addressable_shards[0].data.nbytes
    assert sharding.bytes_per_device(params, model.partition_rules, sizes) == held
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert held == whole if mesh == "data=8" else whole / 8 < held < whole / 2


def test_a_lora_has_the_state_of_its_adapters_and_no_gradients_of_kernels(small):
    """A kernel of [m, n] gets r (m + n) numbers, each with two moments, a gradient and an average."""
    model = emu_video.Model(**small)
    params = jax.eval_shape(model.init, jax.random.key(0))
    kernels = [x for path, x in traverse_util.flatten_dict(params, sep="/").items()
               if "attn" in path and x.ndim == 2]  # fmt: skip
    trained = sum(3 * sum(x.shape) for x in kernels)
    optimizer = make_optimizer(OptimizerSettings(1e-4, 10))
    device, mesh = costs.ACCELERATORS["a100"], sharding.parse_mesh("data=1")

    def planned(trains):
        training = plan.Training(2, 2, trains, "bfloat16")
        return plan.plan_training(model, params, training, optimizer, mesh, device, 0.4)

    lora, whole = planned(Adapters(3, 3.0, "attn")), planned(Part(".*"))
    assert lora["trained_parameters"] == trained
    held = lora["bytes_per_device"]
    counters = 8  # of Adam and of the schedule of its rate
    assert (held["gradients"], held["ema"]) == (4 * trained, 4 * trained)
    assert held["optimizer"] == 8 * trained + counters
    assert held["weights"] == 4 * trained + 2 * whole["trained_parameters"]
    assert lora["flops_per_step"] < 0.85 * whole["flops_per_step"]


def test_parameters_of_a_network_without_temporal_layers_are_spatial():
    counts = plan.count_parameters({"a": {"kernel": np.zeros((2, 3))}}, "")
    assert counts == {"total": 6, "spatial": 6, "temporal": 0}


def test_the_config_is_the_papers():
    """FACTS: Emu Video's tables, and IM-3D A.1."""
    config = config_flags.load("configs/paper_512.py")
    model = emu_video.Model(**config.backbone.kwargs)
    params = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    counts = plan.count_parameters(params, model.temporal_pattern)
    assert counts["spatial"] == pytest.approx(2.7e9, rel=0.02)
    assert counts["temporal"] == pytest.approx(1.7e9, rel=0.2)
    assert params["conv_in/kernel"].shape[2] == 17 and math.prod(model.latent_shape) == 64 * 64 * 8
    assert (config.train.learning_rate, config.train.streams.turntable.batch_size) == (1e-5, 240)
    assert (config.video.w_image, config.video.w_text) == (2.0, 7.5)
    assert config.schedule.zero_terminal_snr and model.prediction_type == "v"


def test_a_batch_that_does_not_divide(small):
    train, model = config_flags.load("configs/tiny_turntable.py").train, emu_video.Model(**small)
    training, optimizer = (
        plan.Training(4, 16, Part(train.trainable), train.frozen_dtype),
        make_optimizer(OptimizerSettings.of(train)),
    )
    params = {"temporal": jax.ShapeDtypeStruct((2,), jnp.float32)}
    mesh = sharding.parse_mesh("data=3")
    with pytest.raises(UserError, match="divides the batch by 3"):
        plan.plan_training(model, params, training, optimizer, mesh, costs.ACCELERATORS["h200"], 0.4)
    with pytest.raises(UserError, match="by 2, and config.train.accumulate by 4; config.train's 4 does not"):
        plan.plan_training(
            model,
            params,
            training._replace(accumulate=4),
            optimizer,
            sharding.parse_mesh("data=2"),
            costs.ACCELERATORS["h200"],
            0.4,
        )


class Linear:
    """A backbone whose costs are counted by hand: a product of N x 10 by 10 x 10, of N latent pixels."""

    latent_shape, partition_rules = (3, 5, 10), ()
    prediction_type, num_views, temporal_pattern, traceable = "v", None, "w", True

    def init(self, key):
        return {"w": jnp.zeros((10, 10))}

    def apply(self, params, noisy, timestep, conditioning):
        return noisy @ params["w"]

    def empty_conditioning(self, batch):
        return Conditioning(jnp.zeros((batch, 3, 5, 10)), jnp.zeros(batch), (), ())


def test_parts_of_a_batch_take_turns_in_memory_and_add_up_in_time(monkeypatch):
    monkeypatch.setattr(plan, "_kept_bytes", lambda *_: {})
    params = jax.eval_shape(Linear().init, None)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=1e-3, num_steps=5))
    whole, parts = (
        plan.plan_training(
            Linear(),
            params,
            plan.Training(48, 2, Part(".*"), "float32", accumulate),
            optimizer,
            sharding.parse_mesh("data=4"),
            costs.ACCELERATORS["h200"],
            0.5,
        )
        for accumulate in (1, 3)
    )
    assert whole["flops_per_step"] == parts["flops_per_step"] == 2 * (2 * 10 * 10) * (48 * 2 * 3 * 5)
    assert whole["seconds_per_step"] == pytest.approx(parts["seconds_per_step"])
    assert whole["batch_per_device"] == parts["batch_per_device"] == 12
    held, of_parts = whole["bytes_per_device"], parts["bytes_per_device"]
    assert of_parts["gradients"] == 2 * held["gradients"] == 2 * 400
    assert of_parts["weights"] == held["weights"] == 400
    # Activations are views of 12 or of 4 assets, and what does not grow with the batch.
    a_view = 4 * 3 * 5 * 10
    assert held["activations"] - of_parts["activations"] == pytest.approx((12 - 4) * 2 * a_view * 3, rel=0.4)
