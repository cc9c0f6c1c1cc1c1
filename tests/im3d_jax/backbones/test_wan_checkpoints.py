"""Wan's public files in both layouts, whole and in shards; two experts; and what is no such file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import save_file

from im3d_jax import sharding
from im3d_jax.backbones import wan, wan_checkpoints, wan_network, wan_sizes
from recon_torch import hosting
from recon_torch.errors import UserError
from recon_torch.settings import plain

hosting.declare()
from diffusers import WanTransformer3DModel  # noqa: E402  (imports torchvision)

SPEC = wan_sizes.SMALL["i2v"]

# Names in Wan's own files, one or more of each kind of layer.
WANS = [
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "text_embedding.2.bias",
    "time_embedding.0.bias",
    "time_embedding.2.weight",
    "time_projection.1.weight",
    "img_emb.proj.0.bias",
    "img_emb.proj.1.weight",
    "img_emb.proj.3.bias",
    "img_emb.proj.4.weight",
    "blocks.0.modulation",
    "blocks.1.self_attn.q.weight",
    "blocks.0.self_attn.k.bias",
    "blocks.0.self_attn.v.weight",
    "blocks.0.self_attn.o.bias",
    "blocks.0.self_attn.norm_q.weight",
    "blocks.1.self_attn.norm_k.weight",
    "blocks.0.cross_attn.q.weight",
    "blocks.0.cross_attn.o.weight",
    "blocks.0.cross_attn.k_img.weight",
    "blocks.0.cross_attn.v_img.bias",
    "blocks.0.cross_attn.norm_k_img.weight",
    "blocks.0.cross_attn.norm_q.weight",
    "blocks.0.norm3.weight",
    "blocks.1.ffn.0.weight",
    "blocks.0.ffn.2.bias",
    "head.head.weight",
    "head.modulation",
]


@pytest.fixture(scope="module")
def module():
    """diffusers' small image-to-video network in bfloat16."""
    torch.manual_seed(0)
    names = "num_attention_heads attention_head_dim in_channels out_channels"
    names += " text_dim freq_dim ffn_dim num_layers image_dim"
    sizes = {name: getattr(SPEC, name) for name in names.split()}
    return WanTransformer3DModel(added_kv_proj_dim=SPEC.width, **sizes).to(torch.bfloat16)


@pytest.fixture(scope="module")
def directory(module, tmp_path_factory):
    """Its directory, in several shards."""
    path = tmp_path_factory.mktemp("wan") / "transformer"
    module.save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def params(directory):
    return wan_checkpoints.from_pretrained(directory, SPEC)


def copied(directory, tmp_path, **changes):
    """The directory with other settings in its config.json."""
    config = json.loads((directory / "config.json").read_text()) | changes
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def as_torch(tensors):
    """bfloat16 arrays as torch's tensors."""
    return {name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for name, x in tensors.items()}


def test_shards_are_read_as_they_are_stored(module, params):
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    again = as_torch(wan_checkpoints.to_pretrained(params))
    expected = module.state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


def test_sizes_are_read_from_diffusers_config(directory):
    assert wan_checkpoints.read_sizes(directory) == SPEC
    told = wan_checkpoints.read_sizes(directory, dtype="bfloat16", remat="nothing_saveable")
    assert told == dataclasses.replace(SPEC, dtype="bfloat16", remat="nothing_saveable")


def test_wans_own_layout(params, tmp_path):
    tensors = as_torch(wan_checkpoints.to_wans(params))
    assert set(WANS) <= tensors.keys()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    wans = dict(dim=SPEC.width, num_heads=SPEC.num_attention_heads, in_dim=36, out_dim=16, text_len=512)
    wans |= {name: getattr(SPEC, name) for name in ("ffn_dim", "freq_dim", "num_layers", "text_dim", "eps")}
    config = {"_class_name": "WanModel", "model_type": "i2v", **wans}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert wan_checkpoints.read_sizes(tmp_path) == dataclasses.replace(SPEC, image_dim=1280)
    (tmp_path / "config.json").unlink()  # the small one has other images than Wan's
    again = wan_checkpoints.from_pretrained(tmp_path, SPEC)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_prefix_and_unused_tensors_are_left_out_and_said(params, tmp_path, capsys):
    tensors = as_torch(wan_checkpoints.to_wans(params))
    tensors["blocks.0.cross_attn.norm_q_img.weight"] = torch.zeros(4)
    path = tmp_path / "wan.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    again = wan_checkpoints.from_pretrained(path, SPEC)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (
        "left out 1 tensors that the network does not use, such as blocks.0.cross_" in capsys.readouterr().err
    )


def test_float32_becomes_16_bits_where_diffusers_has_16_bits(module, params, tmp_path):
    save_file(
        {name: tensor.float() for name, tensor in module.state_dict().items()}, tmp_path / "a.safetensors"
    )
    cast = wan_checkpoints.from_pretrained(tmp_path / "a.safetensors", SPEC, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, cast, params)
    wide = {
        path for path, leaf in traverse_util.flatten_dict(cast, sep="/").items() if leaf.dtype == jnp.float32
    }
    kept = WanTransformer3DModel._keep_in_fp32_modules  # noqa: SLF001 - it has no other name
    names = [name.replace("norm_out", "") for name in module.state_dict()]
    theirs = {name for name in names if any(part in name.split(".") for part in kept)}
    ours = {wan_checkpoints.diffusers_source(path).name for path in wide}
    assert theirs <= ours
    assert all("norm" in name for name in ours - theirs)  # of queries and keys, which are vectors


def test_divided_over_a_mesh(directory, params):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    divided = wan_checkpoints.from_pretrained(directory, SPEC, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, divided, params)
    kernel = divided["blocks_0"]["attn1"]["to_q"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    out = divided["blocks_0"]["attn1"]["to_out_0"]["kernel"]
    assert out.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert kernel.addressable_shards[0].data.shape == (SPEC.width // 2, SPEC.width // 2)


# ---- What does not belong ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"_class_name": "WanVACETransformer3DModel"},
            "holds WanVACETransformer3DModel, not Wan's transformer",
        ),
        ({"qk_norm": "layer"}, "has qk_norm 'layer', which wan does not build"),
        ({"in_channels": 48}, "has in_channels 48, the config asks for 36; make them agree"),
        ({"num_layers": 0}, "num_layers is 0; give a whole number from 1"),
    ],
)
def test_the_directory_of_another_model_is_refused(directory, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        wan_checkpoints.from_pretrained(copied(directory, tmp_path, **changes), SPEC)


def test_published_sizes_are_named(tmp_path):
    said = wan_sizes.PUBLISHED["t2v_1.3b"]
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 12,
        "ffn_dim": 8960,
        "num_layers": 30,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert wan_checkpoints.read_sizes(tmp_path) == said
    with pytest.raises(
        UserError, match=r"num_attention_heads 12 \(the sizes 't2v_1.3b'\), the config asks for 24"
    ):
        wan_checkpoints.from_pretrained(tmp_path, wan_sizes.PUBLISHED["ti2v_5b"])


def test_no_config(tmp_path):
    with pytest.raises(
        UserError, match="no config.json at .*; give its directory, or name sizes: t2v_1.3b, "
    ):
        wan_checkpoints.read_sizes(tmp_path)


def test_a_missing_shard_is_named(directory, tmp_path):
    path = copied(directory, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks shard {shard.name} of the .*; fetch it as well"):
        wan_checkpoints.from_pretrained(path, SPEC)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("blocks.0.norm2.bias", None, r"lacks blocks\.0\.norm2\.bias \(1 such\)"),
        ("blocks.9.norm2.bias", torch.zeros(64), r"has an unknown tensor blocks\.9\.norm2\.bias"),
        (
            "proj_out.bias",
            torch.zeros(3),
            r"proj_out\.bias is \(3,\); the config makes proj_out/bias \(64,\)",
        ),
        ("proj_out.bias", torch.full((64,), torch.nan), r"proj_out\.bias holds NaN or infinity as float32"),
        ("proj_out.bias", torch.zeros(64, dtype=torch.int8), r"proj_out\.bias is of type int8, which is not"),
    ],
)
def test_every_tensor_is_accounted_for(module, tmp_path, name, tensor, message):
    tensors = dict(module.state_dict()) | {name: tensor}
    path = tmp_path / "wan.safetensors"
    save_file({each: value for each, value in tensors.items() if value is not None}, path)
    with pytest.raises(UserError, match=message):
        wan_checkpoints.from_pretrained(path, SPEC)


# ---- Two experts ----


@pytest.fixture
def pipeline(directory, tmp_path):
    """A pipeline with two experts, of which the second is doubled at its end."""
    for name in wan_checkpoints.DIRECTORIES[0]:
        (tmp_path / name).mkdir()
        copied(directory, tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.8}))
    return tmp_path


def test_a_model_with_experts_reads_both(pipeline, params):
    experts = wan_checkpoints.read_experts(pipeline, SPEC)
    assert experts.boundary == 0.8
    for each in experts[:2]:
        jax.tree.map(np.testing.assert_array_equal, each, params)
    model = model_of(experts=True, boundary=0.8)
    for each in model.read_stored(pipeline).values():
        jax.tree.map(np.testing.assert_array_equal, each, params)
    with pytest.raises(UserError, match="has its boundary at 0.8, config.backbone.kwargs.boundary is 0.9"):
        model_of(experts=True).read_stored(pipeline)
    with pytest.raises(UserError, match="two experts are two checkpoints; write each with"):
        model.to_pretrained({})


def test_a_model_names_its_parameters_in_both_layouts(module, params):
    model, tensors = model_of(), dict(module.state_dict())
    assert model.to_pretrained(params).keys() == tensors.keys()
    diffusers, wans = model.public_names().values()
    assert {diffusers(path).name for path in traverse_util.flatten_dict(params, sep="/")} == tensors.keys()
    assert wans("blocks_1/attn1/to_q/kernel").name == "blocks.1.self_attn.q.weight"


def model_of(**changed):
    kind = "channels" if SPEC.in_channels != SPEC.out_channels else "clean"
    return wan.Model(**plain(SPEC), latent_shape=(4, 4, SPEC.out_channels), first_frame=kind, **changed)


def test_boundaries_of_wans_own_directories(pipeline):
    (pipeline / "model_index.json").unlink()
    for place, name in zip(*wan_checkpoints.DIRECTORIES, strict=True):
        (pipeline / place).rename(pipeline / name)
    assert wan_checkpoints.read_experts(pipeline, SPEC).boundary == 0.9


def test_one_expert_alone_is_refused(pipeline):
    (pipeline / "transformer_2").rename(pipeline / "other")
    with pytest.raises(UserError, match="has transformer/ and lacks transformer_2/; fetch both experts"):
        wan_checkpoints.experts_at(pipeline)
    with pytest.raises(UserError, match="has neither transformer/ and transformer_2/ nor high_noise_model/"):
        wan_checkpoints.experts_at(pipeline / "other")


def test_what_was_read_computes_what_diffusers_does(module, params):
    rng = np.random.default_rng(0)
    latents, text, image = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((1, 1, 4, 4, 36), (1, 512, 24), (1, 3, 20))
    )
    ours = jax.jit(wan_network.Transformer(SPEC).apply)(
        {"params": params}, latents, jnp.array([500.0]), text, image
    )
    wide = WanTransformer3DModel.from_config(module.config).eval()
    wide.load_state_dict({name: tensor.float() for name, tensor in module.state_dict().items()})
    with torch.no_grad():
        (theirs,) = wide(
            torch.from_numpy(latents).movedim(-1, 1),
            torch.tensor([500.0]),
            torch.from_numpy(text),
            torch.from_numpy(image),
            return_dict=False,
        )
    np.testing.assert_allclose(ours, theirs.movedim(1, -1), atol=1e-4 * theirs.abs().max().item())
