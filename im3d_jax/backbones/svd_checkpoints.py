"""SVD's and SV3D's public weights <-> the parameters of `svd`.

Two layouts of the same tensors: diffusers' UNetSpatioTemporalConditionModel, whose modules ours mirror, and
Stability's own files (sv3d_u.safetensors, svd_xt.safetensors), which number the layers through and hold the
autoencoder and the image encoder too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from im3d_jax import pretrained, public_tensors
from im3d_jax.backbones import Params
from im3d_jax.pretrained import Source, SourceOf

FAMILY = "UNetSpatioTemporalConditionModel"

STABILITY_PREFIX = "model.diffusion_model."
LAYER = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
"""A layer's place in diffusers' layout: way, block, kind, number."""

# diffusers' names within a layer -> Stability's.
RENAMED = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"\.spatial_res_block\.", "."),
    (r"\.temporal_res_block\.", ".time_stack."),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
    (r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op."),  # a downsampler's convolution
)
RENAMED_IN_ATTENTION = (
    (r"\.temporal_transformer_blocks\.", ".time_stack."),
    (r"\.time_pos_embed\.linear_1\.", ".time_pos_embed.0."),
    (r"\.time_pos_embed\.linear_2\.", ".time_pos_embed.2."),
)


class Layout(NamedTuple):
    """What says how layers are numbered: levels, residual blocks of each, and the levels with attention."""

    num_levels: int
    layers_per_block: int
    attention_levels: tuple[int, ...]


def from_pretrained(
    path: str | Path, params: Params, layout: Layout, num_heads: Sequence[int], averaged: bool = False
) -> Params:
    """The parameters of a public checkpoint, float32.

    Args:
        num_heads: attention heads of each level.
        path: a .safetensors file or diffusers directory in diffusers' layout, or a file in Stability's, whole
            or of the denoiser alone.
        params: tree of the parameters' shapes.
        averaged: see `public_tensors.read`.

    Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in the
    directory's config.json that the model does not have.
    """
    pretrained.check_config(path, _settings(layout, num_heads))
    tensors = public_tensors.read(path, averaged=averaged)
    if any(name.startswith("input_blocks.") for name in tensors):
        return pretrained.to_params(tensors, params, _stability_source(layout), f"{path} (Stability's SVD)")
    return pretrained.to_params(tensors, params, _diffusers_source, f"{path} ({FAMILY})")


def to_pretrained(params: Params) -> dict[str, np.ndarray]:
    """The parameters as a UNetSpatioTemporalConditionModel's tensors."""
    return pretrained.to_tensors(params, _diffusers_source)


def to_stability(params: Params, layout: Layout) -> dict[str, np.ndarray]:
    """The parameters as Stability's tensors, with the prefix that they have in its files."""
    tensors = pretrained.to_tensors(params, _stability_source(layout))
    return {STABILITY_PREFIX + name: tensor for name, tensor in tensors.items()}


def public_names(layout: Layout) -> dict[str, SourceOf]:
    """See `backbones.NamedBackbone`."""
    return {"unet": _diffusers_source, "diffusion_model": _stability_source(layout)}


def stability_name(layout: Layout, name: str) -> str:
    """The name that a tensor of diffusers' has in Stability's layout, without the prefix.

    Stability numbers the layers of all levels through. A layer is a list: residual block, attention if the
    level has it, and at the end of a level on the way up the convolution after upsampling.
    """
    found = LAYER.match(name)
    renamed: tuple[tuple[str, str], ...] = RENAMED
    if found:
        way, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
        name = _layer(layout, way, block, kind, layer) + name[found.end() :]
        renamed = RENAMED_IN_ATTENTION if kind == "attentions" else RENAMED
    for theirs, stability in renamed:
        name = re.sub(theirs, stability, name)
    return name


def _layer(layout: Layout, way: str, block: int, kind: str, layer: int) -> str:
    layers, part = layout.layers_per_block + 1, int(kind == "attentions")
    if way == "mid":
        return f"middle_block.{2 * layer + part}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0"
    if way == "down":
        return f"input_blocks.{1 + block * layers + layer}.{part}"
    if kind == "upsamplers":
        level = layout.num_levels - 1 - block
        return f"output_blocks.{block * layers + layers - 1}.{1 + (level in layout.attention_levels)}"
    return f"output_blocks.{block * layers + layer}.{part}"


def _diffusers_source(path: str) -> Source:
    return Source(pretrained.torch_name(path))


def _stability_source(layout: Layout) -> SourceOf:
    return lambda path: Source(stability_name(layout, _diffusers_source(path).name))


def _settings(layout: Layout, num_heads: Sequence[int]) -> dict[str, object]:
    """What the model is in words of diffusers' config.json, where shapes do not show it."""
    levels = range(layout.num_levels)
    down = ["CrossAttnDown" if level in layout.attention_levels else "Down" for level in levels]
    return {
        "_class_name": FAMILY,
        "num_attention_heads": list(num_heads),
        "down_block_types": [f"{kind}BlockSpatioTemporal" for kind in down],
        "transformer_layers_per_block": 1,
    }
