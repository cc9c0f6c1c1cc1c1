"""Text to image by a local diffusers pipeline, the first arrow of Figure 2.

Paper: Emu, which is not public, draws the image. Here: the backbone itself does (`Generator.text_to_image`),
or any text-to-image pipeline of diffusers, which runs in torch and is freed before the video model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from recon_torch import hosting
from recon_torch.errors import UserError

WHAT = "config.text_to_image.pipeline"


def draw(
    path: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_steps: int,
    template: str = "{}",
    on_step: Callable[[], object] = lambda: None,
) -> list[Float[np.ndarray, "H W 3"]]:
    """Draws a picture of each prompt, in [0, 1] and of the pipeline's size; `pictures.place` makes it view 0.

    The pipeline is loaded and freed within the call, so a run draws all its pictures in one call.

    Args:
        path: directory of the pipeline, with safetensors weights.
        seeds: one for each prompt. The same seed and prompt draw the same picture on the same machine.
        template: what the pipeline is asked for, with the prompt in place of {}. The video model was trained
            on objects over a plain background, which general models draw only if they are asked to.
        on_step: called after each of the `num_steps` steps of each picture.

    Raises UserError for a directory that holds no text-to-image pipeline or does not load, and for a picture
    that the pipeline's safety checker or an overflow has blanked.
    """
    pipeline = load_pipeline(Path(path))
    try:
        return [
            _draw_one(pipeline, template.replace("{}", prompt), seed, num_steps, on_step)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    finally:
        del pipeline
        hosting.release()


def _draw_one(
    pipeline: Any, prompt: str, seed: int, num_steps: int, on_step: Callable[[], object]
) -> Float[np.ndarray, "H W 3"]:
    def callback(pipeline, step, timestep, tensors):
        on_step()
        return tensors

    options: dict[str, Any] = {"num_inference_steps": num_steps, "output_type": "np"}
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        options["callback_on_step_end"] = callback
    # Noise from the CPU, so that a seed does not depend on the device.
    output = pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **options)
    if any(getattr(output, "nsfw_content_detected", None) or []):
        raise UserError(f"{WHAT}: its safety checker blanked {prompt!r}; change the prompt or the seed")
    picture = np.asarray(output.images[0], np.float32)
    if not np.isfinite(picture).all():
        raise UserError(f"{WHAT}: the picture of {prompt!r} is NaN; the weights overflow or are damaged")
    return picture


def load_pipeline(path: Path) -> Any:
    """Loads the pipeline onto the device. No file of it is unpickled and no code in its directory is run."""
    index = _check(path)
    diffusers = hosting.library("diffusers")
    # bfloat16 has float32's range: SDXL's autoencoder overflows in float16.
    dtype = torch.bfloat16 if hosting.device().type == "cuda" else torch.float32
    options = {"use_safetensors": True, "local_files_only": True, "variant": hosting.variant(path, WHAT)}
    models = _models(path, index, dtype)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(path), dtype=dtype, **options, **models)
    except hosting.LOADING_ERRORS as error:
        raise UserError(f"{WHAT}: {path} does not load: {hosting.brief(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(hosting.device())


def _models(path: Path, index: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The pipeline's networks by name. diffusers leaves a tensor that a file lacks at what memory holds."""
    models = {}
    for name, entry in index.items():
        if isinstance(entry, list) and any((path / name).glob("*.safetensors")):
            model_class = _class_of(*entry)
            if isinstance(model_class, type) and issubclass(model_class, torch.nn.Module):
                models[name] = hosting.read_model(model_class, path / name, WHAT, dtype=dtype)
                hosting.check_finite(models[name], dtype, f"{WHAT}: {path / name}")
    return models


def _class_of(library: str, name: str) -> Any:
    """The class of a pipeline's part; None if there is no such class, which diffusers then says."""
    diffusers = hosting.library("diffusers")
    libraries = {"diffusers": diffusers, "transformers": hosting.library("transformers")}
    return getattr(libraries.get(library) or getattr(diffusers.pipelines, library, None), name, None)


def _check(path: Path) -> dict[str, Any]:
    """The pipeline's index: what it is made of.

    Raises UserError, before anything is loaded, if this is not the directory of such a pipeline.
    """
    index = hosting.read_json(path, "model_index.json", WHAT)
    name = index.get("_class_name")
    if not isinstance(name, str) or any(path.rglob("*.py")):
        raise UserError(f"{WHAT}: {path} brings Python code, which is not run; give a pipeline of diffusers")
    pipeline_class = getattr(hosting.library("diffusers"), name, None)
    if pipeline_class is None:
        raise UserError(f"{WHAT}: this diffusers has no {name}, which {path} asks for; use another version")
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "prompt" not in parameters or {"image", "num_frames"} & set(parameters):
        raise UserError(f"{WHAT}: {path} is a {name}, which does not make images of prompts alone")
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise UserError(f"{WHAT}: {folder} has pickled weights alone; convert them to safetensors")
    return index
