"""DINO's features of pictures (Caron et al. 2021; DINOv2: Oquab et al. 2024), by transformers."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from recon_torch import hosting
from recon_torch.errors import UserError, first_line

KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # of models, in their config.json
SIZE_PX = 224  # at which all of these are evaluated; DINOv2's own pictures are larger
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which they were trained
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


class DinoEncoder(nn.Module):
    """The class token of a DINO vision transformer, frozen.

    Attributes:
        num_features: of the token. identity: tells the features of two models apart.
    """

    def __init__(self, directory: str | Path) -> None:
        """directory: config.json and model.safetensors in the layout of transformers.

        Raises UserError if that is no DINO, or transformers is not installed.
        """
        super().__init__()
        self.transformer = _load(Path(directory)).requires_grad_(False).eval()
        config = self.transformer.config
        self._kind, self.num_features = config.model_type, config.hidden_size
        self.size_px = min(SIZE_PX, config.image_size) // config.patch_size * config.patch_size
        token = self.transformer.embeddings.cls_token.detach().float().numpy()
        self.identity = f"{self._kind}-{hashlib.sha256(token.tobytes()).hexdigest()[:8]}"
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, frames: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B features"]:
        """frames: in [0, 1], of any size; they are brought to the model's."""
        size = (self.size_px, self.size_px)
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
        # The others interpolate without being told.
        options = {"interpolate_pos_encoding": True} if self._kind == "vit" else {}
        return self.transformer((frames - self.mean) / self.std, **options).last_hidden_state[:, 0]


def _load(directory: Path) -> nn.Module:
    transformers = _library()
    if not (directory / "config.json").is_file():
        raise UserError(f"no DINO model in {directory}; give a directory with config.json and safetensors")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        if config.model_type not in KINDS:
            raise UserError(f"{directory} is a {config.model_type}, no DINO; known are {', '.join(KINDS)}")
        # Never pickles; transformers would leave what a file lacks at random values.
        model, found = transformers.AutoModel.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot load the DINO model in {directory} ({first_line(error)}); copy it again"
        ) from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(
            f"the DINO model in {directory} lacks {len(missing)} weights, such as {missing[0]}; copy it again"
        )
    return model


def _library():
    """transformers, without its log."""
    hosting.declare()
    try:
        transformers = importlib.import_module("transformers")  # slow
    except ImportError as error:
        message = f'transformers cannot be imported ({error}); install it with pip install "im3d[dino]"'
        raise UserError(message) from None
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers
