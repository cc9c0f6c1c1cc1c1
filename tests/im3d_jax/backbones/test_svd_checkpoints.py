"""SVD's and SV3D's public files, in both layouts, there and back; and what is no such file."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import save_file

from im3d_jax.backbones import svd, svd_checkpoints
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

# Names and shapes in Stability's files of SVD-XT, one or more of each kind of layer.
STABILITY = {
    "time_embed.0.weight": (1280, 320),
    "label_emb.0.0.weight": (1280, 768),
    "label_emb.0.2.bias": (1280,),
    "input_blocks.0.0.weight": (320, 8, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (320,),
    "input_blocks.1.0.time_stack.in_layers.2.weight": (320, 320, 3, 1, 1),
    "input_blocks.1.0.time_mixer.mix_factor": (1,),
    "input_blocks.1.1.proj_in.weight": (320, 320),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "input_blocks.1.1.time_pos_embed.2.weight": (320, 1280),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
    "middle_block.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "middle_block.1.time_mixer.mix_factor": (1,),
    "middle_block.2.time_stack.out_layers.0.bias": (1280,),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.3.1.time_stack.0.ff_in.net.0.proj.weight": (10240, 1280),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.11.1.time_stack.0.attn1.to_out.0.bias": (320,),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
}


@pytest.fixture(scope="module")
def theirs(diffusers_svd):
    return diffusers_svd()


@pytest.fixture(scope="module")
def model():
    return svd.Model(**svd.SMALL)


@pytest.fixture(scope="module")
def params(model, theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("svd")
    theirs.save_pretrained(directory)
    return model.from_pretrained(directory, jax.eval_shape(model.init, jax.random.key(0)))


def weights_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_full_size_has_diffusers_sizes_and_stabilitys_names():
    from diffusers import UNetSpatioTemporalConditionModel

    model = svd.Model()
    layout = svd_checkpoints.Layout(num_levels=4, layers_per_block=2, attention_levels=(0, 1, 2))
    parameters = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    with torch.device("meta"):
        theirs = UNetSpatioTemporalConditionModel().state_dict()
    assert len(parameters) == len(theirs)
    assert sum(x.size for x in parameters) == sum(x.numel() for x in theirs.values())
    names = {svd_checkpoints.stability_name(layout, name): tuple(x.shape) for name, x in theirs.items()}
    assert len(names) == len(theirs)
    assert STABILITY.items() <= names.items()


def test_temporal_pattern_covers_what_fine_tuning_trains(model, params):
    flat = traverse_util.flatten_dict(params, sep="/")
    found = {path for path in flat if re.search(model.temporal_pattern, path)}
    assert found == {path for path in flat if re.search("temporal|time_mixer|time_pos", path)}
    assert not any(re.search("spatial|/transformer_blocks|^conv|_embedding", path) for path in found)


def test_to_diffusers_and_back_gives_every_tensor(model, params, theirs):
    tensors = model.to_pretrained(params)
    expected = weights_of(theirs)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_stabilitys_layout_with_and_without_the_other_models(model, params, tmp_path, prefix):
    tensors = {
        prefix + name.removeprefix("model.diffusion_model."): tensor
        for name, tensor in model.to_stability(params).items()
    }
    if prefix:
        tensors["first_stage_model.decoder.conv_in.weight"] = np.zeros((2, 2), np.float32)
        tensors["conditioner.embedders.0.open_clip.model.logit_scale"] = np.zeros((), np.float32)
    path = tmp_path / "sv3d_u.safetensors"
    save_file(tensors, path)
    again = model.from_pretrained(path, jax.eval_shape(model.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def broken(tensors, kind):
    """A Stability file's tensors, spoilt."""
    name = "model.diffusion_model.middle_block.1.time_mixer.mix_factor"
    if kind == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != name}
    if kind == "extra":
        return tensors | {"model.diffusion_model.input_blocks.99.0.weight": np.zeros(1, np.float32)}
    return tensors | {name: np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"lacks middle_block\.1\.time_mixer\.mix_factor \(1 such\)"),
        ("extra", r"has an unknown tensor input_blocks\.99\.0\.weight"),
        ("shape", r"middle_block\.1\.time_mixer\.mix_factor is \(2,\)"),
    ],
)
def test_every_tensor_is_accounted_for(model, params, tmp_path, kind, message):
    path = tmp_path / "svd.safetensors"
    save_file(broken(model.to_stability(params), kind), path)
    with pytest.raises(UserError, match=message):
        model.from_pretrained(path, params)


def test_another_familys_checkpoint_is_refused(model, params, tmp_path):
    save_file({"conv_in.weight": np.zeros((32, 4, 3, 3), np.float32)}, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="lacks .*another family or size"):
        model.from_pretrained(tmp_path / "unet.safetensors", params)


def test_a_truncated_file_is_refused(model, params, tmp_path):
    path = tmp_path / "svd.safetensors"
    save_file(model.to_pretrained(params), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="svd.safetensors is cut off"):
        model.from_pretrained(path, params)


def test_settings_that_shapes_do_not_show_are_compared(model, params, theirs, tmp_path):
    config = json.loads(theirs.to_json_string()) | {"num_attention_heads": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.to_pretrained(params), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"num_attention_heads \[4, 4\], config.backbone makes it \[2, 4\]"):
        model.from_pretrained(tmp_path, params)


def test_diffusers_own_directory_is_read(model, params, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    again = model.from_pretrained(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
