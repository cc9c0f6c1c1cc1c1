"""How well captions describe pictures, by a CLIP (Radford et al. 2021).

The paper selects its assets by that (Sec. 3.1), and measures its results (Table 1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from im3d_jax.data import open_clip
from recon_torch import hosting
from recon_torch.errors import UserError

PREPROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""What a result says of the image processor."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""One of these describes the image processor; the first before transformers 5."""
PROBE_PX = (30, 20)


class Clip:
    """A CLIP with its image processor and tokeniser, on the device of hosted models.

    Attributes:
        max_tokens: of a caption, start and end included; what is longer is cut off.
    """

    def __init__(self, path: Path, what: str = "--model"):
        """
        Args:
            path: a directory with config.json, safetensors, image processor and tokeniser, as transformers
                writes it, or one of open_clip.
            what: where the path comes from, for errors.

        Raises UserError if there is no CLIP in it, or files of it are missing or are pickled.
        """
        self.path = path
        transformers = hosting.library("transformers")
        self._model: Any
        if open_clip.is_there(path):
            self._model, self._images, self._tokenizer = open_clip.load(path, what)
        else:
            kind = hosting.read_json(path, "config.json", what).get("model_type")
            if kind != "clip":
                raise UserError(f"{what}: {path} is a {kind}, not a CLIP with both halves; give one")
            self._model = hosting.load(transformers.CLIPModel, path, what, allow_extra=True)
            if not any((path / name).is_file() for name in PROCESSORS):
                raise UserError(f"{what}: no {PROCESSORS[0]} in {path}; copy it there")
            self._images = hosting.load_part(transformers.AutoImageProcessor, path, what)
            self._tokenizer = hosting.load_tokenizer(transformers.AutoTokenizer, path, what)
        config: Any = self._model.config
        self.max_tokens = int(config.text_config.max_position_embeddings)
        self._check(f"{what}: {path}")

    def _check(self, where: str) -> None:
        """Raises UserError for an image processor or a tokeniser that is not that of the network."""
        config: Any = self._model.config
        for name in ("do_rescale", "do_normalize"):
            if not getattr(self._images, name, True):
                raise UserError(f"{where}: {name} of {PROCESSORS[0]} is off; copy it again")
        width, height = PROBE_PX
        made = self._images([np.zeros((height, width, 3), np.uint8)], return_tensors="pt")["pixel_values"]
        rows, columns = made.shape[2:]
        side_px = config.vision_config.image_size
        if (rows, columns) != (side_px, side_px):
            raise UserError(
                f"{where}: {PROCESSORS[0]} makes pictures of {columns} x {rows} px, and the network takes"
                f" {side_px}; copy it again"
            )
        most, known = max(self._tokenizer.get_vocab().values()), config.text_config.vocab_size
        if most >= known:
            raise UserError(
                f"{where}: its tokeniser has {most + 1} tokens, and the network {known}; copy it again"
            )

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the files of the CLIP."""
        return hosting.digest(self.path)

    def about(self) -> dict[str, Any]:
        """Its size and preprocessing, and the digest of its files, as a result names them."""
        config, processor = self._model.config, self._images.to_dict()
        vision, text = config.vision_config, config.text_config
        return {
            "sha256": self.digest,
            "num_parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "vision": {
                name: getattr(vision, name)
                for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "hidden_act")
            },
            "text": {name: getattr(text, name) for name in ("hidden_size", "num_hidden_layers")},
            "embedding_size": config.projection_dim,
            "max_tokens": self.max_tokens,
            "preprocessing": {
                name: json.loads(json.dumps(processor[name], default=str))
                for name in PREPROCESSING
                if name in processor
            },
        }

    def in_words(self) -> str:
        """A sentence on its size, for a table."""
        about, name = self.about(), self.path.resolve().name
        vision = about["vision"]
        return (
            f"The CLIP is {name}, of {about['num_parameters']:,} parameters,"
            f" {vision['num_hidden_layers']} deep and"
            f" {vision['hidden_size']} wide on {vision['image_size']} px in patches of"
            f" {vision['patch_size']} (SHA-256 {about['sha256'][:12]}); scores of another one cannot be"
            " compared with these."
        )

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "B d"]:
        """Unit vectors of pictures on white. They are 8-bit, because the processor divides by 255."""
        pixels = self._images(list(pictures), return_tensors="pt")["pixel_values"].to(hosting.device())
        return _unit(self._model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def embed_captions(
        self, captions: Sequence[str]
    ) -> tuple[Float[np.ndarray, "B d"], Bool[np.ndarray, " B"]]:
        """Unit vectors of captions, and which captions were longer than `max_tokens` and are cut off."""
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        whole = self._tokenizer(list(captions)).input_ids
        made = self._model.get_text_features(
            input_ids=tokens.input_ids.to(hosting.device()),
            attention_mask=tokens.attention_mask.to(hosting.device()),
        )
        return _unit(made.pooler_output), np.array([len(ids) > self.max_tokens for ids in whole])


def _unit(vectors: torch.Tensor) -> Float[np.ndarray, "B d"]:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
