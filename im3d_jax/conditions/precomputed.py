"""Embeddings of prompts on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from im3d_jax.conditions.encoders import PretrainedText
from recon_torch.errors import UserError
from recon_torch.files import make_directory, replacing, write_json

SHARD_PROMPTS = 1024  # of one file: 240 MB for 77 float32 tokens of CLIP's 768 channels

BATCH_PROMPTS = 64

INDEX = "index.json"


def write(text: PretrainedText, prompts: Sequence[str], out: str | Path, dtype: str = "float32") -> int:
    """Encodes prompts, and the empty one that training needs for guidance, into a directory.

    Args:
        prompts: repeated ones are encoded once.
        dtype: of the files, "float32" or "float16".

    Returns the number of prompts that had to be encoded: those of finished shards stay as they are. The
    index comes last, so a directory that has one is whole.
    """
    out = make_directory(out)
    prompts = list(dict.fromkeys(["", *prompts]))
    encoders = [encoder.digest for encoder in text.encoders]
    shards = []
    for number, start in enumerate(range(0, len(prompts), SHARD_PROMPTS)):
        part = prompts[start : start + SHARD_PROMPTS]
        key = hashlib.sha256(json.dumps([encoders, dtype, part]).encode()).hexdigest()
        shards.append({"file": f"{number:05d}.safetensors", "key": key, "prompts": part})
    missing = [shard for shard in shards if _key(out / shard["file"]) != shard["key"]]
    if missing:
        (out / INDEX).unlink(missing_ok=True)
    total = sum(len(shard["prompts"]) for shard in missing)
    with tqdm(total=total, desc="prompts", disable=None, file=sys.stderr) as bar:
        for shard in missing:
            tensors = _encode(text, shard["prompts"], dtype, bar)
            with replacing(out / shard["file"]) as temporary:
                save_file(tensors, temporary, metadata={"key": shard["key"]})
    index = {"encoders": encoders, "shapes": text.shapes, "dtype": dtype, "shards": shards}
    write_json(out / INDEX, index)
    return total


def _encode(text: PretrainedText, prompts: Sequence[str], dtype: str, bar: tqdm) -> dict[str, np.ndarray]:
    """A shard's tensors: text_0 [N, L, d] and mask_0 [N, L] of the first encoder, and so on."""
    parts: dict[str, list] = {}
    for start in range(0, len(prompts), BATCH_PROMPTS):
        batch = prompts[start : start + BATCH_PROMPTS]
        for number, encoder in enumerate(text.encoders):
            embeddings, mask = encoder.encode(batch)
            parts.setdefault(f"text_{number}", []).append(embeddings.astype(dtype))
            parts.setdefault(f"mask_{number}", []).append(mask)
        bar.update(len(batch))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _key(path: Path) -> str:
    """What a shard was written for; "" if there is none or it is damaged."""
    try:
        with safe_open(path, framework="numpy") as opened:
            return (opened.metadata() or {}).get("key", "")
    except (OSError, SafetensorError):
        return ""


class PrecomputedText:
    """The text encoder that serves what `write` left in a directory; it reads only what is asked for.

    Raises UserError for a directory without an index, and when a prompt is asked for that is not in it.
    """

    words = ()

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            index = json.loads((self.path / INDEX).read_text())
        except (OSError, ValueError):
            raise UserError(f"config.text: no whole {INDEX} in {path}; write it with `im3d embed`") from None
        self.shapes = tuple(tuple(shape) for shape in index["shapes"])
        self._shards = index["shards"]
        self._places = {
            prompt: (number, row)
            for number, shard in enumerate(self._shards)
            for row, prompt in enumerate(shard["prompts"])
        }
        self._opened: dict[int, safe_open] = {}

    def warnings(self, prompt: str) -> list[str]:
        return []

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[tuple[Float[np.ndarray, "B L d"], ...], tuple[Float[np.ndarray, "B L"], ...]]:
        """Embeddings and masks of the prompts, float32, one for each encoder."""
        if absent := [prompt for prompt in prompts if prompt not in self._places]:
            raise UserError(
                f"config.text: {self.path} has no prompt {absent[0]!r}; add it to the prompts of `im3d embed`"
            )
        numbers = range(len(self.shapes))
        text, mask = ([self._rows(f"{name}_{n}", prompts) for n in numbers] for name in ("text", "mask"))
        return tuple(text), tuple(mask)

    def _rows(self, name: str, prompts: Sequence[str]) -> np.ndarray:
        rows = []
        for number, row in (self._places[prompt] for prompt in prompts):
            rows.append(self._shard(number).get_slice(name)[row : row + 1])
        return np.concatenate(rows).astype(np.float32)

    def _shard(self, number: int) -> safe_open:
        if number not in self._opened:
            shard = self._shards[number]
            path = self.path / Path(shard["file"]).name
            if _key(path) != shard["key"]:
                raise UserError(
                    f"config.text: {path} is missing, damaged or not the index's; run `im3d embed`"
                )
            self._opened[number] = safe_open(path, framework="numpy")
        return self._opened[number]
