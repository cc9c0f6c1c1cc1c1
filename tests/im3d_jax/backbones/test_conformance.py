"""The contract's checks find what is wrong with a network, and only that."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import backbones, main
from im3d_jax.backbones import conformance
from im3d_jax.conditions.conditioning import Conditioning

pytestmark = pytest.mark.slow

SHAPE = (4, 4, 2)


class Net(nn.Module):
    """A convolution and a mixing of views, told everything that a condition holds."""

    dtype = "float32"

    @nn.compact
    def __call__(self, noisy, timestep, given):
        image = given.image * given.image_mask[:, None, None, None]
        told = nn.Dense(2, name="text")(given.text[0].mean(1)) + jnp.sin(timestep)[:, None]
        x = nn.Conv(2, (3, 3), name="conv")(noisy) + (image + told[:, None, None])[:, None]
        mix = nn.Dense(2, kernel_init=nn.initializers.zeros, name="temporal")
        return x + mix(jnp.roll(x, 1, axis=1))


class Model:
    """Keeps the contract; the tests break one rule of it each."""

    latent_shape, prediction_type, num_views, traceable = SHAPE, "v", None, True
    temporal_pattern, partition_rules = "temporal", (("conv/kernel", ("embed", "mlp")),)

    def init(self, key):
        return Net().init(key, jnp.zeros((1, 2, *SHAPE)), jnp.zeros(1), self.empty_conditioning(1))["params"]

    def apply(self, params, noisy, timestep, given):
        return Net().apply({"params": params}, noisy, timestep, given)

    def empty_conditioning(self, batch):
        text, mask = (jnp.zeros((batch, 3, 5)),), (jnp.ones((batch, 3)),)
        return Conditioning(jnp.zeros((batch, *SHAPE)), jnp.zeros(batch), text, mask)


def results(model, trainable=".*"):
    return {result.check: result.outcome for result in conformance.check(model, trainable)}


def names(found, outcome):
    return {name for name, each in found.items() if each == outcome}


# ---- A variant of every backbone, with each kind of layer (torch_hosted: in its own tests) ----

SHALLOW = dict(latent_shape=(4, 4, 4), layers_per_block=0)
EMU = dict(
    latent_shape=(4, 4, 4),
    model_channels=64,  # groups of norms need two channels, or they take the noise level out again
    channel_mult=(1,),
    num_res_blocks=(0,),
    attention_levels=(0,),
    num_transformer_layers=1,
    head_dim=32,
    text_dims=(8,),
)
TINY = dict(
    temporal_span=("video",),
    closed_orbit=True,
    clean_first_view=True,
    image_in_every_view=True,
    copy_gate=True,
    vocabulary=9,
    prediction_type="x0",
)
ORBIT = SHALLOW | dict(block_out_channels=(64,), num_attention_heads=(2,), input_view="last")
SHIPPED = {
    "emu_video with the arguments of the tiny model": ("emu_video", EMU | TINY),
    "sv3d_p": ("svd", ORBIT | dict(vector="sv3d_p", orbit_direction=-1)),
    "unet3d as I2VGen-XL": ("unet3d", SHALLOW | dict(block_out_channels=(32,), image="i2vgen")),
}
"""Others agree with diffusers in their own tests; `im3d check-backbone --config=FILE` checks any of them."""


@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize("case", SHIPPED)
def test_shipped_backbones_keep_the_contract(case):
    name, kwargs = SHIPPED[case]
    model = backbones.build(name, backbones.small_kwargs(name) | kwargs)
    found = results(model, model.temporal_pattern)
    assert names(found, "failed") == set()
    # SV3D takes no text, and is told its cameras.
    without = {"text matters", "starts as separate images"} if name == "svd" else set()
    assert names(found, "skipped") - {"sharded equals unsharded"} == without


# ---- A network without temporal layers ----


def test_a_network_all_of_whose_layers_see_every_frame_is_not_asked_for_temporal_ones():
    """Its parameters are not all temporal, as the empty pattern would say, and none is named as missing."""
    model = broken(temporal_pattern="")
    found = {each.check: each for each in conformance.check(model, "text|conv")}
    for check in (
        "temporal pattern matches",
        "starts as separate images",
        "gradients reach temporal layers",
    ):
        assert found[check].outcome == "skipped"
        assert found[check].detail == "it has no temporal layers: temporal_pattern is ''"
    assert not [each for each in found.values() if each.outcome == "failed"]
    refused = {each.check: each for each in conformance.check(model, "motion")}["config trains what there is"]
    assert refused.outcome == "failed" and "has no temporal layers: train a LoRA of it" in refused.detail


# ---- Each check can fail ----


def test_a_network_that_keeps_the_contract_passes():
    found = results(Model(), "temporal")
    assert names(found, "failed") == set()
    # No public ancestor; more devices only where the test run has them.
    assert names(found, "skipped") - {"sharded equals unsharded"} == {"checkpoints go there and back"}


def broken(**changes):
    return type("Broken", (Model,), changes)()


def apply_with(change):
    """`apply` whose inputs or prediction `change` spoils."""

    def apply(self, params, noisy, timestep, given):
        return change(lambda *inputs: Model.apply(self, *inputs), params, noisy, timestep, given)

    return apply


BROKEN = {
    "members are those of the contract": dict(num_views=0),
    "prediction type is known": dict(prediction_type="velocity"),
    "model is hashable": dict(__eq__=lambda self, other: True),
    "temporal pattern matches": dict(temporal_pattern="motion"),
    "partition rules match": dict(partition_rules=(("attention", ("embed",)),)),
    "prediction has the views shape": dict(
        apply=apply_with(lambda net, *inputs: net(*inputs).astype(jnp.bfloat16))
    ),
    "same inputs same prediction": dict(
        traceable=False,
        apply=apply_with(
            lambda net, p, x, *rest: net(p, x, *rest) + jnp.float32(np.random.default_rng().normal())
        ),
    ),
    "assets do not see each other": dict(
        apply=apply_with(lambda net, p, x, *rest: net(p, x - x.mean(0), *rest))
    ),
    "noise level matters": dict(apply=apply_with(lambda net, p, x, t, given: net(p, x, 0 * t, given))),
    "image matters": dict(
        apply=apply_with(lambda net, p, x, t, given: net(p, x, t, given._replace(image=0 * given.image)))
    ),
    "a dropped image is not seen": dict(
        apply=apply_with(
            lambda net, p, x, t, given: net(p, x, t, given._replace(image_mask=jnp.ones_like(t)))
        )
    ),
    "text matters": dict(
        apply=apply_with(lambda net, p, x, t, given: net(p, x, t, given._replace(text=(0 * given.text[0],))))
    ),
    "jit changes nothing": dict(
        apply=apply_with(
            lambda net, p, x, *rest: net(p, x, *rest) + (1.0 if isinstance(x, jax.core.Tracer) else 0.0)
        )
    ),
    "starts as separate images": dict(
        apply=apply_with(lambda net, p, x, *rest: net(p, x - x.mean(1, keepdims=True), *rest))
    ),
    "gradients reach temporal layers": dict(
        apply=apply_with(
            lambda net, p, *rest: net({**p, "temporal": jax.lax.stop_gradient(p["temporal"])}, *rest)
        )
    ),
    "weights files go there and back": dict(
        renew=lambda self, tensors: {name: 2 * tensor for name, tensor in tensors.items()}
    ),
    "checkpoints go there and back": dict(
        to_pretrained=lambda self, params: {"w": np.asarray(params["conv"]["kernel"])},
        from_pretrained=lambda self, path, params: params,
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule):
    assert results(broken(**BROKEN[rule]))[rule] == "failed"


@pytest.mark.parametrize("member", ["apply", "traceable", "empty_conditioning"])
def test_a_missing_member_is_named(member):
    whole = {name: value for name, value in vars(Model).items() if name != member and name[:2] != "__"}
    first = conformance.check(type("Lacking", (), whole)(), ".*")[0]
    assert first.outcome == "failed" and first.detail == f"it lacks {member}"


def test_a_config_that_trains_nothing_is_found():
    assert results(Model(), "adapters")["config trains what there is"] == "failed"


def test_errors_inside_a_model_are_failures_with_their_reason():
    def apply(self, *inputs):
        raise ZeroDivisionError("the network divides by zero\nand more")

    found = {each.check: each.detail for each in conformance.check(broken(apply=apply), ".*")}
    assert found["prediction has the views shape"] == "ZeroDivisionError: the network divides by zero"


def test_every_check_is_seen_to_fail_in_these_tests():
    checks = {run.__name__.replace("_", " ") for run in conformance.CHECKS}
    assert checks - BROKEN.keys() == {"config trains what there is", "sharded equals unsharded"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_net"], "no 'no_such_net'; there is emu_video, svd, unet3d, wan, torch_hosted"),
        ([], "either a backbone's name or --config"),
        (["emu_video", "--config=configs/tiny.py"], "either a backbone's name or --config"),
        (["json"], "no 'json'"),
        (["json.decoder"], "json.decoder has no Model"),
    ],
)
def test_what_cannot_be_checked_is_one_line(arguments, message, capsys):
    assert main.run(["check-backbone", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
