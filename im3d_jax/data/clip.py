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

PREPROCESSING = ("size", "crop_size", "resample", "image_mean", "image_std")
"""What a result says of the image processor."""


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
            self._images = hosting.load_part(transformers.AutoImageProcessor, path, what)
            self._tokenizer = hosting.load_tokenizer(transformers.AutoTokenizer, path, what)
        self.max_tokens = self._positions()

    def _positions(self) -> int:
        config: Any = self._model.config
        return int(config.text_config.max_position_embeddings)

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
