"""Captions of rendered objects by a network, for assets that have none (Sec. 3.1).

Paper: 100k assets with captions, chosen by CLIP. Who wrote the captions is unspecified in the paper. Here: an
image captioning network of transformers, such as BLIP (Li et al. 2022), BLIP-2 or GIT, which reads several
views of an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from recon_torch import hosting
from recon_torch.errors import UserError
from recon_torch.hosting import Dtype

WHAT = "--model"
QUESTION = "Describe the object in this picture in one short sentence, without its background."
"""What a model that answers in a chat is asked by default."""


class Combine(StrEnum):
    """What becomes of the captions of several views of an object.

    BEST: the one that the network finds the most likely, by its mean log-likelihood for each token.
    JOINED: all different ones, in the order of the views.
    """

    BEST = "best"
    JOINED = "joined"


class Caption(NamedTuple):
    """A caption, and the mean log-likelihood of its tokens."""

    text: str
    score: float


def combine(captions: Sequence[Caption], how: Combine) -> Caption:
    """One caption of an object from those of its views, of which empty ones do not count.

    The score of joined captions is the mean of theirs. Returns an empty caption if all are.
    """
    said = [each for each in captions if each.text]
    if not said:
        return Caption("", float("-inf"))
    if how == Combine.BEST:
        return max(said, key=lambda each: each.score)
    texts = dict.fromkeys(each.text for each in said)
    return Caption("; ".join(texts), sum(each.score for each in said) / len(said))


class Captioner:
    """An image captioning network with its image processor and tokeniser, on the device of hosted models.

    Attributes:
        path: its directory.
    """

    def __init__(
        self,
        path: Path,
        *,
        prompt: str = "",
        num_beams: int = 1,
        max_tokens: int = 40,
        dtype: Dtype = Dtype.FLOAT32,
    ):
        """Loads the network.

        Args:
            path: a directory with config.json, safetensors, image processor and tokeniser, as transformers
                saves them.
            prompt: the words that captions are to continue or, for a model that chats, the question;
                "" stands for none, or for `QUESTION`.
            num_beams: of the beam search; 1 takes the likeliest token each time.
            max_tokens: the longest caption.

        Raises UserError if there is no such network, or files of it are missing or are pickled.
        """
        transformers = hosting.library("transformers")
        self.path, self._num_beams, self._max_tokens = path, num_beams, max_tokens
        self._kind = _check_kind(path)
        self._dtype = getattr(torch, dtype)
        self._model: Any = hosting.load(
            transformers.AutoModelForImageTextToText, path, WHAT, self._dtype, allow_extra=True
        )
        self._images = hosting.load_part(transformers.AutoImageProcessor, path, WHAT)
        self._tokenizer = hosting.load_tokenizer(transformers.AutoTokenizer, path, WHAT)
        processor = None
        if prompt or _chats(path, self._tokenizer):
            processor = hosting.load_part(transformers.AutoProcessor, path, WHAT)
        self._processor, self._prompt = processor, _as_prompt(processor, prompt)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the files of the network."""
        return hosting.digest(self.path)

    def caption(self, pictures: Sequence[UInt8[ndarray, "H W 3"]]) -> list[Caption]:
        """A caption of each picture, all at once.

        Raises UserError if the network cannot caption pictures like this, or for want of memory.
        """
        try:
            return self._caption(pictures)
        except torch.OutOfMemoryError:
            raise UserError(f"no memory for {len(pictures)} pictures at once; lower --batch-size") from None
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            does = f"{self.path} (a {self._kind}) makes no caption of a picture: {hosting.brief(error)}"
            raise UserError(f"{WHAT}: {does}; give another model, or a --prompt if it needs one") from error

    @torch.inference_mode()
    def _caption(self, pictures: Sequence[UInt8[ndarray, "H W 3"]]) -> list[Caption]:
        inputs = self._inputs(list(pictures))
        made = self._model.generate(
            **inputs,
            max_new_tokens=self._max_tokens,
            num_beams=self._num_beams,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = made.sequences[:, -len(made.scores) :]  # what comes before was given
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = made.sequences_scores if self._num_beams > 1 else self._likelihood(tokens, made.scores)
        return [
            Caption(" ".join(text.split()), float(score))
            for text, score in zip(texts, scores.float(), strict=True)
        ]

    def _inputs(self, pictures: list[UInt8[ndarray, "H W 3"]]) -> dict[str, Any]:
        if self._processor is None:
            inputs = {"pixel_values": self._images(pictures, return_tensors="pt")["pixel_values"]}
        else:
            text = [self._prompt] * len(pictures)
            inputs = dict(self._processor(images=pictures, text=text, return_tensors="pt", padding=True))
        place = hosting.device()
        return {
            name: value.to(place, self._dtype) if value.is_floating_point() else value.to(place)
            for name, value in inputs.items()
        }

    def _likelihood(
        self, tokens: Int[Tensor, "B T"], scores: Sequence[Float[Tensor, "B vocabulary"]]
    ) -> Float[Tensor, " B"]:
        """The mean log-likelihood of the tokens up to the one that ends each caption, and including it."""
        logits = torch.stack(list(scores), 1).float()
        each = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        special = torch.isin(tokens, torch.tensor(self._tokenizer.all_special_ids, device=tokens.device))
        spoken = (~special).cumsum(1)
        # Some networks begin with a special token. A caption ends at the first one after its words.
        ended = (special & (spoken > 0)).cumsum(1) - (special & (spoken > 0)).long()
        counts = ended == 0
        return torch.where(counts, each, 0.0).sum(1) / counts.sum(1)


def _check_kind(path: Path) -> str:
    """The model type of a directory. Raises UserError if transformers has no captioner of this type."""
    hosting.library("transformers")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS

    kind = str(hosting.read_json(path, "config.json", WHAT).get("model_type"))
    if kind not in KINDS:
        raise UserError(f"{WHAT}: {path} is a {kind}, which makes no captions; give a BLIP, BLIP-2 or GIT")
    return kind


def _chats(path: Path, tokenizer: Any) -> bool:
    files = ("chat_template.jinja", "chat_template.json")
    return any((path / file).is_file() for file in files) or bool(tokenizer.chat_template)


def _as_prompt(processor: Any, prompt: str) -> str:
    """The text that goes with every picture."""
    if not getattr(processor, "chat_template", None):
        return prompt
    content = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
