"""DINO's features of pictures (Caron et al. 2021; DINOv2: Oquab et al. 2024), by transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from recon_torch import hosting
from recon_torch.errors import UserError

WHAT = "config.elevation.dino"
KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
"""The model types, in their config.json, that are DINOs."""

SIZE_PX = 224
"""The side at which all of these are evaluated; DINOv2's own pictures are larger."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's RGB channels, by which training pictures were normalised."""


class DinoEncoder(nn.Module):
    """The class token of a DINO vision transformer, which stays frozen.

    Attributes:
        num_features: length of the token.
        size_px: side of the square pictures that the transformer sees.
        identity: tells the features of two models apart.
    """

    num_features: int
    size_px: int
    mean: Tensor
    std: Tensor

    def __init__(self, directory: str | Path) -> None:
        """Loads the transformer.

        Args:
            directory: holds config.json and model.safetensors in the layout of transformers.

        Raises UserError if that is no DINO, or transformers is not installed.
        """
        super().__init__()
        self.transformer = _load(Path(directory))
        config = self.transformer.config
        self._kind, self.num_features = config.model_type, config.hidden_size
        self.size_px = min(SIZE_PX, config.image_size) // config.patch_size * config.patch_size
        token = self.transformer.embeddings.cls_token.detach().float().numpy()
        self.identity = f"{self._kind}-{hashlib.sha256(token.tobytes()).hexdigest()[:8]}"
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, frames: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B features"]:
        """The class tokens of frames in [0, 1], which are resized to the model's size."""
        size = (self.size_px, self.size_px)
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        # The others interpolate without being told.
        options = {"interpolate_pos_encoding": True} if self._kind == "vit" else {}
        return self.transformer((frames - self.mean) / self.std, **options).last_hidden_state[:, 0]


def _load(directory: Path) -> Any:
    """A transformer, whose attributes are transformers' own."""
    kind = str(hosting.read_json(directory, "config.json", WHAT).get("model_type"))
    if kind not in KINDS:
        raise UserError(f"{WHAT}: {directory} is a {kind}, no DINO; known are {', '.join(KINDS)}")
    model_class = hosting.library("transformers", extra="dino").AutoModel
    return hosting.load(
        model_class, directory, WHAT, place=torch.device("cpu"), allow_extra=True, unused="pooler."
    )
