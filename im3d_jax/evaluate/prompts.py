"""Part `prompts`: captions alone -> images -> turntables, to be judged by eye on a contact sheet.

No number here knows what the prompt asked for. The one that is taken, LPIPS between neighbouring views, says
whether the views hang together; true turntables of the same captions' objects give its scale.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from im3d_jax.evaluate.scores import Pictures, change_between_neighbours
from im3d_jax.evaluate.truth import Truth
from im3d_jax.evaluate.views import BATCH, for_sheet, turntables
from im3d_jax.generator import Generator
from im3d_jax.random_streams import stream
from im3d_jax.stages import progress
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.views.images import contact_sheet, write_image


def measure(generator: Generator, truth: Truth, perceptual: PerceptualDistance, sheet: Path) -> dict:
    """Each prompt's change between neighbouring views, and writes the contact sheet: image, 7 more views."""
    stills = images(generator, truth.captions)
    videos = turntables(generator, truth.captions, stills, "prompts' views")
    rows = []
    for b, prompt in enumerate(truth.captions):
        changes = [change_between_neighbours(rgb, perceptual) for rgb in (videos[b][0], truth.rgb[b])]
        rows.append({"prompt": prompt, "neighbour_lpips": changes[0], "true_neighbour_lpips": changes[1]})
    pictures = [
        np.concatenate([still[None], for_sheet(rgb)[1:]])
        for still, (rgb, _) in zip(stills[0], videos, strict=True)
    ]
    write_image(sheet, contact_sheet(pictures, truth.captions))
    return {"objects": rows}


def images(generator: Generator, prompts: list[str]) -> Pictures:
    """(rgb [B, H, W, 3], alpha [B, H, W, 1]) of the prompts."""
    made = []
    starts = range(0, len(prompts), BATCH)
    with progress("prompts' images", generator.config.text_to_image.num_steps * len(starts)) as bar:
        for start in starts:
            chosen = [prompts[i % len(prompts)] for i in range(start, start + BATCH)]
            key = stream(jax.random.key(generator.config.seed), f"prompts' images {start}")
            made.append(generator.text_to_image(chosen, key, lambda *_: bar.update()))
    rgb, alpha = (np.concatenate(parts)[: len(prompts)] for parts in zip(*made, strict=True))
    return rgb, alpha
