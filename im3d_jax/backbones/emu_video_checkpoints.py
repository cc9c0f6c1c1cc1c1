"""Stable Diffusion's UNet2DConditionModel <-> the spatial layers of `emu_video`; older weights files of ours.

Emu Video (Girdhar et al. 2023) starts from a text-to-image model of its authors, which is not public; the
nearest public ones are Stable Diffusion 1.x (a `Model` with `num_heads=8`) and 2.x (`head_dim=64`). Temporal
layers and the image's channels of the first convolution have no place in their layout: going there leaves
exactly the text-to-image half of the model, K = 1 without an image, and coming back keeps the rest. Both
halves together are in the weights file that `im3d train` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array

from im3d_jax import pretrained, public_tensors
from im3d_jax.backbones import Params
from im3d_jax.pretrained import Source, SourceOf

FAMILY = "UNet2DConditionModel"

OLD_NAMES = (
    (r"^conv_in/conv/", "conv_in/"),
    (r"^norm_out/", "conv_norm_out/"),
    (r"^time_embedding_(\d)/", r"time_embedding/linear_\1/"),
    (r"^middle_(\d)_res/", r"mid_block/resnets_\1/"),
    (r"^middle_0_(temporal_)?attention/", r"mid_block/\1attentions_0/"),
    (r"^(down|up)_(\d+)_(\d+)_res/", r"\1_blocks_\2/resnets_\3/"),
    (r"^(down|up)_(\d+)_(\d+)_(temporal_)?attention/", r"\1_blocks_\2/\4attentions_\3/"),
    (r"^(down|up)_(\d+)_sample(_temporal)?/", r"\1_blocks_\2/\1samplers_0/conv\3/"),
    (r"/emb/", "/time_emb_proj/"),
    (r"/shortcut/", "/conv_shortcut/"),
    (r"/norm/(scale|bias)$", r"/\1"),
    (r"/norm(\d)_(\d+)/", r"/transformer_blocks_\2/norm\1/"),
    (r"/self_(\d+)/", r"/transformer_blocks_\1/attn1/"),
    (r"/cross_(\d+)/", r"/transformer_blocks_\1/attn2/"),
    (r"/to_out/", "/to_out_0/"),
    (r"/ff_(\d+)/ff_in/", r"/transformer_blocks_\1/ff/net_0/proj/"),
    (r"/ff_(\d+)/ff_out/", r"/transformer_blocks_\1/ff/net_2/"),
)
"""Names in weights files of before the layers had diffusers' names -> today's, applied in this order."""


def from_pretrained(
    path: str | Path,
    params: Params,
    latent_channels: int,
    num_heads: Sequence[int],
    convolves: bool,
    averaged: bool = False,
) -> Params:
    """`params` with the spatial layers of a UNet2DConditionModel, float32.

    Args:
        path: a .safetensors file or a diffusers directory.
        params: its temporal layers and the image's channels stay: the identity and zero after `Model.init`.
        latent_channels: of the noisy latent, which the first convolution has before those of the image.
        num_heads: attention heads of each level.
        convolves: see `to_pretrained`.
        averaged: see `public_tensors.read`.

    Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in the
    directory's config.json that the model does not have.
    """
    # `attention_head_dim` is diffusers' name for the number of heads of each level.
    settings = {"_class_name": FAMILY, "attention_head_dim": list(num_heads), "norm_num_groups": 32}
    pretrained.check_config(path, settings)
    spatial, what = _text_to_image(params, latent_channels), f"{path} ({FAMILY})"
    tensors = public_tensors.read(path, averaged=averaged)
    loaded = pretrained.to_params(tensors, spatial, source_of(convolves), what)
    image = params["conv_in"]["kernel"][:, :, latent_channels:]
    return _with_input_kernel(loaded, np.concatenate([loaded["conv_in"]["kernel"], image], 2))


def to_pretrained(params: Params, latent_channels: int, convolves: bool) -> dict[str, np.ndarray]:
    """The spatial layers as a UNet2DConditionModel's tensors: all of them, and nothing else.

    convolves: whether the linear layers around transformers are 1x1 convolutions there, as in Stable
        Diffusion 1, or linear layers, as in Stable Diffusion 2.
    """
    return pretrained.to_tensors(_text_to_image(params, latent_channels), source_of(convolves))


def source_of(convolves: bool) -> SourceOf:
    """Where a spatial layer stands in a UNet2DConditionModel, see `to_pretrained`."""

    def source(path: str) -> Source | None:
        if "temporal" in path or path.startswith("text_encoder/"):
            return None
        convolution = convolves and re.search(r"/proj_(in|out)/kernel$", path)
        return Source(pretrained.torch_name(path), "conv1x1" if convolution else "")

    return source


def _text_to_image(params: Params, latent_channels: int) -> Params:
    """The parameters without the image's channels, which are the last ones of the first convolution."""
    return _with_input_kernel(params, params["conv_in"]["kernel"][:, :, :latent_channels])


def _with_input_kernel(params: Params, kernel: Array | np.ndarray) -> Params:
    return {**params, "conv_in": {**params["conv_in"], "kernel": kernel}}


def renew(tensors: Mapping[str, np.ndarray], num_levels: int) -> dict[str, np.ndarray]:
    """The tensors of a weights file by the names that the parameters have today; see `OLD_NAMES`."""
    if "conv_in/conv/kernel" not in tensors:
        return dict(tensors)
    renewed = {}
    for name, tensor in tensors.items():
        if not name.startswith("text_encoder/"):
            if name.endswith("/shortcut/kernel"):
                tensor = tensor[None, None]  # now a 1x1 convolution
            # The levels of the way up were counted from the highest resolution.
            name = re.sub(r"^up_(\d+)", lambda found: f"up_{num_levels - 1 - int(found[1])}", name)
            for old, new in OLD_NAMES:
                name = re.sub(old, new, name)
        renewed[name] = tensor
    return renewed
