"""Torch models of diffusers and transformers inside the JAX process: loaded from local files, frozen, freed.

Both libraries are optional, so they are imported when the first model is asked for. Weights come from
safetensors only, because the other formats run code when they are read, and nothing is ever fetched.
"""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError

from recon_torch import hosting
from recon_torch.errors import UserError

LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What diffusers and transformers raise for files that are missing, damaged or of something else."""


def library(name: str) -> ModuleType:
    """diffusers or transformers, without their log. Raises UserError if it is not installed."""
    hosting.declare()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        message = f'{name} cannot be imported ({error}); install it with pip install "im3d[hosted]"'
        raise UserError(message) from None
    logging = importlib.import_module(f"{name}.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return module


def device() -> torch.device:
    """Where hosted models run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release() -> None:
    """Gives the memory of models that nobody holds any longer back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_json(path: str | Path, name: str, what: str) -> dict:
    """A model's description in a local directory, such as its config.json.

    Args:
        what: where the path comes from, for errors.

    Raises UserError if it is not there or is not JSON.
    """
    try:
        return json.loads((Path(path) / name).read_text())
    except OSError:
        raise UserError(f"{what}: no {name} in {str(path)!r}; give the directory of a saved model") from None
    except ValueError as error:
        raise UserError(f"{what}: {Path(path) / name} is not JSON ({error}); fetch it again") from None


def load(
    model_class,
    path: str | Path,
    what: str,
    dtype: torch.dtype = torch.float32,
    allow_extra: bool = False,
) -> torch.nn.Module:
    """A model from a local directory, on `device()`, frozen, with every tensor accounted for.

    Args:
        model_class: of diffusers or transformers.
        what: where the path comes from, for errors.
        allow_extra: accept tensors that the class has no use for, such as the vision half of CLIP for text.

    Raises UserError for a directory without safetensors and for weights that are damaged or do not fit.
    """
    read_json(path, "config.json", what)
    options = {"variant": variant(path, what), "use_safetensors": True, "local_files_only": True}
    try:
        model, info = model_class.from_pretrained(str(path), output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: {path} does not load as {model_class.__name__}: {brief(error)}") from None
    problems = {"lacks": info["missing_keys"], "has an unknown tensor": info["unexpected_keys"]}
    for problem, names in problems.items():
        if names and not (allow_extra and problem != "lacks"):
            raise UserError(f"{what}: {path}, read as {model_class.__name__}, {problem} {min(names)}")
    return model.to(device(), dtype).eval().requires_grad_(False)


def variant(folder: str | Path, what: str) -> str | None:
    """The variant of the weights below a folder: "fp16" if there is nothing else, None for plain ones.

    Raises UserError if there are no safetensors.
    """
    names = [file.name for file in Path(folder).rglob("*.safetensors")]
    if not names:
        raise UserError(
            f"{what}: no .safetensors weights in {folder}; pickled ones are not read, convert them"
        )
    return "fp16" if all(".fp16." in name or ".fp16-" in name for name in names) else None


def brief(error: Exception) -> str:
    """An error of another library as a part of a line of ours: its first line, or two."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]
