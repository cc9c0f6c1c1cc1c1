"""The factorised UNet: identity in time at the start, masks, gradients, sharding; its layers in float64."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from im3d_jax import backbones
from im3d_jax.backbones import attention, emu_video, layers
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

B, K, WORDS = 8, 5, 4
ONE_LAYER = dict(num_res_blocks=(1, 0), num_transformer_layers=1, ff_mult=1, model_channels=8, head_dim=8)
TEXT = dict(text_dims=(8,), vocabulary=9, max_words=WORDS)
SHAPE = dict(latent_shape=(4, 4, 3), temporal_span=("pixel", "pixel"))
SMALL = emu_video.Model(**emu_video.SMALL | ONE_LAYER | TEXT | SHAPE)


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


def random_like(shapes, seed=0):
    """Random parameters, also where initialisation has zeros or ones."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in flatten(shapes).items():
        scale = 0.5 / math.sqrt(math.prod(leaf.shape[:-1]) or 1) if path.endswith("kernel") else 0.3
        flat[path] = jnp.asarray(
            path.endswith("scale") + scale * rng.standard_normal(leaf.shape), jnp.float32
        )
    return unflatten(flat)


@pytest.fixture(scope="module")
def initial():
    return jax.jit(SMALL.init)(jax.random.key(0, impl="rbg"))  # which compiles faster


@pytest.fixture(scope="module")
def random(initial):
    return random_like(initial)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(SMALL.apply)


@pytest.fixture(scope="module")
def inputs():
    """(noisy, timestep, conditioning) of 8 assets, half of them with an image, with 1 to 4 words."""
    rng = np.random.default_rng(1)
    words = jnp.asarray(rng.integers(1, 9, (B, WORDS)), jnp.int32)
    mask = jnp.asarray(np.arange(WORDS)[None] <= np.arange(B)[:, None] % 4, jnp.float32)
    image = jnp.asarray(rng.standard_normal((B, 4, 4, 3)), jnp.float32)
    noisy = jnp.asarray(rng.standard_normal((B, K, 4, 4, 3)), jnp.float32)
    given = Conditioning(image, jnp.asarray(np.arange(B) % 2, jnp.float32), (words,), (mask,))
    return noisy, jnp.arange(B) * 100.0, given


def as_images(inputs):
    """The frames of `inputs` as separate images: only those that were frame 0 keep the conditioning image."""
    noisy, timestep, given = inputs
    spread = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), given)
    first = jnp.tile(jnp.arange(K) == 0, B).astype(jnp.float32)
    spread = spread._replace(image_mask=spread.image_mask * first)
    return noisy.reshape(B * K, 1, 4, 4, 3), jnp.repeat(timestep, K), spread


def mixed(temporal, others):
    """Temporal parameters from one tree, all others from another."""
    other = flatten(others)
    return unflatten(
        {p: v if SMALL.temporal_pattern in p else other[p] for p, v in flatten(temporal).items()}
    )


def test_one_frame_ignores_the_temporal_parameters(apply, initial, random, inputs):
    images = as_images(inputs)
    assert np.array_equal(apply(random, *images), apply(mixed(initial, random), *images))


def test_the_image_enters_through_channels_that_start_at_zero(apply, initial, random, inputs):
    noisy, timestep, given = inputs
    without = given._replace(image_mask=jnp.zeros(B))
    kernel = flatten(initial)["conv_in/kernel"]
    assert (kernel[:, :, 3:] == 0).all() and (kernel[:, :, :3] != 0).any()
    start = unflatten(flatten(random) | {"conv_in/kernel": kernel})
    assert np.array_equal(apply(start, noisy, timestep, given), apply(start, noisy, timestep, without))
    difference = np.abs(apply(random, noisy, timestep, given) - apply(random, noisy, timestep, without))
    changed = difference.max((1, 2, 3, 4)) > 1e-3
    assert changed.tolist() == (given.image_mask > 0).tolist()


def test_the_image_is_appended_to_frame_0_with_a_mask(inputs):
    noisy, _, given = inputs

    def with_image(**changed):
        return np.asarray(emu_video.with_image(noisy, given, dataclasses.replace(SMALL, **changed)))

    x = with_image()
    mask = np.asarray(given.image_mask)[:, None, None, None]
    assert np.array_equal(x[..., :3], noisy)
    assert np.array_equal(x[:, 0, ..., 3:6], given.image * mask)
    assert np.array_equal(x[:, 0, ..., 6:], np.broadcast_to(mask, (B, 4, 4, 1)))
    assert not x[:, 1:, ..., 3:].any()
    clean = with_image(clean_first_view=True)
    expected = np.where(mask > 0, given.image, noisy[:, 0])
    np.testing.assert_allclose(clean[:, 0, ..., :3], expected, atol=1e-6)
    assert np.array_equal(clean[:, 1:], x[:, 1:]) and np.array_equal(clean[..., 3:], x[..., 3:])
    everywhere = with_image(image_in_every_view=True)
    assert all(np.array_equal(everywhere[:, k, ..., 3:6], given.image * mask) for k in range(K))
    kept = [0, 1, 2, 6]
    assert np.array_equal(everywhere[..., kept], x[..., kept])


def test_an_open_gate_copies_the_image_where_there_is_one(apply, random, inputs):
    noisy, timestep, given = inputs
    gated = dataclasses.replace(SMALL, copy_gate=True, prediction_type="x0")
    gate = {"conv": {"kernel": jnp.zeros((3, 3, 8, 3)), "bias": jnp.full(3, 50.0)}}
    views = jax.jit(gated.apply)({**random, "temporal_copy_gate": gate}, noisy, timestep, given)
    drawn = apply(random, noisy, timestep, given)
    with_image = np.asarray(given.image_mask) > 0
    copies = np.broadcast_to(given.image[:, None], views.shape)
    np.testing.assert_allclose(views[with_image], copies[with_image], atol=1e-6)
    np.testing.assert_allclose(views[~with_image], drawn[~with_image], atol=1e-3)
    with pytest.raises(UserError, match="copy_gate"):
        dataclasses.replace(SMALL, copy_gate=True, prediction_type="v")


def test_padding_has_no_influence(apply, random, inputs):
    noisy, timestep, given = inputs
    (words,), (mask,) = given.text, given.text_mask
    before = apply(random, *inputs)
    padded = given._replace(text=(jnp.where(mask > 0, words, 8 - words),))
    np.testing.assert_allclose(apply(random, noisy, timestep, padded), before, atol=1e-6)
    first = given._replace(text=(words.at[:, 0].set((words[:, 0] + 1) % 9),))
    assert (np.abs(apply(random, noisy, timestep, first) - before).max((1, 2, 3, 4)) > 1e-4).all()


@pytest.mark.parametrize("frames", [1, K])
def test_gradients_are_finite_and_reach_what_the_pattern_says(frames, random, inputs):
    noisy, timestep, given = inputs
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((B, frames, 4, 4, 3)), jnp.float32)

    def loss(params):
        return (SMALL.apply(params, noisy[:, :frames], timestep, given) * weights).sum()

    gradients = flatten(jax.jit(jax.grad(loss))(random))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    silent = {path for path, gradient in gradients.items() if not np.asarray(gradient).any()}
    temporal = {path for path in gradients if SMALL.temporal_pattern in path}
    assert len(temporal) > 10
    assert silent == (temporal if frames == 1 else set())


def equations(jaxpr):
    """All equations of a jaxpr, also those of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_bfloat16_stays_close_to_float32(apply, random, inputs):
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    expected, output = apply(random, *inputs), jax.jit(half.apply)(random, *inputs)
    assert output.dtype == jnp.float32
    error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_norms_softmax_and_the_noise_level_are_float32_in_a_bfloat16_network(random, inputs):
    half = dataclasses.replace(SMALL, dtype="bfloat16", vocabulary=0, text_dims=(8,))
    noisy, timestep, given = inputs
    given = given._replace(text=(jnp.ones((B, WORDS, 8)),))
    found = {}
    for equation in equations(jax.make_jaxpr(half.apply)(random, noisy, timestep, given).jaxpr):
        dtypes = found.setdefault(equation.primitive.name, [])
        dtypes += [str(operand.aval.dtype) for operand in equation.invars[:1]]
    for name in ("rsqrt", "exp", "reduce_max", "sin", "cos"):
        assert set(found[name]) == {"float32"}, name
    assert set(found["conv_general_dilated"]) == {"bfloat16"}
    assert found["dot_general"].count("float32") == 3  # two layers that embed the noise level, one the frame


def test_remat_keeps_less_for_the_same_gradients(inputs):
    noisy, timestep, given = inputs
    plain = dataclasses.replace(SMALL, channel_mult=(1,), num_res_blocks=(0,), attention_levels=(0,))
    params = random_like(jax.eval_shape(plain.init, jax.random.key(0)))

    def loss(params, model, frames=K):
        return jnp.square(model.apply(params, noisy[:, :frames], timestep, given)).mean()

    def kept_bytes(model):
        _, backward = jax.eval_shape(lambda params: jax.vjp(partial(loss, model=model), params), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    # One frame, because that compiles in half the time.
    gradient = jax.jit(jax.value_and_grad(partial(loss, frames=1)), static_argnames="model")
    models = [plain] + [dataclasses.replace(plain, remat=f"{kept}_saveable") for kept in ("dots", "nothing")]
    sizes = [kept_bytes(model) for model in models]
    assert sizes[1] < 0.7 * sizes[0] and sizes[2] < 0.7 * sizes[1]
    (expected_loss, expected), (found_loss, found) = (gradient(params, model) for model in models[::2])
    np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-6)
    for path, values in flatten(found).items():
        np.testing.assert_allclose(values, flatten(expected)[path], atol=1e-4, err_msg=path)
    with pytest.raises(UserError, match="remat"):
        dataclasses.replace(SMALL, remat="some")


# ---- Layers ----


@pytest.mark.parametrize("closed_orbit", [False, True])
def test_temporal_convolution_is_torch_conv1d(closed_orbit):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 2, K, 2, 3, 4))
    params = {"kernel": rng.standard_normal((3, 4, 4)), "bias": rng.standard_normal(4)}
    layer = layers.TemporalConv(jnp.float32, closed_orbit=closed_orbit)

    def weighted(params, x):
        return (layer.apply({"params": params}, x) * weights).sum()

    x32, params32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (x, params))
    value, (d_params, d_x) = jax.value_and_grad(weighted, (0, 1))(params32, x32)

    tensors = [torch.tensor(a, requires_grad=True) for a in (x, params["kernel"], params["bias"])]
    lines = tensors[0].permute(0, 2, 3, 4, 1).reshape(-1, 4, K)
    padded = F.pad(lines, (1, 1), mode="circular" if closed_orbit else "constant")
    result = F.conv1d(padded, tensors[1].permute(2, 1, 0), tensors[2])
    expected = (result.reshape(2, 2, 3, 4, K).permute(0, 4, 1, 2, 3) * torch.tensor(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    for ours, theirs in zip((d_x, d_params["kernel"], d_params["bias"]), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-4)


def numpy_temporal_transformer(p, x, azimuths, span, head_dim):
    """`TemporalTransformer` of one layer, one query at a time, in float64."""
    p = {path: np.asarray(value, np.float64) for path, value in p.items()}
    frames, height, width, c = x.shape
    block = "transformer_blocks_0"

    def dense(y, name):
        return y @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)

    def layer_norm(y, name):
        normal = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return normal * p[f"{name}/scale"] + p[f"{name}/bias"]

    groups = math.gcd(32, c)
    grouped = x.reshape(frames, height * width, groups, c // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    normal = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    tokens = dense(normal * p["norm/scale"] + p["norm/bias"], "proj_in")
    tokens += dense(azimuths, "azimuth")[:, None, None]
    if span != "pixel":
        tokens += p["place"]
    y = layer_norm(tokens, f"{block}/norm1")
    q, k, v = (dense(y, f"{block}/attn1/to_{name}") for name in "qkv")
    seen = np.empty_like(q)
    for f, i, j in np.ndindex(frames, height, width):
        places = {"pixel": np.s_[:, i, j], "first": np.s_[0], "video": np.s_[:]}[span]
        keys, values = k[places].reshape(-1, c), v[places].reshape(-1, c)
        for head in range(c // head_dim):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = keys[:, part] @ q[f, i, j, part] / math.sqrt(head_dim)
            probabilities = np.exp(scores - scores.max())
            seen[f, i, j, part] = probabilities @ values[:, part] / probabilities.sum()
    tokens += dense(seen, f"{block}/attn1/to_out_0")
    hidden, gate = np.split(dense(layer_norm(tokens, f"{block}/norm2"), f"{block}/ff/net_0/proj"), 2, -1)
    gelu = gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2
    tokens += dense(hidden * gelu, f"{block}/ff/net_2")
    return x + dense(tokens, "proj_out")


@pytest.mark.parametrize("span", ["pixel", "first", "video"])
def test_temporal_attention_agrees_with_numpy(span):
    layer = emu_video.TemporalTransformer(SMALL, emu_video.Span(span))
    x = np.random.default_rng(0).standard_normal((2, K, 2, 3, 16))
    azimuths = emu_video.frame_azimuths(K)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(x.shape))["params"]
    params = random_like(shapes)
    output = jax.jit(layer.apply)({"params": params}, jnp.asarray(x, jnp.float32))
    for ours, video in zip(output, x, strict=True):
        expected = numpy_temporal_transformer(flatten(params), video, azimuths, span, SMALL.head_dim)
        assert np.abs(expected - video).max() > 0.1
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_attention_in_chunks_is_attention():
    rng = np.random.default_rng(0)
    q, k, v, weights = jnp.asarray(rng.standard_normal((4, 2, 12, 3, 8)), jnp.float32)

    def attend(chunk, *qkv):
        return (attention.attend(*qkv, None, chunk) * weights).sum()

    for expected, found in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(partial(attend, 0), (0, 1, 2)))(q, k, v)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(partial(attend, 4), (0, 1, 2)))(q, k, v)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    scores = np.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(8)
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = np.einsum("bhqs,bshd->bqhd", probabilities, v)
    np.testing.assert_allclose(attention.attend(q, k, v, None, 4), expected, atol=1e-5)
    with pytest.raises(UserError, match="query_chunk"):
        dataclasses.replace(SMALL, query_chunk=3)


def test_frames_are_told_their_azimuth():
    features = emu_video.frame_azimuths(16)
    np.testing.assert_allclose(features[4, :2], np.cos([np.pi / 2, np.pi]), atol=1e-6)
    np.testing.assert_allclose(features[4, 4:6], np.sin([np.pi / 2, np.pi]), atol=1e-6)
    np.testing.assert_allclose(emu_video.frame_azimuths(4), features[::4], atol=1e-6)


# ---- The paper's size, and the contract ----


@pytest.fixture(scope="module")
def paper_size():
    return flatten(jax.eval_shape(emu_video.Model().init, jax.random.key(0)))


def test_the_paper_sized_network(paper_size):
    """Emu Video has 2.7B spatial and 1.7B temporal parameters; its tables leave some widths open."""
    counts = {path: math.prod(leaf.shape) for path, leaf in paper_size.items()}
    temporal = sum(count for path, count in counts.items() if emu_video.Model.temporal_pattern in path)
    spatial = sum(counts.values()) - temporal
    print(f"paper size: {spatial / 1e9:.3f}B spatial, {temporal / 1e9:.3f}B temporal")
    assert paper_size["conv_in/kernel"].shape == (3, 3, 17, 384)
    assert paper_size["conv_out/kernel"].shape == (3, 3, 384, 8)
    attention = "down_blocks_0/attentions_0"
    assert paper_size[f"{attention}/transformer_blocks_0/attn2/to_k/kernel"].shape == (768, 384)
    assert paper_size[f"{attention}/transformer_blocks_1/attn2/to_k/kernel"].shape == (2048, 384)
    assert not any(path.startswith("down_blocks_3/attentions") for path in paper_size)


def test_every_spatial_layer_has_its_temporal_one(paper_size):
    """A convolution after each 3x3 convolution, an attention after each attention."""
    convolutions = {
        path.removesuffix("/kernel")
        for path, leaf in paper_size.items()
        if leaf.ndim == 4 and leaf.shape[:2] == (3, 3)
    }
    names = {path.rsplit("/", 1)[0] for path in paper_size}
    assert len(convolutions) > 40
    assert all(f"{name}_temporal" in names for name in convolutions)
    layers = {"/".join(path.split("/")[:2]) for path in paper_size}
    attentions = {name for name in layers if "/attentions_" in name}
    assert len(attentions) > 20
    assert all(name.replace("/attentions", "/temporal_attentions") in layers for name in attentions)


def test_partition_rules_divide_every_big_matrix(paper_size):
    """The first rule found gives logical axes for a parameter's last two; what no rule names is small."""

    def axes(path):
        return next((axes for pattern, axes in layers.PARTITION_RULES if re.search(pattern, path)), None)

    attention = "down_blocks_0/attentions_0"
    assert axes(f"{attention}/transformer_blocks_0/ff/net_0/proj/kernel") == ("embed", "mlp")
    assert axes(f"{attention}/transformer_blocks_0/ff/net_2/kernel") == ("mlp", "embed")
    assert axes("down_blocks_1/resnets_0/conv1_temporal/kernel") == ("embed", "mlp")
    assert axes(f"{attention}/norm/scale") is None
    unnamed = sum(math.prod(leaf.shape) for path, leaf in paper_size.items() if axes(path) is None)
    assert unnamed < 1e-3 * sum(math.prod(leaf.shape) for leaf in paper_size.values())


def test_models_from_lists_are_equal_and_hashable():
    """Configs may hold lists, and a model is a static argument of jit."""
    kwargs = dict(latent_shape=[4, 4, 3], channel_mult=[1, 2], text_dims=[8])
    first, second = (backbones.build("emu_video", kwargs) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != backbones.build("emu_video", kwargs | {"head_dim": 32})


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("emu_vidio", {}, "no 'emu_vidio'; did you mean 'emu_video'"),
        ("no_such_package.model", {}, "no module"),
        ("json", {}, "no 'json'; there is"),
        ("json.decoder", {}, "has no Model"),
        ("emu_video", {"width": 3}, "width"),
    ],
)
def test_unfit_backbones_are_one_line(name, kwargs, words):
    with pytest.raises(UserError, match=words) as error:
        backbones.build(name, kwargs)
    assert "config.backbone" in str(error.value) and "\n" not in str(error.value)
