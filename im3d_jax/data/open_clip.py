"""A CLIP as open_clip stores it, brought into transformers' CLIPModel.

A directory holds open_clip_config.json, weights as safetensors, and a tokeniser in transformers' files. What
is read are models whose two halves are CLIP's own transformers; others, such as those with towers of timm,
are refused by the entry that tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon_torch import hosting, weights_files
from recon_torch.errors import UserError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# As the three sections of a config are read here; any other entry means another network.
MODEL = ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")
VISION = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name")
PREPROCESSING = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures of OpenAI's CLIP, where a config gives none."""

RESAMPLING = {"bicubic": 3, "bilinear": 2}
"""As Pillow numbers them."""

LAYER = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
"""Of a block of a transformer: open_clip's name -> that of transformers."""

NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""These are stored transposed."""
BLOCKS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def is_there(path: Path) -> bool:
    """Whether a directory is of open_clip alone; one that transformers reads as well is read by that."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def load(path: Path, what: str) -> tuple[torch.nn.Module, Any, Any]:
    """(model of transformers, image processor, tokeniser), frozen and on the device of hosted models.

    what: where the path comes from, for errors.

    Raises UserError for files that are missing, pickled or damaged, and for networks that are none of CLIP's.
    """
    transformers = hosting.library("transformers")
    config = hosting.read_json(path, CONFIG, what)
    where = f"{what}: {path / CONFIG}"
    model, preprocess = _section(config, "model_cfg", MODEL, where), config.get("preprocess_cfg", {})
    _check(preprocess, PREPROCESSING, f"{where}: preprocess_cfg")
    tokenizer = hosting.load_tokenizer(transformers.CLIPTokenizer, path, what)
    try:
        made = transformers.CLIPModel(_model_config(transformers, model, tokenizer, where))
        made.load_state_dict(dict(renamed(_weights(path))), strict=True)
    except (*hosting.LOADING_ERRORS, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: {path} is no CLIP of its {CONFIG}: {hosting.brief(error)}") from None
    hosting.check_finite(made, torch.float32, f"{what}: {path}")
    processor = _processor(transformers, preprocess, int(model["vision_cfg"]["image_size"]), where)
    return made.to(hosting.device()).eval().requires_grad_(False), processor, tokenizer


def _section(config: Mapping[str, Any], name: str, known: tuple[str, ...], where: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise UserError(f"{where} has no section {name}; fetch it again")
    _check(section, known, f"{where}: {name}")
    return section


def _check(section: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises UserError for an entry that is set and not read."""
    if other := [name for name, value in section.items() if name not in known and value not in (None, False)]:
        raise UserError(
            f"{where}.{other[0]} is of a network that is not read; give a CLIP of plain transformers"
        )


def _model_config(transformers: Any, model: Mapping[str, Any], tokenizer: Any, where: str) -> Any:
    vision = _section(model, "vision_cfg", VISION, where)
    text = _section(model, "text_cfg", TEXT, where)
    common = {
        "projection_dim": model["embed_dim"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }
    vision_config = transformers.CLIPVisionConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_size=vision["width"],
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision.get("head_width", 64),
        intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        **common,
    )
    text_config = transformers.CLIPTextConfig(
        vocab_size=text["vocab_size"],
        max_position_embeddings=text["context_length"],
        hidden_size=text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        intermediate_size=int(text["width"] * text.get("mlp_ratio", 4.0)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # whose place is the embedding of the text
        **common,
    )
    return transformers.CLIPConfig(
        text_config=text_config.to_dict(),
        vision_config=vision_config.to_dict(),
        projection_dim=model["embed_dim"],
    )


def _processor(transformers: Any, preprocess: Mapping[str, Any], image_size: int, where: str) -> Any:
    side = preprocess.get("size", image_size)
    side = int(side[0] if isinstance(side, list) else side)
    resampling, mode = preprocess.get("interpolation", "bicubic"), preprocess.get("resize_mode", "shortest")
    if resampling not in RESAMPLING or mode not in ("shortest", "squash"):
        raise UserError(f"{where}: pictures are brought to size by {mode}, {resampling}, which is not read")
    whole = {"height": side, "width": side}
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": side} if mode == "shortest" else whole,
        crop_size=whole,
        resample=RESAMPLING[resampling],
        image_mean=list(preprocess.get("mean", MEAN)),
        image_std=list(preprocess.get("std", STD)),
    )


def _weights(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS if (path / WEIGHTS).is_file() else weights_files.find(path)[0]
    with weights_files.opened(file) as opened:
        names = list(opened.keys())
        return {name: weights_files.to_float32(opened.get_tensor(name), name, file) for name in names}


def renamed(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights by transformers' names. Raises KeyError for a name that open_clip's CLIP does not have."""
    for name, tensor in weights.items():
        if name in PROJECTIONS:
            yield PROJECTIONS[name], tensor.T.contiguous()
        elif name in NAMES:
            yield NAMES[name], tensor
        else:
            yield from _of_block(name, tensor)


def _of_block(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for prefix, other in BLOCKS.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):  # queries, keys and values in one
                for part, kind in zip(tensor.chunk(3), "qkv", strict=True):
                    yield (
                        f"{other}{number}.self_attn.{kind}_proj.{rest.rpartition('_')[2]}",
                        part.contiguous(),
                    )
            else:
                yield f"{other}{number}.{LAYER[rest]}", tensor
            return
    raise KeyError(f"it has a tensor {name}")
