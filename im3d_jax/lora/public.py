"""Public layouts of LoRA files <-> adapters by the paths of a backbone's kernels.

diffusers and PEFT: `transformer.blocks.0.attn1.to_q.lora_A.weight` and `lora_B`, also with
`base_model.model.` before it; trainers of the vendors' networks:
`diffusion_model.blocks.0.self_attn.q.lora_A.weight`; kohya's scripts:
`lora_unet_blocks_0_self_attn_q.lora_down.weight`, `lora_up` and `alpha`. Which names a backbone's kernels
have there, it says itself (`backbones.NamedBackbone`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from im3d_jax.backbones import Backbone, NamedBackbone
from im3d_jax.lora.adapters import Adapter
from im3d_jax.pretrained import LAYOUTS, RANK_IN_CHECKPOINT, Source, SourceOf, layout_of
from recon_torch import weights_files
from recon_torch.errors import UserError
from recon_torch.text_files import read_settings

PREFIXES = (
    *("base_model.model.", "transformer.", "unet.", "model.diffusion_model.", "diffusion_model.", "model."),
    *("module.", "_orig_mod."),
)
"""What files put before the names of a network's modules, nested in any order."""

FLAT = "lora_unet_"
"""What kohya's scripts put before the name of a module, all of whose dots they make underscores."""

OTHER_MODELS = re.compile(r"^(text_encoder|lora_te|te\d?_|conditioner\.|cond_stage_model\.)")
"""Names of the adapters of text encoders."""

FACTORS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$|\.lora_down\.weight$|\.lora\.down\.weight$"), "a"),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$|\.lora_up\.weight$|\.lora\.up\.weight$"), "b"),
    (re.compile(r"\.alpha$"), "alpha"),
)
"""The ends of the names of what belongs to an adapter."""

OLDER = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.to_out_lora\."), ".to_out.0.lora."),
    (re.compile(r"\.to_([qkv])_lora\."), r".to_\1.lora."),
)
"""Names of diffusers' files of before PEFT -> those of after it."""

METADATA = "lora_adapter_metadata"
"""diffusers' entry of a file's metadata: PEFT's settings as JSON, their names after the network's prefix."""


class Place(NamedTuple):
    """A kernel of ours, and where it stands in a public layout."""

    kernel: str
    source: Source


def is_public(names: Iterable[str]) -> bool:
    """Whether tensors of such names are adapters."""
    return any(_kind(name) in ("a", "b") for name in names)


def read(path: Path, model: Backbone, name: str, shapes: Mapping[str, Any]) -> dict[str, Adapter]:
    """The adapters of a public file by the paths of their kernels, each with its own scale.

    Args:
        path: a .safetensors file, or PEFT's directory with its adapter_config.json.
        name: of the backbone, for errors.
        shapes: of its parameters, by path.

    Says on stderr what is left out. Raises UserError that names what the backbone lacks, what is no factor of
    an adapter, and a factor without its twin.
    """
    tensors, settings = _tensors(path)
    places = _places(model, name, shapes)
    parts: dict[str, dict[str, np.ndarray]] = {}
    kernels: dict[str, Place] = {}
    for tensor, value in tensors.items():
        module, kind = _part(tensor, path)
        place = _find(module, places)
        if place is None:
            raise UserError(f"LoRA {path} adapts {module}, which {name} lacks; give a LoRA of this backbone")
        parts.setdefault(module, {})[kind] = value
        kernels[module] = place
    made: dict[str, Adapter] = {}
    for module, found in parts.items():
        kernel, source = kernels[module]
        if lacking := {"a", "b"} - found.keys():
            which = "down (A)" if "a" in lacking else "up (B)"
            raise UserError(f"LoRA {path} lacks the factor {which} of {module}; fetch it again")
        if kernel in made:
            raise UserError(
                f"LoRA {path} adapts {kernel} twice, as {module} too; give a file with one of them"
            )
        a, b = _to_ours(found, layout_of(kernel, source, len(shapes[kernel].shape)), module, path)
        made[kernel] = Adapter(a, b, _scale(module, a.shape[-1], found.get("alpha"), settings, path))
    for pattern in settings.get("alpha_pattern") or {}:
        if not any(_is_of(pattern, module) for module in parts):
            raise UserError(f"LoRA {path} gives an alpha to {pattern!r}, which is none of its modules")
    return made


def write(
    adapters: Mapping[str, Adapter], model: Backbone, name: str
) -> tuple[dict[str, np.ndarray], str, int]:
    """(tensors in diffusers' layout, PEFT's settings as JSON, how many adapters have no place there).

    The scale is multiplied into B, because only some programs read an alpha from the metadata, and others
    take it for the rank where there is none.

    Raises UserError if the layout has a place for none.
    """
    prefix, source_of = next(iter(_names(model, name).items()))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for kernel, (a, b, scale) in adapters.items():
        if not (source := source_of(kernel)):
            continue
        module, layout = source.name.removesuffix(".weight"), layout_of(kernel, source, a.ndim)
        extent = (1,) * (RANK_IN_CHECKPOINT.get(layout, a.ndim) - 2)
        down, up = LAYOUTS[layout][1](np.asarray(a)), (np.asarray(b) * np.float32(scale)).T
        tensors[f"{prefix}.{module}.lora_A.weight"] = np.ascontiguousarray(down)
        tensors[f"{prefix}.{module}.lora_B.weight"] = np.ascontiguousarray(up.reshape(*up.shape, *extent))
        ranks[module] = a.shape[-1]
    if not ranks:
        raise UserError(f"config.backbone: the public layout of {name} has a place for none of the adapters")
    rank = max(ranks.values())
    others = {module: each for module, each in ranks.items() if each != rank}
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    settings |= {"rank_pattern": others, "alpha_pattern": others}
    told = json.dumps({f"{prefix}.{key}": value for key, value in settings.items()}, sort_keys=True)
    return tensors, told, len(adapters) - len(ranks)


# ---- Names ----


def _names(model: Backbone, name: str) -> Mapping[str, SourceOf]:
    if not isinstance(model, NamedBackbone):
        raise UserError(f"config.backbone: {name} has no public_names, so it has no public LoRAs")
    return model.public_names()


def _places(model: Backbone, name: str, shapes: Mapping[str, Any]) -> dict[str, Place]:
    """The kernels by the names of their modules, in all layouts, with dots and with underscores."""
    places = {}
    for source_of in _names(model, name).values():
        for path, leaf in shapes.items():
            source = source_of(path) if len(leaf.shape) > 1 else None
            if source and source.name.endswith(".weight"):
                module, place = source.name.removesuffix(".weight"), Place(path, source)
                places[module] = places[FLAT + module.replace(".", "_")] = place
    return places


def _find(module: str, places: Mapping[str, Place]) -> Place | None:
    """The kernel of a module, whatever stands before its name."""
    while module not in places:
        prefix = next((each for each in PREFIXES if module.startswith(each)), None)
        if prefix is None:
            return None
        module = module.removeprefix(prefix)
    return places[module]


def _kind(name: str) -> str | None:
    """What a tensor of this name is: "a", "b" or "alpha" of an adapter; None: of none."""
    newer = _newer(name)
    return next((kind for pattern, kind in FACTORS if pattern.search(newer)), None)


def _newer(name: str) -> str:
    for older, newer in OLDER:
        name = older.sub(newer, name)
    return name


def _part(tensor: str, path: Path) -> tuple[str, str]:
    """(module, "a", "b" or "alpha") of a tensor's name. Raises UserError for what is none of these."""
    name = _newer(tensor)
    for pattern, kind in FACTORS:
        if pattern.search(name):
            return pattern.sub("", name), kind
    raise UserError(
        f"LoRA {path} holds {tensor}, which is no factor of a low-rank adapter; merge it into its model (in"
        " diffusers fuse_lora, then save_pretrained) and give that"
    )


# ---- Values ----


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(float32 tensors by name, PEFT's settings), without those of text encoders, which a line tells."""
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    left: list[str] = []
    for file in weights_files.find(path):
        with weights_files.opened(file) as opened:
            settings |= _settings(file, opened.metadata() or {})
            for name in opened.keys():  # noqa: SIM118
                if OTHER_MODELS.match(name):
                    left.append(name)
                    continue
                value = weights_files.to_float32(opened.get_tensor(name), name, f"LoRA {path}")
                tensors[name] = value.numpy()
    if left:
        told = f"left out {len(left)} tensors of text encoders, such as {min(left)}"
        print(f"im3d: LoRA {path}: {told}", file=sys.stderr)
    if not is_public(tensors):
        raise UserError(
            f"LoRA {path} holds no adapters of a backbone; give a LoRA, or name it in config.weights"
        )
    return tensors, settings


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings of a file, from its metadata or the adapter_config.json beside it.

    Raises UserError for settings that change weights otherwise than by adapters.
    """
    beside = file.parent / "adapter_config.json"
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
        found = {key.rpartition(".")[2]: x for key, x in found.items() if not OTHER_MODELS.match(key)}
    except (ValueError, AttributeError):
        raise UserError(f"LoRA {file} has damaged metadata {METADATA}; fetch it again") from None
    if not found and beside.is_file() and file.name.startswith("adapter_model"):
        found = read_settings(beside)
    for key in ("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices"):
        if found.get(key):
            raise UserError(
                f"LoRA {file} has PEFT's setting {key}, which is not read; merge it into its model (in PEFT"
                " merge_and_unload) and give that"
            )
    return found


def _scale(
    module: str, rank: int, alpha: np.ndarray | None, settings: Mapping[str, Any], path: Path
) -> float:
    """alpha / rank. Where a file tells no alpha it is the rank, as diffusers has it."""
    value: Any = settings.get("lora_alpha", rank) if alpha is None else float(alpha.reshape(-1)[0])
    if alpha is None:
        for pattern, own in (settings.get("alpha_pattern") or {}).items():
            value = own if _is_of(pattern, module) else value
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"LoRA {path} gives {module} the alpha {value!r}, which is no number; fetch it again")
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_of(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's alpha_pattern, the name of a module or the end of one, is this module's."""
    return f".{module}".endswith(f".{pattern.removeprefix('^')}")


def _to_ours(
    found: Mapping[str, np.ndarray], layout: str, module: str, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of a module. A linear layer may stand for a 1x1 convolution, and the other way round."""
    rank = RANK_IN_CHECKPOINT.get(layout, found["a"].ndim)
    a, b = found["a"], found["b"]
    flat = a.shape[:2] if math.prod(a.shape[2:]) == 1 else a.shape
    if len(flat) == 2 and a.ndim != rank:
        a = a.reshape(*flat, *(1,) * (rank - 2))
    if a.ndim != rank or b.ndim < 2 or math.prod(b.shape[2:]) != 1 or a.shape[0] != b.shape[1]:
        shapes = f"{found['a'].shape} and {found['b'].shape}"
        raise UserError(f"LoRA {path}: the factors of {module} are {shapes}, which do not go together")
    return np.ascontiguousarray(LAYOUTS[layout][0](a)), np.ascontiguousarray(b.reshape(b.shape[:2]).T)
