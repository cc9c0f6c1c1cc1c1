"""How well captions describe pictures, by a CLIP (Radford et al. 2021), as the paper selects its assets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from recon_torch import hosting
from recon_torch.errors import UserError

WHAT = "--model"


class Clip:
    """A CLIP with its image processor and tokeniser, on the device of hosted models.

    Attributes:
        max_tokens: of a caption, start and end included; what is longer is cut off.
    """

    def __init__(self, path: Path):
        """path: a directory with config.json, safetensors, image processor and tokeniser, of transformers.

        Raises UserError if there is no CLIP in it, or files of it are missing or are pickled.
        """
        kind = hosting.read_json(path, "config.json", WHAT).get("model_type")
        if kind != "clip":
            raise UserError(f"{WHAT}: {path} is a {kind}, not a CLIP with both halves; give one")
        transformers = hosting.library("transformers")
        self.path = path
        self._model: Any = hosting.load(transformers.CLIPModel, path, WHAT, allow_extra=True)
        self._images = hosting.load_part(transformers.AutoImageProcessor, path, WHAT)
        self._tokenizer = hosting.load_tokenizer(transformers.AutoTokenizer, path, WHAT)
        self.max_tokens = self._positions()

    def _positions(self) -> int:
        config: Any = self._model.config
        return int(config.text_config.max_position_embeddings)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the files of the CLIP."""
        return hosting.digest(self.path)

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
