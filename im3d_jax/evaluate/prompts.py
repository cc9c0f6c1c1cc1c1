"""Part `prompts`: captions alone -> images -> turntables, to be judged by eye on a contact sheet.

No number here knows what the prompt asked for. The one that is taken, LPIPS between neighbouring views, says
whether the views hang together; true turntables of the same captions' objects give its scale.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.evaluate.scores import change_between_neighbours
from im3d_jax.evaluate.truth import Truth
from im3d_jax.evaluate.views import BATCH, for_sheet, turntables
from im3d_jax.generate import progress, stream
from im3d_jax.generator import Generator
from recon_torch import export
from recon_torch.losses import PerceptualDistance


def measure(generator: Generator, truth: Truth, perceptual: PerceptualDistance, sheet: Path) -> dict:
    """Each prompt's change between neighbouring views, and writes the contact sheet: image, 7 more views."""
    latents = images(generator, truth.captions)
    videos = turntables(generator, truth.captions, latents, "prompts' views")
    stills, _ = generator.decode(latents[:, None])
    rows = []
    for b, prompt in enumerate(truth.captions):
        changes = [change_between_neighbours(rgb, perceptual) for rgb in (videos[b][0], truth.rgb[b])]
        rows.append({"prompt": prompt, "neighbour_lpips": changes[0], "true_neighbour_lpips": changes[1]})
    pictures = [
        np.concatenate([still, for_sheet(rgb)[1:]])
        for still, (rgb, _) in zip(np.asarray(stills), videos, strict=True)
    ]
    export.write_image(sheet, export.contact_sheet(pictures, truth.captions))
    return {"objects": rows}


def images(generator: Generator, prompts: list[str]) -> Float[Array, "B h w c"]:
    """The latent image of each prompt."""
    made = []
    starts = range(0, len(prompts), BATCH)
    with progress("prompts' images", generator.config.text_to_image.num_steps * len(starts)) as bar:
        for start in starts:
            chosen = [prompts[i % len(prompts)] for i in range(start, start + BATCH)]
            key = stream(jax.random.key(generator.config.seed), f"prompts' images {start}")
            made.append(generator.text_to_image(chosen, key, lambda *_: bar.update())[:, 0])
    return jnp.concatenate(made)[: len(prompts)]
