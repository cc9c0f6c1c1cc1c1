"""The weights of Wan's autoencoders: diffusers' AutoencoderKLWan, and the names of Wan's own files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from im3d_jax import pretrained, public_tensors
from im3d_jax.autoencoders.wan_network import Network
from im3d_jax.autoencoders.wan_sizes import PUBLISHED, Architecture
from im3d_jax.pretrained import Source, SourceOf
from recon_torch import ranges
from recon_torch.errors import UserError, quoted

FAMILY = "AutoencoderKLWan"
BUILT: dict[str, Any] = {"attn_scales": [], "in_channels": None, "out_channels": None, "clip_output": None}
"""Entries of a config.json that are not sizes of ours, and the value of each that is built; None for any."""

# diffusers' names -> Wan's, for both families.
RENAMED = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(\w+)\.conv_in\.", r"\1.conv1."),
    (r"^(\w+)\.norm_out\.", r"\1.head.0."),
    (r"^(\w+)\.conv_out\.", r"\1.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)
RENAMED_IN_RESIDUAL = (
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(downsampler|upsamplers\.0|upsampler))\.")
"""The place of a layer in a level: way, level, and the residual block or what changes the sides."""


def init(architecture: Architecture, key: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters; under `jax.eval_shape`, their shapes."""
    side, pictures = architecture.side_factor, architecture.frame_factor + 1
    return Network(architecture).init(key, jnp.zeros((1, pictures, side, side, 3)))["params"]


def read_architecture(path: str, published: str = "", **sizes: Any) -> Architecture:
    """The architecture of the config.json at `path`, or of `sizes` if there is none. It reads no weights.

    Raises UserError for sizes that do not exist or repeat a config.json, and for what is not built here.
    """
    where = "config.autoencoder.kwargs"
    known = {each.name for each in fields(Architecture)}
    if unknown := sizes.keys() - known:
        raise UserError(f"{where}: wan takes no argument {min(unknown)}; remove it")
    if published and published not in PUBLISHED:
        raise UserError(f"{where}.published is {quoted(published)}; give one of {', '.join(PUBLISHED)}")
    config = pretrained.read_config(_directory(path)) if path else {}
    if config:
        given = ["published"] if published else sorted(sizes.keys() - {"dtype"})
        if given:
            raise UserError(f"{where}.{given[0]}: config.json of {path} says it; remove it")
        sizes |= _told(path, config, known)
        where = f"wan of {path}"
    ranges.check_arguments(Architecture, sizes, where)
    base = {name: getattr(PUBLISHED[published], name) for name in known} if published else {}
    return Architecture(**(base | sizes))


def _told(path: str, config: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The sizes that a config.json says."""
    family = config.get("_class_name")
    if family != FAMILY:
        raise UserError(
            f"{path} holds {family or 'a model of no name'}, not Wan's autoencoder; give an {FAMILY}"
        )
    for name, only in BUILT.items():
        if only is not None and config.get(name, only) != only:
            raise UserError(
                f"{path} has {name} {quoted(config[name])}, which wan does not build; give another"
            )
    said = {name: value for name, value in config.items() if name in known and value is not None}
    # What diffusers means where a file does not say it, which is Wan 2.1's.
    latents = {name: getattr(PUBLISHED["wan2.1"], name) for name in ("latents_mean", "latents_std")}
    sizes = latents | said
    channels = 3 * sizes.get("patch_size", 1) ** 2
    for name in ("in_channels", "out_channels"):
        if (found := config.get(name, 3)) != channels:
            raise UserError(f"{path} has {name} {found}; wan builds {channels}, for RGB; give another")
    return sizes


def read_params(path: str, architecture: Architecture) -> dict[str, Any]:
    """The weights at `path` as float32 parameters; see `wan.load`."""
    if not path:
        raise UserError(f"config.autoencoder.kwargs.path is empty; name an {FAMILY}, or 'random' for a test")
    if path == "random":
        return jax.jit(init, static_argnums=0)(architecture, jax.random.key(0, impl="rbg"))
    tensors = public_tensors.read(_directory(path), public_tensors.AUTOENCODER)
    shapes = jax.eval_shape(lambda key: init(architecture, key), jax.random.key(0))
    is_wans = "conv1.weight" in tensors
    source_of = wans_source(architecture) if is_wans else diffusers_source
    what = f"autoencoder {path} ({'Wan' if is_wans else FAMILY})"
    return pretrained.to_params(tensors, shapes, source_of, what)


def _directory(path: str) -> Path:
    inside_pipeline = Path(path) / "vae"
    return inside_pipeline if inside_pipeline.is_dir() else Path(path)


def diffusers_source(path: str) -> Source:
    """Where a parameter stands in diffusers' layout, for `pretrained`."""
    if path.endswith("/norm/gamma"):
        return Source(pretrained.torch_name(path), "per_channel_2d")
    if path.endswith("/gamma"):
        return Source(pretrained.torch_name(path), "per_channel_3d")
    is_projection = path.endswith(("to_qkv/kernel", "/proj/kernel"))
    return Source(pretrained.torch_name(path), "conv1x1" if is_projection else "")


def wans_source(architecture: Architecture) -> SourceOf:
    """Where a parameter stands in Wan's own layout."""

    def source(path: str) -> Source:
        theirs = diffusers_source(path)
        return theirs._replace(name=wans_name(architecture, theirs.name))

    return source


def wans_name(architecture: Architecture, name: str) -> str:
    """The name that a tensor of diffusers' has in Wan's layout.

    The first family numbers the layers of all levels through, in diffusers' layout on the way down alone. The
    second numbers those of a level, with what changes the sides as the last one.
    """
    for theirs, wans in RENAMED:
        name = re.sub(theirs, wans, name)
    if found := LAYER.search(name):
        name = f"{name[: found.start()]}{_place(architecture, found)}.{name[found.end() :]}"
    name = re.sub(r"\bdown_blocks\.", "downsamples.", name)
    if re.search(r"\.(downsamples|upsamples|middle\.[02])\b", name):
        for theirs, wans in RENAMED_IN_RESIDUAL:
            name = re.sub(theirs, wans, name)
    return name


def _place(architecture: Architecture, found: re.Match[str]) -> str:
    way, level = found[1], int(found[2])
    layers = architecture.num_res_blocks + (way == "up")
    layer = layers if found[3] is None else int(found[3])
    if architecture.is_residual:
        return f"{way}samples.{level}.{way}samples.{layer}"
    return f"{way}samples.{level * (layers + 1) + layer}"
