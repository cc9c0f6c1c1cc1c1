"""`im3d convert`: public checkpoints into weights for a config's backbone, and back.

    im3d convert --config=configs/svd_xt.py --from stable-video-diffusion-img2vid-xt/unet --to weights/svd_xt.safetensors
    im3d convert --config=configs/sv3d_u.py --from sv3d_u.safetensors --to weights/sv3d_u.safetensors
    im3d convert --config=configs/sv3d_u.py --from weights/sv3d_u.safetensors --to tuned.safetensors --layout diffusers
    im3d convert --config=configs/sv3d_u.py --from weights/sv3d_u.safetensors --to sum.safetensors --merge-lora orbit.safetensors
    im3d convert --config=configs/sv3d_u.py --from runs/lora/weights.safetensors --to lora.safetensors --layout diffusers

Where --from is a LoRA, public or of `im3d train`, the LoRA is converted, by itself. Every tensor is accounted for: what is missing, unknown or of another shape is named, and nothing is written.
"""  # noqa: E501 - commands stay on one line

from __future__ import annotations

import contextlib
import inspect
import io
import json
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from im3d_jax import backbones, checkpoint, config_flags, config_sections
from im3d_jax.lora import files as lora_files
from im3d_jax.lora import public
from im3d_jax.params import cast
from recon_torch import outputs, weights_files
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import replacing, sort_safetensors_header

LAYOUTS = {"diffusers": "to_pretrained", "stability": "to_stability", "wan": "to_wans"}
"""A public layout -> the method of a model that makes its tensors."""

PRECISIONS = ("float32", "bfloat16", "float16")


def to_weights(config: ConfigDict, source: Path, target: Path, dtype: str, averaged: bool = False) -> int:
    """Writes a public checkpoint as weights for `config.backbone`. Returns the number of parameters.

    averaged: whether to take averaged (EMA) weights where the checkpoint holds both.
    """
    model = _build(config, "from_pretrained")
    read = partial(model.from_pretrained, source)
    if averaged:
        if "averaged" not in inspect.signature(model.from_pretrained).parameters:
            raise UserError(f"config.backbone: {config.backbone.name} does not tell averaged weights apart")
        read = partial(read, averaged=True)
    for file in weights_files.find(source):
        weights_files.check(file)
    # What does not fit is said before `init` compiles, which takes minutes for a large model.
    read(backbones.blank_params(model))
    params = backbones.init(model, jax.random.key(config.seed))
    with contextlib.redirect_stderr(io.StringIO()):  # what is left out has been said
        params = read(params)
    # The vocabulary that the weights belong to; text encoders have files of their own.
    words = list(config.text.kwargs.get("words", []))
    metadata = {"words": words, "source": source.name}
    checkpoint.save_weights(target, params, metadata, dtype)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def to_checkpoint(config: ConfigDict, source: Path, target: Path, dtype: str, layout: str) -> int:
    """Writes weights for `config.backbone` in a public layout. Returns the number of its parameters."""
    method = LAYOUTS[layout]
    model = _build(config, method)
    params, _ = backbones.load_weights(model, source)
    made = getattr(model, method)(params)
    tensors = {name: cast(tensor, dtype, f"{source}: {name}") for name, tensor in made.items()}
    _save_public(target, tensors, {"im3d": json.dumps({"source": source.name})})
    left = sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(x.size for x in tensors.values())
    if left:
        count = len(traverse_util.flatten_dict(params)) - len(tensors)
        print(f"left out: {left:,} parameters that the layout has no place for ({count} arrays more here)")
    return sum(x.size for x in tensors.values())


def merge_lora(config: ConfigDict, source: Path, target: Path, dtype: str, loras: str, sign: float) -> int:
    """Writes weights of ours with LoRAs added to them, or taken off. Returns the number of parameters.

    loras: as `config.lora` names them.
    """
    name = config.backbone.name
    model = backbones.build(*config_sections.named(config, "backbone"))
    params, metadata = backbones.load_weights(model, source)
    params = lora_files.with_loras(loras, params, model=model, name=name, base=source, sign=sign)
    done = {"merged_lora" if sign > 0 else "unmerged_lora": loras, "source": source.name}
    checkpoint.save_weights(target, params, metadata | done, dtype)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def convert_lora(config: ConfigDict, source: Path, target: Path, dtype: str, layout: str) -> int:
    """Writes a LoRA, public or ours, in our layout or diffusers'. Returns the number of its parameters."""
    name = config.backbone.name
    model = backbones.build(*config_sections.named(config, "backbone"))
    adapters, metadata = lora_files.read(source, model, name)
    if layout == "im3d":
        factors = lora_files.factors(adapters)
        checkpoint.save_weights(target, factors, metadata | lora_files.converted(source), dtype)
        return sum(x.size for x in factors.values())
    if layout != "diffusers":
        raise UserError(f"--layout {layout}: LoRAs are written in the layouts im3d and diffusers")
    made, settings, left = public.write(adapters, model, name)
    tensors = {name: cast(tensor, dtype, f"{source}: {name}") for name, tensor in made.items()}
    told = {public.METADATA: settings, "im3d": json.dumps({"source": source.name})}
    _save_public(target, tensors, told)
    if left:
        print(f"left out: {left} of {len(adapters)} adapters, whose kernels the layout has no place for")
    return sum(x.size for x in tensors.values())


def _save_public(target: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    with replacing(target) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})
        sort_safetensors_header(temporary)


def _build(config: ConfigDict, method: str) -> Any:
    """The config's backbone. Raises UserError if it has no such method."""
    name, arguments = config_sections.named(config, "backbone")
    model = backbones.build(name, arguments)
    if not hasattr(model, method):
        raise UserError(f"config.backbone: {name} has no {method}, so there is no such layout of its weights")
    return model


def is_ours(path: Path) -> bool:
    """Whether a file of weights was written by this program."""
    try:
        with safe_open(path, framework="numpy") as file:
            return "im3d" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def main(argv: list[str]) -> None:
    parser = CommandParser("convert", __doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="PATH",
                        help="a .safetensors file, or diffusers' directory of a model")  # fmt: skip
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the .safetensors to write")
    parser.add_argument("--layout", choices=("im3d", *LAYOUTS), default="im3d",
                        help="of what is written: im3d reads a public checkpoint, the others read weights of"
                        " `im3d train` or `im3d convert` (default %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32",
                        help="of what is written (default %(default)s)")  # fmt: skip
    parser.add_argument("--ema", action="store_true",
                        help="take the averaged (EMA) weights of a public checkpoint that holds both; by"
                        " default the others are taken")  # fmt: skip
    parser.add_argument("--merge-lora", default="", metavar="FILE",
                        help="add LoRAs, named as in config.lora, to weights of im3d")  # fmt: skip
    parser.add_argument("--unmerge-lora", default="", metavar="FILE",
                        help="take LoRAs off weights of im3d to which they were added")  # fmt: skip
    flags, config = config_flags.parse(argv, parser)
    _check_flags(flags)
    outputs.check_file(flags.to, "convert", is_ours, [flags.source, *_loras(flags)])
    arguments = config, flags.source, flags.to, flags.dtype
    if flags.merge_lora or flags.unmerge_lora:
        sign = 1.0 if flags.merge_lora else -1.0
        count = merge_lora(*arguments, flags.merge_lora or flags.unmerge_lora, sign)
    elif lora_files.is_lora(flags.source):
        count = convert_lora(*arguments, flags.layout)
    elif flags.layout == "im3d":
        count = to_weights(*arguments, flags.ema)
    else:
        count = to_checkpoint(*arguments, flags.layout)
    print(f"{flags.to}: {count:,} parameters, {flags.dtype}")


def _check_flags(flags: Namespace) -> None:
    if flags.ema and flags.layout != "im3d":
        raise UserError(
            "--ema chooses from a public checkpoint, and --layout reads weights of im3d; drop one"
        )
    if flags.to.suffix != ".safetensors":
        raise UserError(f"--to {flags.to} must end in .safetensors")
    if flags.merge_lora and flags.unmerge_lora:
        raise UserError("--merge-lora and --unmerge-lora: give one, and the other in a second call")
    if (flags.merge_lora or flags.unmerge_lora) and (flags.ema or flags.layout != "im3d"):
        raise UserError(
            "--merge-lora and --unmerge-lora go from weights of im3d to such weights; convert before or after"
        )


def _loras(flags: Namespace) -> list[Path]:
    return [each.path for each in lora_files.parse(flags.merge_lora or flags.unmerge_lora)]
