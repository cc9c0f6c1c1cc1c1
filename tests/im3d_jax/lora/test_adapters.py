"""Adapters: drawn, merged and applied in factors, against NumPy in float64, and in steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from im3d_jax import backbones, costs, sharding
from im3d_jax.lora import adapters as lora
from im3d_jax.lora import factored
from im3d_jax.lora.adapters import A, Adapter, Adapters, B
from im3d_jax.trainable import Part, chosen
from im3d_jax.training_settings import LoraSettings, TrainSettings

PARAMS = {
    "attn1": {"to_q": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}},
    "conv": {"kernel": jnp.ones((3, 3, 5, 7))},
    "norm": {"scale": jnp.ones(8)},
}


def split(rank=2, alpha=4.0, targets="attn|conv"):
    return Adapters(rank, alpha, targets).split(PARAMS, jax.random.key(0))


def test_a_is_uniform_as_in_peft_and_b_is_zero():
    """PEFT: kaiming_uniform_(A, a=sqrt(5)), which is 1 / sqrt(fan in)."""
    large = {"attn": {"kernel": jnp.ones((400, 300))}}
    trained, frozen = Adapters(100, 1.0, "attn").split(large, jax.random.key(1))
    a, b = trained["attn/kernel" + A], trained["attn/kernel" + B]
    assert a.shape == (400, 100) and b.shape == (100, 300) and not b.any()
    assert 0.0499 < float(jnp.abs(a).max()) <= 0.05  # 1 / sqrt(400)
    np.testing.assert_allclose(a.std(), 0.05 / np.sqrt(3), rtol=0.01)
    assert frozen == {"attn/kernel": large["attn"]["kernel"]}


def test_only_kernels_get_adapters_and_each_has_its_own_numbers():
    trained, frozen = split()
    assert {path: x.shape for path, x in trained.items()} == {
        "attn1/to_q/kernel.lora_A": (6, 2),
        "attn1/to_q/kernel.lora_B": (2, 8),
        "conv/kernel.lora_A": (3, 3, 5, 2),
        "conv/kernel.lora_B": (2, 7),
    }
    assert frozen.keys() == traverse_util.flatten_dict(PARAMS, sep="/").keys()
    alone, _ = split(targets="conv")
    np.testing.assert_array_equal(alone["conv/kernel.lora_A"], trained["conv/kernel.lora_A"])


def test_training_starts_at_the_weights():
    trained, frozen = split()
    joined = Adapters(2, 4.0, "attn|conv").join(frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, joined, PARAMS)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_merging_is_that_of_float64(strength):
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=shape) for shape in ((3, 3, 5, 7), (3, 3, 5, 2), (2, 7)))
    expected = kernel + strength * 1.5 * np.einsum("hwir,ro->hwio", a, b)
    adapter = Adapter(a.astype(np.float32), b.astype(np.float32), 1.5)
    for made in (kernel.astype(np.float32), jnp.asarray(kernel, jnp.float32)):
        found = lora.merged(made, adapter, strength)
        assert type(found) is type(made) or isinstance(found, jax.Array)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lora.merged(found, adapter, -strength), kernel, rtol=1e-5, atol=1e-6)


# ---- What is refused ----


@pytest.mark.parametrize(
    "adapters, message",
    [
        (
            Adapters(2, 2.0, "nowhere"),
            "targets: 'nowhere' matches no kernel; name .* such as attn1/to_q/kernel",
        ),
        (Adapters(2, 2.0, "norm"), "targets: 'norm' matches no kernel"),  # a vector
        (Adapters(7, 7.0, "attn"), r"rank is 7, more than the width of attn1/to_q/kernel \(6, 8\)"),
    ],
)
def test_what_no_adapter_fits_is_one_line(adapters, message, user_error):
    with user_error(message):
        adapters.split(PARAMS, jax.random.key(0))


def test_a_model_whose_weights_are_elsewhere_has_none(user_error):
    with user_error("weights are no JAX arrays"):
        Adapters(2, 2.0, "attn").split({}, jax.random.key(0))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(trainable="temporal", init_from="w"),
            "trainable is 'temporal', but a LoRA trains adapters alone",
        ),
        (dict(init_from=""), "init_from is ''; name the weights|init_from is '', but"),
    ],
)
def test_a_lora_beside_other_settings_is_one_line(settings, message, user_error):
    with user_error(message):
        TrainSettings(lora=LoraSettings(rank=4), **settings)


@pytest.mark.parametrize("changes", [dict(trainable=""), dict(lora=dict(targets=""))])
def test_an_empty_pattern_is_one_line(changes, user_error):
    with user_error("is '', which is found everywhere"):
        if "lora" in changes:
            changes = dict(lora=LoraSettings(**changes["lora"]))
        TrainSettings(**changes)


def test_settings_choose_what_trains():
    assert chosen(TrainSettings(trainable="temporal")) == Part("temporal")
    settings = TrainSettings(init_from="w", lora=LoraSettings(rank=8, targets="attn"))
    assert chosen(settings) == Adapters(8, 8.0, "attn")  # alpha 0 stands for the rank


# ---- In factors ----


def perturbed(params, targets, rank=3, seed=0):
    """(trains, frozen, adapters none of which is zero)."""
    trains = Adapters(rank, 2.0 * rank, targets)
    trained, frozen = trains.split(params, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return (
        trains,
        frozen,
        {path: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for path, x in trained.items()},
    )


OPERATIONS = {
    "product": lambda p, x: jnp.tanh(x) @ p["w"],
    "several axes contracted": lambda p, x: jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3), p["stacked"]),
    "kernel first": lambda p, x: jnp.einsum("io,bi->ob", p["w"], x),
    "product of products": lambda p, x: x @ (p["w"] @ p["w"].T),
    "elementwise": lambda p, x: jnp.sin(p["w"]).sum() + x,
    "another type": lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32),
    "inner jit": lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x),
    "checkpoint": lambda p, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["w"], x),
    "scan": lambda p, x: jax.lax.scan(lambda c, row: (c, row @ p["w"]), 0.0, x)[1],
    "custom gradient": lambda p, x: jax.nn.relu(x @ p["w"]),
    "convolution": lambda p, x: jax.lax.conv_general_dilated(
        x.reshape(1, 2, 3, -1), p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "convolution, channels first": lambda p, x: jax.lax.conv_general_dilated(
        x.reshape(1, -1, 2, 3), p["conv"], (1, 2), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")
    ),
    "convolution in groups": lambda p, x: jax.lax.conv_general_dilated(
        x.reshape(1, 2, 3, -1), p["conv"][:, :, :2], (1, 1), "SAME", feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "the kernel itself": lambda p, x: p["w"],
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_factors_give_what_the_sum_gives(name):
    """And gradients of both factors; wherever a kernel goes."""
    rng = np.random.default_rng(3)
    shapes = {"w": (6, 8), "stacked": (2, 3, 8), "conv": (3, 3, 4, 8)}
    params = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    trains, frozen, trained = perturbed(params, ".")
    weights = jnp.asarray(rng.normal(size=200), jnp.float32)

    def loss(call, trained):
        made = call(lambda p: OPERATIONS[name](p, x), frozen, trained)
        return (made.ravel() * weights[: made.size]).sum(), made

    (_, made), grads = jax.value_and_grad(lambda t: loss(trains.call, t), has_aux=True)(trained)
    (_, expected), wanted = jax.value_and_grad(
        lambda t: loss(lambda f, *parts: f(trains.join(*parts)), t), has_aux=True
    )(trained)
    tolerance = dict(rtol=2e-2, atol=5e-2) if name == "another type" else dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made, expected, **tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, wanted)


def test_factors_save_the_gradient_of_the_kernel():
    """Products of a wide layer: forward 1 and to its input 1, and none to its weights, which is as large."""
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    x = jnp.ones((512, 64))
    trains, frozen, trained = perturbed(params, ".", rank=2)

    def flops(call):
        def loss(trained):
            return call(lambda p: jnp.sin(x @ p["a"]) @ p["b"], frozen, trained).sum()

        return costs.count_flops(costs.trace(jax.grad(loss), trained))

    wide, thin = 2 * 512 * 64 * 64, 2 * 512 * 64 * 2
    factored_flops, merged = flops(trains.call), flops(lambda f, *parts: f(trains.join(*parts)))
    assert 3 * wide < factored_flops <= 3 * wide + 12 * thin
    assert merged >= 5 * wide


def test_small_changes_survive_arithmetic_in_16_bits():
    """A sum of W and A B in bfloat16 would lose what is below W's last bit."""
    params = {"w": jnp.ones((8, 8))}
    adapter = {"w": Adapter(jnp.full((8, 1), 1e-4), jnp.ones((1, 8)), 1.0)}
    x = jnp.eye(8, dtype=jnp.bfloat16)

    def product(p):
        return x @ (p["w"] - 0).astype(jnp.bfloat16)

    flat = {"w": params["w"].astype(jnp.bfloat16)}
    made = factored.call(lambda p: jnp.dot(x, p["w"], preferred_element_type=jnp.float32), flat, adapter)
    np.testing.assert_allclose(made - 1, 1e-4, rtol=0.01)
    summed = lora.merged(flat["w"], adapter["w"])
    assert (summed == 1).all()


@pytest.mark.slow
def test_a_backbone_with_adapters_in_factors_is_the_one_with_sums():
    """Also where the backward pass computes again: with `remat`."""
    sizes = dict(
        latent_shape=(4, 4, 4), block_out_channels=(32,), layers_per_block=0, num_attention_heads=(2,)
    )
    sizes |= dict(attention_levels=(0,), num_views=2)
    model = backbones.build("svd", backbones.small_kwargs("svd") | sizes)
    model = backbones.with_remat(model, "nothing_saveable")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), shapes)
    trains, frozen, trained = perturbed(params, LoraSettings().targets + "|conv1|proj_out", rank=4)
    views = model.num_views or 2
    noisy = jnp.asarray(rng.standard_normal((1, views, *model.latent_shape)), jnp.float32)
    given = model.empty_conditioning(1)._replace(image_mask=jnp.ones(1))

    def loss(call):
        def of(trained):
            made = call(lambda p: model.apply(p, noisy, jnp.full(1, 0.4), given), frozen, trained)
            return jnp.square(made).mean()

        return jax.jit(jax.value_and_grad(of))(trained)

    (found, grads), (expected, wanted) = loss(trains.call), loss(lambda f, *parts: f(trains.join(*parts)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for path, gradient in wanted.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(grads[path], gradient, rtol=1e-3, atol=1e-3 * scale + 1e-9)


# ---- Over devices ----


def test_an_adapter_lies_where_its_kernel_does():
    rules = ((r"attn1/to_q/kernel", ("embed", "mlp")), (r"conv/kernel", ("mlp",)))
    trained, _ = split()
    found = Adapters(2, 4.0, "attn|conv").rules(trained, rules)
    axes = {path: sharding.logical_axes(path, found) for path in trained}
    assert axes == {
        "attn1/to_q/kernel.lora_A": ("embed", "rank"),
        "attn1/to_q/kernel.lora_B": ("rank", "mlp"),
        "conv/kernel.lora_A": ("rank",),
        "conv/kernel.lora_B": ("rank", "mlp"),
    }
    none = Adapters(2, 4.0, "attn|conv").rules(trained, ())
    assert {sharding.logical_axes(path, none) for path in trained} == {()}
    sizes = sharding.parse_mesh("fsdp=2,tensor=4")
    spec = sharding.partition_spec("attn1/to_q/kernel.lora_A", (6, 2), found, sizes)
    assert tuple(spec) == ("fsdp", None)
