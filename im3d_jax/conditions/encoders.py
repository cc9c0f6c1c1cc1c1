"""Frozen text and image encoders: CLIP (Radford et al. 2021), T5 (Raffel et al. 2020) and UMT5 (Chung et al.
2023), hosted in torch.

Emu Video's network attends to the tokens of a CLIP and of a T5 encoder (Girdhar et al. 2023), its public
relatives to those of CLIP, of a prompt or of an image, and Wan's to those of UMT5. The encoders are never
trained, so they run outside JAX, once for each prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Array, Float
from torch import Tensor

from im3d_jax.conditions.text import Embeddings, Masks
from recon_torch import hosting, ranges
from recon_torch.blur import convolve, gaussian_window
from recon_torch.errors import UserError, quoted
from recon_torch.ranges import Range

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
"""A directory with one of these holds a tokeniser."""

CACHED_PROMPTS = 1024
"""Prompts whose embeddings stay in memory: 1 GB for two encoders of 77 tokens and 1024 and 2048 channels."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the RGB channels in CLIP's training pictures."""


class EncoderKind(StrEnum):
    """A family of pretrained text encoders."""

    CLIP = "clip"
    T5 = "t5"
    UMT5 = "umt5"


CLASSES: dict[str, tuple[str, str]] = {
    EncoderKind.CLIP: ("CLIPTextModel", "CLIPTokenizer"),
    EncoderKind.T5: ("T5EncoderModel", "T5Tokenizer"),
    EncoderKind.UMT5: ("UMT5EncoderModel", "T5Tokenizer"),
}
"""Classes of transformers for each kind: the model and its tokeniser."""

T5_KINDS = (EncoderKind.T5, EncoderKind.UMT5)
"""The kinds that are T5 by their layout, the second with places of its own in every layer."""


@dataclass(frozen=True)
class TokenEncoder:
    """One frozen CLIP, T5 or UMT5 with its tokeniser: prompts to the embeddings of their tokens.

    Both load at first use.

    Attributes:
        kind: "clip", "t5" or "umt5".
        path: directory of the model in transformers' layout, such as `text_encoder` of a diffusers pipeline.
        tokenizer: directory of its tokeniser. "" stands for `path` if there is one in it, and otherwise for
            the one that pipelines have beside it, where `text_encoder_2` goes with `tokenizer_2`.
        max_length: number of tokens, start and end included. Shorter prompts are padded to it.
        layer: the layer whose output is taken. -1 is the last, after the final norm, as in SD 1.5 and T5; -2
            is the one before, without a norm, as in SDXL.
        mask_padding: whether this encoder and the backbone ignore the padding. None stands for what the kind
            was trained with: T5 has a mask; CLIP has none, and models of its images attend to all 77 tokens.
            UMT5 has one too, and its padding is zeros in what `encode` returns, because Wan's networks were
            trained to attend to 512 tokens of which these are zeros.
    """

    kind: EncoderKind | str
    path: str
    tokenizer: str = ""
    max_length: Annotated[int, Range(2, 4096)] = 77
    layer: Annotated[int, Range(-100, -1)] = -1
    mask_padding: bool | None = None

    def __post_init__(self):
        positions = self._config.get("max_position_embeddings")
        if self.kind == EncoderKind.CLIP and positions and self.max_length > positions:
            raise UserError(
                f"config.text: max_length {self.max_length}, but {self.path} has {positions} positions"
            )
        if self.mask_padding is None:
            object.__setattr__(self, "mask_padding", self.kind in T5_KINDS)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, channels) of a prompt, which is known without loading the weights."""
        return self.max_length, self._config["d_model" if self.kind in T5_KINDS else "hidden_size"]

    def encode(self, prompts: Sequence[str]) -> tuple[Float[np.ndarray, "B L d"], Float[np.ndarray, "B L"]]:
        """The tokens' embeddings, and a mask that is 1 where a backbone attends."""
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        mask = tokens.attention_mask if self.mask_padding else torch.ones_like(tokens.attention_mask)
        with torch.inference_mode():
            device = hosting.device()
            inputs = {"attention_mask": mask.to(device)} if self.mask_padding else {}
            output = self.model(tokens.input_ids.to(device), output_hidden_states=self.layer != -1, **inputs)
            chosen = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        embeddings, attended = chosen.cpu().numpy(), mask.numpy().astype(np.float32)
        if self.kind == EncoderKind.UMT5:
            embeddings = embeddings * attended[..., None]
        return embeddings, attended

    def cut_off(self, prompt: str) -> str:
        """What is left out of a prompt that is longer than `max_length` tokens; "" if it fits."""
        room = self.max_length - self._tokenizer.num_special_tokens_to_add()
        spans = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return prompt[spans[room][0] :].strip() if len(spans) > room else ""

    def unknown(self, prompt: str) -> list[str]:
        """The words that the tokeniser has no pieces for: T5 replaces them, and CLIP spells them in bytes."""
        return [word for word in prompt.split() if self._is_unknown(word)]

    def _is_unknown(self, word: str) -> bool:
        ids = self._tokenizer(word, add_special_tokens=False).input_ids
        if self.kind in T5_KINDS:
            return self._tokenizer.unk_token_id in ids
        spelled = [character for character in word if character.isalnum() or not character.isascii()]
        return not "".join(spelled).isascii() and len(ids) >= len(spelled)

    def close(self) -> None:
        """Frees the model. The next use loads it again."""
        self.__dict__.pop("model", None)
        hosting.release()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the settings and of the files' content: equal digests, equal embeddings."""
        settings = dataclasses.asdict(self) | {"path": "", "tokenizer": ""}
        sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for folder in (Path(self.path), self._tokenizer_directory):
            for file in sorted(folder.iterdir()):
                if file.suffix in (".json", ".txt", ".model", ".safetensors"):
                    with file.open("rb") as opened:
                        sha.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return sha.hexdigest()

    @cached_property
    def _config(self) -> dict:
        config = hosting.read_json(self.path, "config.json", "config.text")
        return config.get("text_config", config)  # a whole CLIP has one for each half

    @cached_property
    def model(self) -> torch.nn.Module:
        """The encoder, on its device; loaded at first use."""
        model_class = getattr(hosting.library("transformers"), CLASSES[self.kind][0])
        # The other half of the checkpoint is there too: CLIP's vision, T5's decoder, SDXL's projection.
        return hosting.load(model_class, self.path, "config.text", allow_extra=True)

    @cached_property
    def _tokenizer(self):
        tokenizer_class = getattr(hosting.library("transformers"), CLASSES[self.kind][1])
        try:
            return tokenizer_class.from_pretrained(str(self._tokenizer_directory), local_files_only=True)
        except hosting.LOADING_ERRORS as error:
            where = f"tokeniser in {self._tokenizer_directory}"
            raise UserError(f"config.text: the {where} does not load: {hosting.brief(error)}") from None

    @cached_property
    def _tokenizer_directory(self) -> Path:
        path = Path(self.path)
        beside = path.with_name(path.name.replace("text_encoder", "tokenizer"))
        candidates = [Path(self.tokenizer)] if self.tokenizer else [path, beside]
        for folder in candidates:
            if any((folder / name).is_file() for name in TOKENIZER_FILES):
                return folder
        raise UserError(f"config.text: no tokeniser in {candidates[-1]}; name its directory as `tokenizer`")


class PretrainedText:
    """The text encoder of a backbone that attends to frozen CLIP, T5 and UMT5 encoders.

    Each prompt is encoded once, because the last ones stay in memory.
    """

    words = ()  # they read any text

    def __init__(self, encoders: Sequence[Mapping[str, Any]]):
        """encoders: the arguments of a `TokenEncoder` each, in the order in which the backbone takes them.

        Raises UserError for arguments that a `TokenEncoder` does not take, and for those that are missing.
        """
        known = {field.name for field in dataclasses.fields(TokenEncoder)}
        for each in encoders:
            if wrong := set(each) - known:
                raise UserError(f"config.text: an encoder takes no {', '.join(sorted(wrong))}; remove it")
            if missing := {"kind", "path"} - set(each):
                raise UserError(f"config.text: an encoder has no {' and no '.join(sorted(missing))}; add it")
            ranges.check_arguments(TokenEncoder, each, "config.text.kwargs.encoders")
        self.encoders = tuple(
            TokenEncoder(**{**each, "kind": EncoderKind(each["kind"])}) for each in encoders
        )
        self._cache: dict[str, tuple] = {}

    @property
    def cached(self) -> list[str]:
        """The prompts whose embeddings are in memory, the newest last."""
        return list(self._cache)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, channels) for each encoder."""
        return tuple(encoder.shape for encoder in self.encoders)

    def encode(self, prompts: Sequence[str]) -> tuple[Embeddings, Masks]:
        """Embeddings and masks of the prompts, one for each encoder.

        The empty prompt is what it was in training: the start and end tokens alone, or T5's end token.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if new:
            encoded = [encoder.encode(new) for encoder in self.encoders]
            for row, prompt in enumerate(new):
                self._cache[prompt] = tuple((text[row], mask[row]) for text, mask in encoded)
        rows = [self._cache[prompt] for prompt in prompts]
        for oldest in self.cached[:-CACHED_PROMPTS]:
            del self._cache[oldest]
        stacked = [
            [np.stack(parts) for parts in zip(*column, strict=True)] for column in zip(*rows, strict=True)
        ]
        return tuple(text for text, _ in stacked), tuple(mask for _, mask in stacked)

    def warnings(self, prompt: str) -> list[str]:
        """Sentences on what does not fit into the tokens of each encoder, and on what its tokeniser lacks."""
        warnings = []
        for encoder in self.encoders:
            if rest := encoder.cut_off(prompt):
                kept = f"the {encoder.kind} encoder reads {encoder.max_length} tokens and leaves out"
                warnings.append(f"{kept} {quoted(rest)}")
            if unknown := encoder.unknown(prompt):
                words = quoted(" ".join(dict.fromkeys(unknown)))
                warnings.append(f"the {encoder.kind} encoder has no tokens for the words {words}")
        return warnings

    def understands(self, prompt: str) -> bool:
        """Whether an encoder knows one of the words."""
        words = prompt.split()
        return any(len(encoder.unknown(prompt)) < len(words) for encoder in self.encoders)

    def close(self) -> None:
        """Frees the models. What was encoded stays."""
        for encoder in self.encoders:
            encoder.close()


class ImageEncoder:
    """CLIP's image encoder, which SVD and I2VGen-XL attend to. It loads at first use."""

    def __init__(self, path: str):
        """path: directory of a CLIPVisionModelWithProjection, such as `image_encoder` of a pipeline."""
        config = hosting.read_json(path, "config.json", "config.image_encoder")
        config = config.get("vision_config", config)
        size = config.get("image_size") if isinstance(config, dict) else None
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise UserError(f"config.image_encoder: {path} has no image_size in config.json; copy it again")
        self.path, self.size = path, size

    def encode(self, rgb: Float[Array | np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B 1 d"]:
        """The images as one token each. `rgb` is in [0, 1], over the backbone's background of training."""
        pixels = torch.from_numpy(np.array(rgb, np.float32)).to(hosting.device()).permute(0, 3, 1, 2)
        # SVD maps to [-1, 1] before the resize; this changes the rounding alone.
        resized = resize_antialiased(pixels * 2 - 1, self.size) / 2 + 0.5
        mean, deviation = (
            torch.tensor(x, device=pixels.device).reshape(3, 1, 1) for x in (CLIP_MEAN, CLIP_DEVIATION)
        )
        with torch.inference_mode():
            embedding = self.model((resized - mean) / deviation).image_embeds
        return embedding[:, None].cpu().numpy()

    def close(self) -> None:
        """Frees the model. The next use loads it again."""
        self.__dict__.pop("model", None)
        hosting.release()

    @cached_property
    def model(self) -> torch.nn.Module:
        """The encoder, on its device; loaded at first use."""
        model_class = hosting.library("transformers").CLIPVisionModelWithProjection
        return hosting.load(model_class, self.path, "config.image_encoder", allow_extra=True)


def resize_antialiased(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C {size} {size}"]:
    """SVD's resize: a Gaussian blur that suits the factor, then bicubic with aligned corners."""
    for axis in (2, 3):
        images = _blur(images, axis, images.shape[axis] / size)
    return torch.nn.functional.interpolate(images, (size, size), mode="bicubic", align_corners=True)


def _blur(images: Float[Tensor, "B C H W"], axis: int, factor: float) -> Float[Tensor, "B C H W"]:
    """Blurs along one axis by the standard deviation that scikit-image takes for a reduction by `factor`."""
    deviation = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * deviation, 3)) | 1  # two deviations to each side; odd
    padding = [0, 0, 0, 0]
    first = 2 * (3 - axis)  # torch names the paddings of the last axis first
    padding[first : first + 2] = [taps // 2] * 2
    padded = torch.nn.functional.pad(images, padding, mode="reflect")
    return convolve(padded, gaussian_window(taps, deviation, images.dtype, images.device), axis)
