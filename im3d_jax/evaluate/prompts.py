"""Part `prompts`: from captions alone to pictures and turntables, which are judged by eye on a contact sheet.

No number here knows what the prompt asks for. The one that is measured, LPIPS between neighbouring views,
says whether the views are consistent; true turntables of objects with the same captions give its scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from im3d_jax.evaluate.scores import FirstViews, change_between_neighbours
from im3d_jax.evaluate.truth import Truth
from im3d_jax.evaluate.views import BATCH, for_sheet, turntables
from im3d_jax.generator import Generator
from im3d_jax.random_streams import stream
from im3d_jax.stages import progress
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.views.images import contact_sheet, write_image


def measure(
    generator: Generator, truth: Truth, perceptual: PerceptualDistance, *, seed: int, sheet: Path
) -> dict[str, Any]:
    """Measures each prompt's change between neighbouring views.

    sheet: where to write the contact sheet, on which each prompt has its picture and 7 more views.
    """
    stills = images(generator, truth.captions, seed)
    videos = turntables(generator, truth.captions, stills, seed, "prompts' views")
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


def images(generator: Generator, prompts: list[str], seed: int) -> FirstViews:
    """Pictures of B prompts: (rgb [B, H, W, 3], alpha [B, H, W, 1])."""
    made = []
    starts = range(0, len(prompts), BATCH)
    with progress("prompts' images", generator.image.num_steps * len(starts)) as bar:
        for start in starts:
            chosen = [prompts[i % len(prompts)] for i in range(start, start + BATCH)]
            key = stream(jax.random.key(seed), f"prompts' images {start}")
            made.append(generator.text_to_image(chosen, key, lambda *_: bar.update()))
    rgb, alpha = (np.concatenate(parts)[: len(prompts)] for parts in zip(*made, strict=True))
    return rgb, alpha
