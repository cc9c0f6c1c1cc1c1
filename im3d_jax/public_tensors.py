"""The tensors of a public checkpoint, float32, under the names that their model gives them.

Programs that save a model wrap its names, add what is none of its weights, or scale its weights to fit into
8 bits. This module undoes the first and the last, and says what it leaves out. What changes a model and is
none, such as a LoRA, is refused by name.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recon_torch import weights_files
from recon_torch.errors import UserError

DENOISER = ("model.diffusion_model.", "diffusion_model.", "unet.", "model.")
AUTOENCODER = ("first_stage_model.", "vae.", "autoencoder.")
"""What may stand before the names of a model's tensors, besides `WRAPPERS`."""

WRAPPERS = re.compile(r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What PyTorch puts into names: DataParallel, compile, FSDP, checkpointing of activations."""

OTHER_MODELS = (
    *(*DENOISER[:-1], *AUTOENCODER),
    *("cond_stage_model.", "conditioner.", "text_encoder.", "text_encoder_2.", "text_encoders."),
    *("image_encoder.", "safety_checker."),
)
"""Prefixes of the models that one file may hold together."""

AVERAGED = re.compile(r"(?<![^.])(model_ema|ema_model|unet_ema|ema_unet|ema)(\.|$)|_ema$")
"""What marks a second set of the weights: their exponential moving average."""

BUFFERS = re.compile(
    r"^(\w+\.)?((sqrt_|log_|posterior_)\w+|betas|alphas_cumprod(_prev)?|sigmas|logvar|lvlb_weights"
    r"|scale_factor|v_pred|ztsnr|edm_\w+(\.\w+)?|decay|num_updates|initted|step|global_step|epoch)$"
    r"|(?<![^.])(position_ids|num_batches_tracked)$"
)
"""Names of what a model computes with and does not learn: the noise schedule above all."""

AVERAGES, BUFFERED, OTHERS = (
    "averaged (EMA) tensors",
    "buffers that are no weights",
    "tensors of other models",
)


class NoModel(NamedTuple):
    """What a file is whose tensors have such names, and what to do about it."""

    pattern: re.Pattern[str]
    name: str
    remedy: str


ADAPT = "name it in config.lora, or merge it into its model's weights (im3d convert --merge-lora)"
MERGE = "merge it into its model (in diffusers fuse_lora, then save_pretrained) and give that"

NO_MODELS = (
    NoModel(
        re.compile(r"lora_(up|down|mid|A|B|unet|te)|lora\.(up|down)|_lora\.|lora_linear"), "a LoRA", ADAPT
    ),
    NoModel(re.compile(r"\.(hada_w|lokr_w|oft_|dora_)|\.diff(_b)?$"), "a LyCORIS adapter", MERGE),
    NoModel(re.compile(r"^control_model\.|controlnet_|zero_convs\."), "a ControlNet", "give the model alone"),
    NoModel(
        re.compile(r"\.(qweight|qzeros|SCB|absmax|quant_map|weight_scale_2|weight_zero_point)$|bitsandbytes"),
        "weights that are quantised to integers or 4 bits",
        "give the original ones",
    ),
)

FORMAT = ".comfy_quant"
"""The end of the name of ComfyUI's note, in JSON, of what a layer's weight is."""

BESIDE_SCALES = re.compile(r"\.(scale_input|input_scale)$|(^|\.)scaled_fp8$")
"""Names of what else comes with scaled weights, for those who compute in 8 bits."""

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""ComfyUI's names of 8-bit types. Their values may lie in a file as bytes."""


def read(
    path: str | Path, prefixes: Sequence[str] = DENOISER, averaged: bool = False
) -> dict[str, np.ndarray]:
    """The tensors of a model, float32, by the names that the model gives them.

    Args:
        path: a .safetensors file, in one piece or a shard, an index of shards, or a diffusers directory.
        prefixes: of the model's tensors in a file that holds several models.
        averaged: whether to take the averaged (EMA) twins of a file that holds both.

    What is left out is said on stderr. Raises UserError that names a file which holds no such model, is no
    safetensors file or is damaged, and a tensor that cannot be read.
    """
    names: dict[str, Path] = {}
    for file in weights_files.find(path):
        with weights_files.opened(file) as opened:
            names |= dict.fromkeys(opened.keys(), file)
    chosen = choose(names, prefixes, str(path), averaged)
    stored: dict[str, Tensor] = {}
    for file in sorted({names[name] for name in chosen}):
        with weights_files.opened(file) as opened:
            stored |= {own: opened.get_tensor(name) for name, own in chosen.items() if names[name] == file}
    return unscaled(stored, str(path))


# ---- Names ----


def choose(
    names: Iterable[str], prefixes: Sequence[str], where: str, averaged: bool = False
) -> dict[str, str]:
    """Which tensors of a file are a model's: their names in the file -> in the model.

    Args:
        names: of all tensors of the file.
        prefixes, averaged: see `read`.
        where: the file, for what is said.

    Says on stderr what is left out. Raises UserError for a file without the model, and if two tensors stand
    for the same one.
    """
    names = sorted(names)
    _refuse_no_models(names, where)
    plain: dict[str, str] = {}
    left: dict[str, dict[str, str]] = {}
    for name, own in _stripped(names, prefixes).items():
        if reason := _reason(own, prefixes):
            left.setdefault(reason, {})[name] = own
        else:
            plain[name] = own
    if averaged and AVERAGES not in left:
        raise UserError(f"{where} holds no averaged (EMA) weights; leave --ema out, or give another file")
    if AVERAGES in left and (averaged or not plain):
        averages = {name: AVERAGED.sub("", own).rstrip(".") for name, own in left.pop(AVERAGES).items()}
        taken = "" if plain else " alone"
        print(f"im3d: {where} holds averaged (EMA) weights{taken}, which are taken", file=sys.stderr)
        plain = _averages(_stripped(averages, prefixes), plain, where)
    for reason, found in left.items():
        hint = "; --ema takes them instead" if reason == AVERAGES and prefixes == DENOISER else ""
        print(f"im3d: {where}: left out {len(found)} {reason}, such as {min(found)}{hint}", file=sys.stderr)
    if not plain:
        raise UserError(f"{where} holds no tensors of the model; is it of another family?")
    _refuse_twins(plain, where)
    return plain


def _averages(averages: dict[str, str], plain: dict[str, str], where: str) -> dict[str, str]:
    """Averaged tensors as the model names them, and plain ones that have no average, which do not train.

    Stable Diffusion's and SVD's trainers write averages without the dots of their names, so that only the
    plain twins tell these.
    """
    without_dots = {own.replace(".", ""): own for own in plain.values()}
    found = {}
    for name, own in averages.items():
        flat = own.replace(".", "")
        found[name] = without_dots.get(flat) or without_dots.get(flat.removeprefix("diffusion_model"), own)
    if lonely := {name: own for name, own in plain.items() if own not in set(found.values())}:
        print(f"im3d: {where}: {min(lonely)} ({len(lonely)} such) has no averaged twin", file=sys.stderr)
    return found | lonely


def _stripped(names: Iterable[str] | dict[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """Names in a file -> without wrappers and prefixes, however these are nested."""
    own = names if isinstance(names, dict) else {name: name for name in names}
    prefix: str | None = ""
    while prefix is not None:
        own = {name: _unwrapped(each.removeprefix(prefix)) for name, each in own.items()}
        prefix = next(
            (each for each in prefixes if any(name.startswith(each) for name in own.values())), None
        )
    return own


def _unwrapped(name: str) -> str:
    while (shorter := WRAPPERS.sub("", name)) != name:
        name = shorter
    return name


def _reason(name: str, prefixes: Sequence[str]) -> str:
    """Why a tensor is left out; "" if it is the model's, or of a name that nothing here knows."""
    if BUFFERS.search(name):
        return BUFFERED
    if name.startswith(tuple(each for each in OTHER_MODELS if each not in prefixes)):
        return OTHERS
    return AVERAGES if AVERAGED.search(name) else ""


def _refuse_no_models(names: Sequence[str], where: str) -> None:
    if any("/" in name for name in names):
        raise UserError(f"{where} holds weights of im3d already; name it in config.weights")
    for kind in NO_MODELS:
        if found := [name for name in names if kind.pattern.search(name)]:
            count = f"({len(found)} tensors such as {found[0]})"
            raise UserError(f"{where} holds {kind.name} {count}; {kind.remedy}")


def _refuse_twins(names: dict[str, str], where: str) -> None:
    own, count = Counter(names.values()).most_common(1)[0]
    if count > 1:
        twins = [name for name, each in names.items() if each == own]
        raise UserError(f"{where} holds {own} as {twins[0]} and as {twins[1]}; give a file with one of them")


# ---- Weights in 8 bits ----


def unscaled(stored: dict[str, Tensor], where: str) -> dict[str, np.ndarray]:
    """Tensors by name, as float32, multiplied by the scales that some come with. Empties `stored`.

    Raises UserError that names a tensor that cannot be read, a scale that does not fit, and a missing one.
    """
    scales, formats = {}, {}
    for name in list(stored):
        if found := weights_files.SCALE.search(name):
            scales[f"{name[: found.start()]}.weight"] = stored.pop(name)
        elif name.endswith(FORMAT):
            formats[f"{name.removesuffix(FORMAT)}.weight"] = _format(stored.pop(name), name, where)
        elif BESIDE_SCALES.search(name):
            del stored[name]
    if lonely := sorted((scales.keys() | formats.keys()) - stored.keys()):
        raise UserError(f"{where} has a scale for {lonely[0]}, which it lacks; fetch it again")
    return {
        name: _unscaled(name, stored.pop(name), scales, formats.get(name), where).numpy()
        for name in list(stored)
    }


def _format(note: Tensor, name: str, where: str) -> torch.dtype:
    """The type that ComfyUI's note names."""
    try:
        kind = json.loads(note.numpy().tobytes())["format"]
        return FP8[kind]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{where}: {name} names no format that is read ({', '.join(FP8)})") from None


def _unscaled(
    name: str, tensor: Tensor, scales: dict[str, Tensor], dtype: torch.dtype | None, where: str
) -> Tensor:
    if dtype is not None and tensor.dtype == torch.uint8:
        tensor = tensor.view(dtype)
    if name not in scales:
        # Only linear layers are scaled, so that convolutions in 8 bits are taken as they are.
        if scales and tensor.dtype in FP8.values() and tensor.ndim == 2:
            raise UserError(f"{where} lacks the scale of {name}, which other weights have; fetch it again")
        return weights_files.to_float32(tensor, name, where)
    scale = weights_files.to_float32(scales[name], f"the scale of {name}", where)
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif tensor.ndim > 1 and scale.shape in ((len(tensor),), (len(tensor), 1)):  # one for each output
        scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))
    else:
        shapes = f"{tuple(scale.shape)} for {name} of shape {tuple(tensor.shape)}"
        raise UserError(
            f"{where} has scales of shape {shapes}; scales of blocks are not read, give other weights"
        )
    return weights_files.to_float32(tensor, name, where) * scale
