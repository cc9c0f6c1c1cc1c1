"""`im3d plan` against counts by hand, XLA's own counts, and arrays that are really divided over devices."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding

from im3d_jax import config_flags, costs, main, plan, sharding
from im3d_jax.backbones import emu_video
from im3d_jax.commands.plan import costliest_stream
from im3d_jax.training.state import make_optimizer
from recon_torch.errors import UserError

SMALL = dict(
    latent_shape=(32, 32, 3),
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=(1,),
    attention_levels=(),
    head_dim=4,
    num_transformer_layers=1,
    ff_mult=2,
    temporal_span=("pixel",),
    text_dims=(6,),
)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# ---- Parameters ----


def test_parameters_are_those_that_one_counts_by_hand():
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
    model = emu_video.Model(**SMALL)
    counts = plan.count_parameters(jax.eval_shape(model.init, jax.random.key(0)), model.temporal_pattern)
    assert counts == {"total": spatial + temporal, "spatial": spatial, "temporal": temporal}


# ---- FLOPs ----


def test_flops_of_products_convolutions_and_loops():
    def product(x, w):
        return x @ w

    def flops(function, *shapes):
        return costs.count_flops(costs.trace(function, *shapes))

    x, w = shape(4, 5, 6), shape(6, 7)
    assert flops(product, x, w) == 2 * 4 * 5 * 6 * 7
    assert flops(jax.grad(lambda x, w: product(x, w).sum(), (0, 1)), x, w) == 3 * 2 * 4 * 5 * 6 * 7
    assert flops(jax.grad(jax.checkpoint(lambda w, x: jnp.sin(product(x, w)).sum())), w, x) == 3 * 1680
    assert flops(lambda x, w: jax.lax.map(lambda row: row @ w, x), x, w) == 2 * 4 * 5 * 6 * 7
    assert flops(jax.nn.dot_product_attention, *[shape(2, 9, 3, 8)] * 3) == 2 * 2 * 2 * 3 * 9 * 9 * 8

    def convolve(x, w, stride=2):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)

    x, w = shape(2, 16, 16, 5), shape(3, 3, 5, 7)
    forward = 2 * 2 * 8 * 8 * 9 * 5 * 7
    assert flops(convolve, x, w) == forward
    assert flops(jax.grad(lambda x, w: convolve(x, w).sum(), (0, 1)), x, w) == pytest.approx(3 * forward)


@pytest.mark.parametrize("training", [False, True])
def test_flops_of_the_network_are_nearly_those_that_xla_counts(training):
    """XLA leaves out what a convolution multiplies with padding, and adds elementwise arithmetic."""
    model = emu_video.Model(**{**SMALL, "model_channels": 64, "head_dim": 16})
    arguments = jax.eval_shape(model.init, jax.random.key(0)), *plan.network_inputs(model, 2, 3)

    def loss(params, *inputs):
        return jnp.square(model.apply(params, *inputs)).mean()

    function = jax.grad(loss) if training else model.apply
    counted = costs.count_flops(costs.trace(function, *arguments))
    assert counted == pytest.approx(jax.jit(function).lower(*arguments).cost_analysis()["flops"], rel=0.06)


# ---- Bytes ----


def test_bytes_that_are_alive_and_kept():
    x = shape(1000)
    program = costs.trace(lambda x: (jnp.sin(x) * jnp.cos(x)).sum(), x)
    assert costs.peak_bytes(program) == 3 * 4000
    nested = costs.trace(lambda x: jax.jit(lambda y: jnp.sin(jnp.sin(y)).sum())(jnp.cos(x)), x)
    assert costs.peak_bytes(nested) == pytest.approx(3 * 4000, abs=8)

    def loss(trained, data):
        return (jnp.sin(trained) * data).sum()

    assert costs.kept_bytes(loss, x, x) == 4000  # the cosine; `data` is an argument
    assert costs.kept_bytes(jax.checkpoint(loss), x, x) == 0


def test_peak_is_near_what_xla_allocates():
    def loss(weights, x):
        for weight in weights:
            x = x @ weight
        return jnp.square(x).sum()

    arguments = [shape(64, 64)] * 6, shape(1024, 64)
    predicted = costs.peak_bytes(costs.trace(jax.grad(loss), *arguments))
    allocated = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert predicted == pytest.approx(allocated, rel=0.35)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=4", "fsdp=2, tensor=4", "tensor=8"])
def test_bytes_per_device_are_those_of_arrays_on_the_devices(mesh):
    sizes = sharding.parse_mesh(mesh)
    devices = np.array(jax.devices()).reshape(*sizes.values())
    real = jax.sharding.Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * 3)
    model = emu_video.Model(**SMALL)
    params = jax.eval_shape(model.init, jax.random.key(0))
    held = 0
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        spec = sharding.partition_spec(path, leaf.shape, model.partition_rules, sizes)
        array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), NamedSharding(real, spec))
        held += array.addressable_shards[0].data.nbytes
    assert sharding.bytes_per_device(params, model.partition_rules, sizes) == held
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert held == whole if mesh == "data=8" else whole / 8 < held < whole / 2


# ---- The command ----


def run(capsys, tmp_path, *arguments):
    code = main.run(["plan", *arguments, f"--json={tmp_path / 'plan.json'}"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out, json.loads((tmp_path / "plan.json").read_text())


def test_the_shipped_config(capsys, tmp_path):
    text, numbers = run(capsys, tmp_path, "--config=configs/tiny.py", "--utilisation=0.5")
    asset = numbers["generate"]
    assert asset["video"]["calls"] == 80 and asset["image"]["evaluations_per_call"] == 2
    flops = 80 * asset["video"]["flops_per_call"] + 40 * asset["image"]["flops_per_call"]
    assert asset["asset"]["flops"] == flops
    assert asset["weights_bytes"] == 4 * numbers["parameters"]["total"]
    assert "train" not in numbers and "published" not in text and "fits" in text


def test_a_pipeline_draws_the_image(capsys, tmp_path):
    pipeline = "--config.text_to_image.pipeline=some/directory"
    text, numbers = run(capsys, tmp_path, "--config=configs/tiny.py", pipeline)
    assert "image" not in numbers["generate"] and "40 calls" not in text
    assert numbers["generate"]["asset"]["flops"] == 80 * numbers["generate"]["video"]["flops_per_call"]


def test_the_papers_size(capsys, tmp_path):
    """With residual blocks at two levels and attention at one: tracing all of them takes a minute."""
    cut = [
        f"--config.backbone.kwargs.{each}"
        for each in ("num_res_blocks=(1, 0, 0, 1)", "attention_levels=(0,)")
    ]
    paper = "--config=configs/paper_512.py", *cut, "--accelerator=a100"
    text, numbers = run(capsys, tmp_path, *paper, "--mesh=data=40,fsdp=2")
    step, asset = numbers["train"], numbers["generate"]
    assert asset["video"]["evaluations_per_call"] == 3 and step["batch_per_device"] == 3
    assert step["trained_parameters"] == numbers["parameters"]["temporal"]
    held = step["bytes_per_device"]
    counts = numbers["parameters"]  # float32 where they train, bfloat16 where not, on two devices
    assert held["weights"] == pytest.approx((4 * counts["temporal"] + 2 * counts["spatial"]) / 2, rel=0.01)
    assert held["optimizer"] == pytest.approx(2 * held["ema"], rel=0.01)
    kept = step["bytes_kept_for_backward"]
    assert kept["nothing_saveable"] < 0.1 * kept[""]
    seconds = step["flops_per_step"] / (80 * 0.4 * 312e12)
    assert step["seconds_per_step"] == pytest.approx(seconds)
    assert step["device_bytes"] == sum(held.values()) and step["fits"] == (step["device_bytes"] < 80e9)
    assert "published 1.7 G" in text and numbers["published"]["note"] in " ".join(text.split())


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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mesh=data"], "AXIS=NUMBER"),
        (["--mesh=data=0"], "AXIS=NUMBER"),
        (["--mesh=data=2,data=2"], "each axis once"),
        (["--mesh=model=2"], "data, fsdp, tensor"),
        (["--accelerator=v100"], "a100, h100"),
        (["--utilisation=40"], "share in"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    assert main.run(["plan", "--config=configs/tiny.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_batch_that_does_not_divide():
    config, model = config_flags.load("configs/tiny_turntable.py"), emu_video.Model(**SMALL)
    training, optimizer = costliest_stream(config), make_optimizer(config.train)
    params, mesh = {"temporal": shape(2)}, sharding.parse_mesh("data=3")
    with pytest.raises(UserError, match="divides the batch by 3"):
        plan.plan_training(model, params, training, optimizer, mesh, costs.ACCELERATORS["h200"], 0.4)
