"""Stable Diffusion's UNet2DConditionModel <-> the spatial layers of `emu_video`.

Emu Video (Girdhar et al. 2023) starts from a text-to-image model of its authors, which is not public; the
nearest public ones are Stable Diffusion 1.x (a `Model` with `num_heads=8`) and 2.x (`head_dim=64`). Temporal
layers and the image's channels of the first convolution have no place in their layout: going there leaves
exactly the text-to-image half of the model, K = 1 without an image, and coming back keeps the rest. Both
halves together are in the weights file that `im3d train` writes.
"""

from __future__ import annotations

import re

import numpy as np

from im3d_jax import pretrained
from im3d_jax.pretrained import Source

# Ours -> theirs, in this order. The wrapped layers go first, because later patterns are of whole modules.
RENAMED = (
    (r"/norm/(scale|bias)$", r"/\1"),
    (r"^conv_in/conv/", "conv_in/"),
    (r"^norm_out/", "conv_norm_out/"),
    (r"^time_embedding_(\d)/", r"time_embedding/linear_\1/"),
    (r"^middle_(\d)_res/", r"mid_block/resnets_\1/"),
    (r"^middle_0_attention/", "mid_block/attentions_0/"),
    (r"^(down|up)_(\d+)_(\d+)_res/", r"\1_blocks_\2/resnets_\3/"),
    (r"^(down|up)_(\d+)_(\d+)_attention/", r"\1_blocks_\2/attentions_\3/"),
    (r"^(down|up)_(\d+)_sample/", r"\1_blocks_\2/\1samplers_0/conv/"),
    (r"/emb/", "/time_emb_proj/"),
    (r"/shortcut/", "/conv_shortcut/"),
    (r"/norm(\d)_(\d+)/", r"/transformer_blocks_\2/norm\1/"),
    (r"/self_(\d+)/", r"/transformer_blocks_\1/attn1/"),
    (r"/cross_(\d+)/", r"/transformer_blocks_\1/attn2/"),
    (r"/to_out/", "/to_out_0/"),
    (r"/ff_(\d+)/ff_in/", r"/transformer_blocks_\1/ff/net_0/proj/"),
    (r"/ff_(\d+)/ff_out/", r"/transformer_blocks_\1/ff/net_2/"),
)


def from_pretrained(spec, path, params) -> dict:
    """`params` with the spatial layers of a UNet2DConditionModel, float32.

    Args:
        spec: the `emu_video.Model`.
        path: a .safetensors file or a diffusers directory.
        params: its temporal layers and the image's channels stay: the identity and zero after `spec.init`.

    Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in the
    directory's config.json that `spec` does not have.
    """
    settings = {
        "_class_name": "UNet2DConditionModel",
        # diffusers' name for the number of heads of each level.
        "attention_head_dim": [spec.num_heads_of(mult * spec.model_channels) for mult in spec.channel_mult],
        "norm_num_groups": 32,
    }
    pretrained.check_config(path, settings)
    tensors = pretrained.read(path)
    what = f"{path} (UNet2DConditionModel)"
    loaded = pretrained.to_params(tensors, _text_to_image(spec, params), _source_of(spec), what)
    image = params["conv_in"]["conv"]["kernel"][:, :, spec.latent_shape[-1] :]
    kernel = np.concatenate([loaded["conv_in"]["conv"]["kernel"], image], 2)
    return _with_input_kernel(loaded, kernel)


def to_pretrained(spec, params) -> dict[str, np.ndarray]:
    """The spatial layers as a UNet2DConditionModel's tensors: all of them, and nothing else."""
    return pretrained.to_tensors(_text_to_image(spec, params), _source_of(spec))


def _source_of(spec):
    """The `pretrained.SourceOf` of a model."""
    last = len(spec.channel_mult) - 1

    def source_of(path: str) -> Source | None:
        if "temporal" in path or path.startswith("text_encoder/"):
            return None
        # Their list of upward blocks starts at the lowest resolution.
        path = re.sub(r"^up_(\d+)", lambda found: f"up_{last - int(found[1])}", path)
        for ours, theirs in RENAMED:
            path = re.sub(ours, theirs, path)
        # Stable Diffusion 1 has a fixed number of heads, and 1x1 convolutions around its transformers.
        convolution = "conv_shortcut/" in path or (spec.num_heads and re.search(r"/proj_(in|out)/", path))
        layout = "conv1x1" if convolution and path.endswith("/kernel") else ""
        return Source(pretrained.torch_name(path), layout)

    return source_of


def _text_to_image(spec, params) -> dict:
    """The parameters without the image's channels, which are the last ones of the first convolution."""
    return _with_input_kernel(params, params["conv_in"]["conv"]["kernel"][:, :, : spec.latent_shape[-1]])


def _with_input_kernel(params, kernel) -> dict:
    return {**params, "conv_in": {"conv": {**params["conv_in"]["conv"], "kernel": kernel}}}
