"""Torch models of diffusers and transformers, loaded from local files and frozen.

Both libraries are optional, so they are imported when the first model is needed. Weights come from
safetensors alone, because the other formats run code when they are read, and nothing is ever fetched.
"""

from __future__ import annotations

import enum
import gc
import hashlib
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from recon_torch import weights_files
from recon_torch.errors import UserError
from recon_torch.text_files import read_settings

LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
"""What diffusers and transformers raise for files that are missing, damaged or of something else."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""A directory with one of these holds a tokeniser."""

MODEL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Suffixes of the files that say what a model computes."""

_declared: list[torch.library.Library] = []
"""What `declare` has declared, which lasts as long as these objects."""


class Dtype(enum.StrEnum):
    """What a hosted network may compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def declare() -> None:
    """Lets torchvision's CUDA build be imported beside a CPU-only torch. Call it before the first import.

    Package indexes that serve a CPU-only torch often have torchvision with CUDA alone. It registers kernels
    for operators that such a torch has never heard of, and its import fails, with that of lpips and
    transformers. This declares the missing operators, once.
    """
    if torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(declared)


def library(name: str, extra: str = "hosted") -> ModuleType:
    """Imports diffusers or transformers and silences its log.

    Args:
        extra: of our package, which installs it.

    Raises UserError if it is not installed.
    """
    declare()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        message = f'{name} cannot be imported ({error}); install it with pip install "im3d[{extra}]"'
        raise UserError(message) from None
    logging = importlib.import_module(f"{name}.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return module


def device() -> torch.device:
    """The device on which hosted models run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release() -> None:
    """Gives the memory of models that nobody holds any longer back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_json(path: str | Path, name: str, what: str) -> dict:
    """Reads a model's description in a local directory, such as its config.json.

    Args:
        what: where the path comes from, for errors.

    Raises UserError if it is not there, is no object of JSON, or is that of a whole pipeline in place of one
    model.
    """
    with _naming(what):
        if (Path(path) / name).is_file():
            return read_settings(Path(path) / name)
        weights_files.refuse_pipeline(Path(path))
        raise UserError(f"no {name} in {str(path)!r}; give the directory of a saved model")


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Says in a UserError where the path comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def load(
    model_class: type[Any],
    path: str | Path,
    what: str,
    dtype: torch.dtype = torch.float32,
    *,
    place: torch.device | None = None,
    allow_extra: bool = False,
    unused: str | None = None,
) -> torch.nn.Module:
    """Loads a model from a local directory, frozen; see `read_model`.

    Args:
        place: the device that the model goes to, by default `device()`.
    """
    model = read_model(model_class, path, what, allow_extra=allow_extra, unused=unused)
    check_finite(model, dtype, f"{what}: {path}")
    return model.to(place or device(), dtype).eval().requires_grad_(False)


def check_finite(model: torch.nn.Module, dtype: torch.dtype, what: str) -> None:
    """Raises UserError that names a parameter with NaN, infinity, or a value that `dtype` does not hold."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (rounded := parameter.detach().to(dtype)).isfinite().all():
            worst = parameter.detach()[~rounded.isfinite()][0].item()
            lost = f", which {str(dtype).removeprefix('torch.')} does not hold; choose another type"
            raise UserError(f"{what}: {name} holds {worst:.6g}{lost if math.isfinite(worst) else ''}")


def read_model(
    model_class: type[Any],
    path: str | Path,
    what: str,
    *,
    allow_extra: bool = False,
    unused: str | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Reads a model from a local directory, with every tensor accounted for.

    Args:
        model_class: of diffusers or transformers.
        what: where the path comes from, for errors.
        allow_extra: accept tensors that the class has no use for, such as the vision half of CLIP for text.
        unused: prefix of parameters that may be missing, because nobody calls them.
        options: for `from_pretrained`.

    Raises UserError for a directory without safetensors and for weights that are damaged or do not fit.
    """
    read_json(path, "config.json", what)
    options |= {"variant": variant(path, what), "use_safetensors": True, "local_files_only": True}
    with _naming(what):
        weights_files.check_directory(Path(path))
    try:
        model, info = model_class.from_pretrained(str(path), output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: {path} does not load as {model_class.__name__}: {brief(error)}") from None
    # The libraries would leave what a file lacks at random values.
    missing = [name for name in info["missing_keys"] if not (unused and name.startswith(unused))]
    extra = [] if allow_extra else info["unexpected_keys"]
    for problem, names in (("lacks", missing), ("has an unknown tensor", extra)):
        if names:
            found = f"{problem} {min(names)} ({len(names)} such)"
            raise UserError(f"{what}: {path}, read as {model_class.__name__}, {found}; copy it again")
    return model


def digest(path: str | Path) -> str:
    """The SHA-256, in hex, of the files in a model's directory that say what it computes."""
    sha = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in MODEL_SUFFIXES:
            with file.open("rb") as opened:
                sha.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def load_part(part_class: type[Any], path: str | Path, what: str, **options: Any) -> Any:
    """Loads what goes with a model, such as its tokeniser, from the model's directory.

    Args:
        part_class: of transformers, with a `from_pretrained`.
        what: where the path comes from, for errors.
        options: for `from_pretrained`.

    Raises UserError if it is not there or does not load.
    """
    try:
        return part_class.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **options
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: no {part_class.__name__} loads from {path}: {brief(error)}") from None


def load_tokenizer(tokenizer_class: type[Any], path: str | Path, what: str) -> Any:
    """Loads a tokeniser, see `load_part`. transformers would make an empty one where its vocabulary lacks."""
    if not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{what}: no tokeniser in {path} ({', '.join(TOKENIZER_FILES)}); copy it there")
    return load_part(tokenizer_class, path, what)


def variant(folder: str | Path, what: str) -> str | None:
    """The variant of the weights below a folder: "fp16" if there is no other, None for plain ones.

    Raises UserError if there are no safetensors.
    """
    names = [file.name for file in Path(folder).rglob("*.safetensors")]
    if not names:
        raise UserError(
            f"{what}: no .safetensors weights in {folder}; pickled ones are not read, convert them"
        )
    return "fp16" if all(".fp16." in name or ".fp16-" in name for name in names) else None


def brief(error: Exception) -> str:
    """An error of another library as a part of a line of ours.

    That is its first line, and the second if the first ends with a colon, at most 200 characters.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]
