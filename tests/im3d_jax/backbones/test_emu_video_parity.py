"""The spatial layers against diffusers' torch modules with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from im3d_jax.backbones import emu_video, layers
from recon_torch import hosting

hosting.declare()
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402  (imports torchvision)
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402

pytestmark = pytest.mark.slow

BATCH, SIDE = 2, 4


def linear(module):
    """A Dense layer's parameters, of torch's Linear or of a convolution over single pixels."""
    weight = module.weight.detach().flatten(1)
    return {"kernel": weight.T.numpy()} | (
        {} if module.bias is None else {"bias": module.bias.detach().numpy()}
    )


def conv(module):
    return {
        "kernel": module.weight.detach().permute(2, 3, 1, 0).numpy(),
        "bias": module.bias.detach().numpy(),
    }


def norm(module):
    return {"scale": module.weight.detach().numpy(), "bias": module.bias.detach().numpy()}


def attention(module):
    return {
        "to_q": linear(module.to_q),
        "to_k": linear(module.to_k),
        "to_v": linear(module.to_v),
        "to_out_0": linear(module.to_out[0]),
    }


def randomised(module):
    """Also what initialisation leaves at zero or one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return module.eval()


def frames_first(x):
    """A torch image batch [B, c, h, w] as single-frame videos [B, 1, h, w, c]."""
    return jnp.asarray(x.permute(0, 2, 3, 1).numpy())[:, None]


def compare(ours, theirs):
    theirs = theirs.detach().permute(0, 2, 3, 1).numpy()[:, None]
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("channels, out_channels", [(32, 64), (64, 64)])
def test_residual_block(channels, out_channels):
    theirs = randomised(
        ResnetBlock2D(in_channels=channels, out_channels=out_channels, temb_channels=48, groups=32, eps=1e-5)
    )
    params = {
        "norm1": norm(theirs.norm1),
        "conv1": conv(theirs.conv1),
        "time_emb_proj": linear(theirs.time_emb_proj),
        "norm2": norm(theirs.norm2),
        "conv2": conv(theirs.conv2),
    }
    if channels != out_channels:
        params["conv_shortcut"] = conv(theirs.conv_shortcut)
    ours = layers.ResBlock(out_channels, emu_video.GROUPS, 1e-5, "float32")
    x, emb = torch.randn(BATCH, channels, SIDE, SIDE), torch.randn(BATCH, 48)
    output = jax.jit(ours.apply)({"params": params}, frames_first(x), jnp.asarray(emb.numpy())[:, None])
    compare(output, theirs(x, emb))


def test_spatial_transformer_with_masked_text():
    heads, head_dim, depth, text_dim, words = 2, 16, 2, 24, 5
    theirs = randomised(
        Transformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=heads * head_dim,
            num_layers=depth,
            cross_attention_dim=text_dim,
            use_linear_projection=True,
            norm_num_groups=32,
        )
    )
    params = {
        "norm": norm(theirs.norm),
        "proj_in": linear(theirs.proj_in),
        "proj_out": linear(theirs.proj_out),
    }
    for i, block in enumerate(theirs.transformer_blocks):
        feed_forward = {"net_0": {"proj": linear(block.ff.net[0].proj)}, "net_2": linear(block.ff.net[2])}
        params[f"transformer_blocks_{i}"] = {
            **{f"norm{n}": norm(getattr(block, f"norm{n}")) for n in (1, 2, 3)},
            "attn1": attention(block.attn1),
            "attn2": attention(block.attn2),
            "ff": feed_forward,
        }
    spec = emu_video.Model(head_dim=head_dim, num_transformer_layers=depth, text_dims=(text_dim,))
    x, text = torch.randn(BATCH, heads * head_dim, SIDE, SIDE), torch.randn(BATCH, words, text_dim)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    ours = [(jnp.asarray(text.numpy()), jnp.asarray(mask.numpy()))]
    output = jax.jit(emu_video.SpatialTransformer(spec).apply)({"params": params}, frames_first(x), ours)
    compare(output, theirs(x, encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False)[0])
