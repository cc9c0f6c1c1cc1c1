"""Public checkpoints against PyTorch's own modules, and what is wrong with a checkpoint, by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from im3d_jax import pretrained, public_tensors
from im3d_jax.pretrained import Source
from recon_torch.errors import UserError


class Ours(nn.Module):
    """One layer of each layout, in Flax."""

    @nn.compact
    def __call__(self, x):  # [B, h, w, 3]
        x = nn.Conv(8, (3, 3), padding=1, name="convs_0")(x)
        x = nn.GroupNorm(2, name="norm1")(x)
        x = nn.Dense(4, name="proj_in")(x)
        return nn.Dense(5, name="linear_1")(x)


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = torch.nn.ModuleList([torch.nn.Conv2d(3, 8, 3, padding=1)])
        self.norm1 = torch.nn.GroupNorm(2, 8, eps=1e-6)
        self.proj_in = torch.nn.Conv2d(8, 4, 1)
        self.linear_1 = torch.nn.Linear(4, 5)

    def forward(self, x):  # [B, 3, h, w]
        x = self.proj_in(self.norm1(self.convs[0](x)))
        return self.linear_1(x.movedim(1, -1))


def source_of(path):
    return Source(pretrained.torch_name(path), "conv1x1" if path == "proj_in/kernel" else "")


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    module = Theirs()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.fixture
def file(theirs, tmp_path):
    save_file({name: x.contiguous() for name, x in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def shapes():
    return jax.eval_shape(lambda: Ours().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"])


def test_loaded_layers_compute_what_theirs_do(theirs, file):
    params = pretrained.to_params(public_tensors.read(file), shapes(), source_of, "w")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).movedim(-1, 1)).numpy()
    np.testing.assert_allclose(Ours().apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_convolution_over_frames_computes_what_theirs_does():
    kernel = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 5, 2, 2, 4)).astype(np.float32)
    tensor = pretrained.to_tensors({"conv": {"kernel": jnp.asarray(kernel)}}, source_of)["conv.weight"]
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    ours = sum(padded[:, i : i + 5] @ kernel[i] for i in range(3))
    frames = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
    theirs = torch.nn.functional.conv3d(frames, torch.from_numpy(tensor), padding=(1, 0, 0))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 4, 1), rtol=1e-4, atol=1e-5)
    back = pretrained.to_params({"conv.weight": tensor}, {"conv": {"kernel": kernel}}, source_of, "w")
    np.testing.assert_array_equal(back["conv"]["kernel"], kernel)


def test_there_and_back_is_the_checkpoint(theirs, file):
    params = pretrained.to_params(public_tensors.read(file), shapes(), source_of, "w")
    tensors = pretrained.to_tensors(params, source_of)
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, strict=True)
    original = public_tensors.read(file)
    assert tensors.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_parameters_of_ours_alone_keep_their_values(file):
    params = dict(shapes(), temporal={"kernel": np.full((3, 2, 2), 7.0)})
    only_spatial = lambda path: None if "temporal" in path else source_of(path)  # noqa: E731
    loaded = pretrained.to_params(public_tensors.read(file), params, only_spatial, "w")
    np.testing.assert_array_equal(loaded["temporal"]["kernel"], 7.0)
    assert not any("temporal" in name for name in pretrained.to_tensors(loaded, only_spatial))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("norm1.bias"), r"lacks norm1\.bias \(1 such\)"),
        (lambda t: t.update(foo=np.zeros(1)), r"unknown tensor foo \(1 such\)"),
        (lambda t: t.update({"linear_1.weight": np.zeros((5, 9))}), r"linear_1\.weight is \(5, 9\)"),
        (lambda t: t.update({"convs.0.weight": np.zeros((8, 3))}), r"convs\.0\.weight is \(8, 3\)"),
        (lambda t: t["norm1.weight"].fill(np.nan), r"norm1\.weight holds NaN"),
    ],
)
def test_a_wrong_tensor_is_named(file, change, message):
    tensors = {name: value.copy() for name, value in public_tensors.read(file).items()}
    change(tensors)
    with pytest.raises(UserError, match=message):
        pretrained.to_params(tensors, shapes(), source_of, "w")


@pytest.mark.parametrize(
    "text, message", [("{", "is not JSON"), ("[1]", "no object of settings but"), ("", "is not JSON")]
)
def test_a_wrong_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        pretrained.read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"in_channels": 3}')
    assert pretrained.read_config(tmp_path) == {"in_channels": 3}
