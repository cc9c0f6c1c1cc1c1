"""Embeddings of prompts on disk, so that training runs without the text encoders."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from im3d_jax.conditions.text import Embeddings, Masks
from recon_torch.errors import UserError, quoted
from recon_torch.files import make_directory, replacing, write_json
from recon_torch.outputs import Kind
from recon_torch.text_files import read_json

SHARD_PROMPTS = 1024
"""Prompts of one file, which has 240 MB for 77 float32 tokens of CLIP's 768 channels."""

BATCH_PROMPTS = 64
"""Prompts that are encoded at a time."""

INDEX = "index.json"

EMBEDDINGS = Kind("embed", (r"index\.json", r"\d{5,}\.safetensors"), grows=True)
"""What a directory of embeddings holds."""


class StoredDtype(StrEnum):
    """The type of the numbers in the files."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@runtime_checkable
class Encoder(Protocol):
    """One encoder whose embeddings are stored, such as a `TokenEncoder`.

    Attributes:
        digest: equal digests mean equal embeddings.
        shape: (tokens, channels) of a prompt.
    """

    @property
    def digest(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def encode(self, prompts: Sequence[str]) -> tuple[Float[np.ndarray, "B L d"], Float[np.ndarray, "B L"]]:
        """Embeddings of B prompts, and a mask that is 1 at the tokens that count."""


def write(
    encoders: Sequence[Encoder],
    prompts: Sequence[str],
    out: str | Path,
    dtype: StoredDtype = StoredDtype.FLOAT32,
) -> int:
    """Encodes prompts, and the empty one that training needs for guidance, into a directory.

    Prompts that come again are encoded once. Files that are whole stay as they are, and the index comes last,
    so a directory that has one is whole.

    Returns the number of prompts that had to be encoded.
    """
    out = make_directory(out)
    prompts = list(dict.fromkeys(["", *prompts]))
    digests = [encoder.digest for encoder in encoders]
    shards: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(prompts), SHARD_PROMPTS)):
        part = prompts[start : start + SHARD_PROMPTS]
        key = hashlib.sha256(json.dumps([digests, dtype, part]).encode()).hexdigest()
        shards.append({"file": f"{number:05d}.safetensors", "key": key, "prompts": part})
    missing = [shard for shard in shards if _key(out / shard["file"]) != shard["key"]]
    if missing:
        (out / INDEX).unlink(missing_ok=True)
    total = sum(len(shard["prompts"]) for shard in missing)
    with tqdm(total=total, desc="prompts", disable=None, file=sys.stderr) as bar:
        for shard in missing:
            tensors = _encode(encoders, shard["prompts"], dtype, bar)
            with replacing(out / shard["file"]) as temporary:
                save_file(tensors, temporary, metadata={"key": shard["key"]})
    shapes = [encoder.shape for encoder in encoders]
    index = {"encoders": digests, "shapes": shapes, "dtype": dtype, "shards": shards}
    write_json(out / INDEX, index)
    return total


def _encode(
    encoders: Sequence[Encoder], prompts: Sequence[str], dtype: StoredDtype, bar: tqdm
) -> dict[str, np.ndarray]:
    """The tensors of one file: text_0 [N, L, d] and mask_0 [N, L] of the first encoder, and so on."""
    parts: dict[str, list] = {}
    for start in range(0, len(prompts), BATCH_PROMPTS):
        batch = prompts[start : start + BATCH_PROMPTS]
        for number, encoder in enumerate(encoders):
            embeddings, mask = encoder.encode(batch)
            parts.setdefault(f"text_{number}", []).append(embeddings.astype(dtype))
            parts.setdefault(f"mask_{number}", []).append(mask)
        bar.update(len(batch))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _key(path: Path) -> str:
    """The key of what a file was written for; "" if there is no file or it is damaged."""
    try:
        with safe_open(path, framework="numpy") as opened:
            return (opened.metadata() or {}).get("key", "")
    except (OSError, SafetensorError):
        return ""


class PrecomputedText:
    """The text encoder that serves what `write` left in a directory. It reads only what is asked for."""

    words = ()

    def __init__(self, path: str | Path):
        """Reads the index. Raises UserError if there is none."""
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise UserError(f"config.text: no whole {INDEX} in {path}; write it with `im3d embed`")
        try:
            index = read_json(self.path / INDEX)
            self.shapes = tuple(tuple(shape) for shape in index["shapes"])
            self._shards = [(str(shard["file"]), shard["key"]) for shard in index["shards"]]
            self._places = {
                str(prompt): (number, row)
                for number, shard in enumerate(index["shards"])
                for row, prompt in enumerate(shard["prompts"])
            }
        except UserError as error:
            raise UserError(f"config.text: {error}; write it with `im3d embed`") from None
        except (LookupError, TypeError):
            raise UserError(
                f"config.text: {self.path / INDEX} is no index of embeddings; write it with `im3d embed`"
            ) from None
        self._opened: dict[int, safe_open] = {}

    def warnings(self, prompt: str) -> list[str]:
        return []  # `im3d embed`, which has encoded them, has given them

    def understands(self, prompt: str) -> bool:
        return True

    def encode(self, prompts: Sequence[str]) -> tuple[Embeddings, Masks]:
        """Embeddings and masks of the prompts, float32, one for each encoder.

        Raises UserError for a prompt that is not in the directory.
        """
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
        found = np.concatenate(rows).astype(np.float32)
        if not np.isfinite(found).all():
            bad = prompts[int(np.argmin(np.isfinite(found).reshape(len(prompts), -1).all(1)))]
            raise UserError(
                f"config.text: {self.path} has NaN or infinity for {quoted(bad)}; run `im3d embed` anew"
            )
        return found

    def _shard(self, number: int) -> safe_open:
        if number not in self._opened:
            file, key = self._shards[number]
            path = self.path / Path(file).name
            if _key(path) != key:
                raise UserError(
                    f"config.text: {path} is missing, damaged or not the index's; run `im3d embed`"
                )
            self._opened[number] = safe_open(path, framework="numpy")
        return self._opened[number]
