"""Wan's public weights -> the parameters of `wan_network`, bfloat16 as they are stored.

Two layouts of the same tensors: diffusers' WanTransformer3DModel, whose modules ours mirror, and Wan's own
files. Wan 2.2's A14B models are two networks of the same sizes, one for high noise and one for low.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from numpy.typing import DTypeLike

from im3d_jax import pretrained, sharding, streamed_weights
from im3d_jax.backbones import Params, wan_network
from im3d_jax.backbones.wan_sizes import PUBLISHED, Architecture
from im3d_jax.pretrained import Source
from im3d_jax.streamed_weights import Checkpoint
from recon_torch import ranges
from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_settings

FAMILY, WANS_FAMILY = "WanTransformer3DModel", "WanModel"

COMPUTED = ("dtype", "remat", "query_chunk")
"""Fields of an `Architecture` that no checkpoint says."""

# diffusers' names -> Wan's.
RENAMED = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),  # of a block: Wan numbers the one before attention to text last
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
)

# Wan's config.json -> diffusers'.
WANS_SETTINGS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    **{name: name for name in ("ffn_dim", "freq_dim", "num_layers", "text_dim", "eps", "patch_size")},
}

UNUSED = re.compile(r"\.norm_added_q\.|\.norm_q_img\.")
"""Tensors that old files hold and no version of the network uses."""

KEPT = r"norm\d?/|norm_\w+/|scale_shift_table|time_embedder"
"""Parameters that diffusers keeps in float32, where they are stored so, when it loads others in 16 bits."""

BUILT = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
"""Entries of diffusers' config.json that have no size, and the one value of each that is built here."""


# ---- Sizes ----


def read_sizes(path: str | Path, **computed: Any) -> Architecture:
    """The sizes of the transformer at `path`, a directory with a config.json of diffusers' or of Wan's.

    Args:
        computed: fields of an `Architecture` that no checkpoint says: dtype, remat, query_chunk.

    Raises UserError for the directory of another model, and for what is not built here.
    """
    config = pretrained.read_config(path)
    if not config:
        hint = f"give its directory, or name sizes: {', '.join(PUBLISHED)}"
        raise UserError(f"there is no config.json at {path}, which says the sizes of the network; {hint}")
    family = config.get("_class_name")
    if family not in (FAMILY, WANS_FAMILY):
        found = family or "a model of no name"
        raise UserError(f"{path} holds {found}, not Wan's transformer; give a {FAMILY} or a {WANS_FAMILY}")
    said = _of_diffusers(path, config) if family == FAMILY else _of_wan(path, config)
    ranges.check_arguments(Architecture, said, f"{path}: config.json")
    return Architecture(**said, **computed)


def _of_diffusers(path: str | Path, config: Mapping[str, Any]) -> dict[str, Any]:
    for name, only in BUILT.items():
        if config.get(name, only) != only:
            raise UserError(
                f"{path} has {name} {quoted(config[name])}, which wan does not build; give another"
            )
    unset = {"image_dim": 0, "pos_embed_seq_len": 0}
    wide = PUBLISHED["t2v_14b"]  # whose sizes a file means where it does not say others
    names = [each.name for each in fields(Architecture) if each.name not in COMPUTED]
    said = {name: config[name] for name in names if config.get(name) is not None}
    return {name: getattr(wide, name) for name in names} | unset | said


def _of_wan(path: str | Path, config: Mapping[str, Any]) -> dict[str, Any]:
    said = {ours: config[theirs] for theirs, ours in WANS_SETTINGS.items() if theirs in config}
    heads, width = said.get("num_attention_heads"), config.get("dim")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
        raise UserError(f"{path}: config.json has dim {width!r} for num_heads {heads!r}; fetch it again")
    # Whether a network attends to an image is not in this file: 2.1's and 2.2's are both of model_type "i2v".
    tensors = streamed_weights.find(path).tensors
    places = "img_emb.emb_pos" in tensors
    image = dict(image_dim=1280) if "img_emb.proj.0.weight" in tensors else {}
    return said | image | dict(attention_head_dim=width // heads, pos_embed_seq_len=514 if places else 0)


# ---- Weights ----


def from_pretrained(
    path: str | Path,
    spec: Architecture,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """The parameters of a transformer.

    Args:
        path: a diffusers directory, one of Wan's, or a file in either layout.
        dtype: that weights become, tensor by tensor; None for the type that they are stored in. Those that
            diffusers keeps in float32 stay as they are stored.
        mesh: the devices among which parameters are divided by `wan_network.PARTITION_RULES`.

    Raises UserError that names a size which the config.json beside the weights has otherwise, a missing
    shard, and a tensor which is missing, unknown or of another shape.
    """
    if pretrained.read_config(path):
        _check_sizes(path, read_sizes(path), spec)
    checkpoint = _without_unused(streamed_weights.find(path))
    is_wans = any(name.startswith("head.") for name in checkpoint.tensors)
    shapes = wan_network.shapes(spec)
    rules = wan_network.PARTITION_RULES
    return streamed_weights.read(
        checkpoint,
        shapes,
        wans_source if is_wans else diffusers_source,
        f"{path} ({WANS_FAMILY if is_wans else FAMILY})",
        dtype=dtype,
        keep=KEPT,
        shardings=None if mesh is None else sharding.of_tree(shapes, rules, mesh),
    )


def to_pretrained(params: Params) -> dict[str, Any]:
    """The parameters as a WanTransformer3DModel's tensors."""
    return pretrained.to_tensors(params, diffusers_source)


def to_wans(params: Params) -> dict[str, Any]:
    """The parameters as tensors of Wan's own layout."""
    return pretrained.to_tensors(params, wans_source)


def diffusers_source(path: str) -> Source:
    """Where a parameter stands in diffusers' layout."""
    return Source(pretrained.torch_name(path))


def wans_source(path: str) -> Source:
    """Where a parameter stands in Wan's own layout."""
    return Source(wans_name(diffusers_source(path).name))


def wans_name(name: str) -> str:
    """The name that a tensor of diffusers' has in Wan's layout."""
    for theirs, wans in RENAMED:
        name = re.sub(theirs, wans, name)
    return name


def _check_sizes(path: str | Path, said: Architecture, asked: Architecture) -> None:
    for each in fields(Architecture):
        theirs, ours = getattr(said, each.name), getattr(asked, each.name)
        if each.name not in COMPUTED and theirs != ours:
            named = [name for name, spec in PUBLISHED.items() if replace(spec, **_computed(said)) == said]
            sizes = f" (the sizes {named[0]!r})" if named else ""
            raise UserError(
                f"{path} has {each.name} {theirs}{sizes}, the config asks for {ours}; make them agree"
            )


def _computed(spec: Architecture) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in COMPUTED}


def _without_unused(checkpoint: Checkpoint) -> Checkpoint:
    unused = [name for name in checkpoint.tensors if UNUSED.search(name)]
    if unused:
        told = f"left out {len(unused)} tensors that the network does not use, such as {min(unused)}"
        print(f"im3d: {checkpoint.path}: {told}", file=sys.stderr)
    used = {name: stored for name, stored in checkpoint.tensors.items() if name not in unused}
    return checkpoint._replace(tensors=used)


# ---- Two experts ----


class Experts(NamedTuple):
    """Two sets of parameters of one network, for noise levels from `boundary` on and for those below.

    Attributes:
        boundary: a noise level in [0, 1].
    """

    high_noise: Params
    low_noise: Params
    boundary: float


DIRECTORIES = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
"""Directories of the two experts, for high and for low noise, in diffusers' pipelines and in Wan's own."""

BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
"""The boundaries of Wan 2.2's A14B models, which Wan's own directories do not say."""


def read_experts(
    path: str | Path,
    spec: Architecture,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Experts:
    """The two experts of Wan 2.2's A14B models; see `from_pretrained` for arguments and errors.

    path: a diffusers pipeline with both, or Wan's directory of them.

    Raises UserError if one of the two is not there.
    """
    high, low = experts_at(path)
    index = Path(path) / "model_index.json"
    said = read_settings(index).get("boundary_ratio") if index.is_file() else None
    boundary = BOUNDARIES["i2v" if spec.in_channels > spec.out_channels else "t2v"] if said is None else said
    ranges.taken(boundary, ranges.Share, f"{index}: boundary_ratio")
    return Experts(
        from_pretrained(high, spec, dtype, mesh), from_pretrained(low, spec, dtype, mesh), float(boundary)
    )


def experts_at(path: str | Path) -> tuple[Path, Path]:
    """The directories of the experts for high and for low noise. Raises UserError if one is not there."""
    for high, low in DIRECTORIES:
        places = [Path(path) / name for name in (high, low)]
        there = [place.is_dir() for place in places]
        if all(there):
            return places[0], places[1]
        if any(there):
            has, lacks = (high, low) if there[0] else (low, high)
            raise UserError(f"{path} has {has}/ and lacks {lacks}/; fetch both experts")
    pairs = " nor ".join(f"{high}/ and {low}/" for high, low in DIRECTORIES)
    raise UserError(f"{path} has neither {pairs}, the two experts of Wan 2.2's A14B models; give another")
