"""Part `views`: are the other views of the turntable right, given the true first view and the caption?

The generated views 1 ... K-1 are compared with the truth. Beside them stand the views generated without the
caption, those of a single step of the sampler, two baselines and, as a bound on what blur alone can reach,
the mean of the object's own true views.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float

from im3d_jax.evaluate.scores import FirstViews, Judge, Pictures
from im3d_jax.evaluate.truth import Truth
from im3d_jax.generator import Generator
from im3d_jax.random_streams import stream
from im3d_jax.stages import progress
from recon_torch.elevation.estimator import Estimator, estimate
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.views.images import contact_sheet, write_image

BATCH = 4
"""Objects at a time. A last, smaller batch is filled up, so that one compiled program serves all."""

SHEET_VIEWS = 8

GENERATED = "generated, image and caption"
REPEATED = "baseline: first view repeated"
TRAINING_MEAN = "baseline: mean training view"


def measure(
    generator: Generator,
    one_step: Generator,
    estimator: Estimator,
    truth: Truth,
    training_mean: Pictures,
    perceptual: PerceptualDistance,
    *,
    seed: int,
    sheet: Path,
) -> dict[str, Any]:
    """Scores every candidate on every object, and estimates the elevation from the generated views.

    Args:
        one_step: a generator of the same weights whose videos take a single step.
        training_mean: (rgb, alpha) of `truth.mean_turntable` on training objects.
        sheet: where to write the contact sheet.
    """
    images = truth.rgb[:, 0], truth.alpha[:, 0]
    no_captions = [""] * len(truth)
    candidates = {
        GENERATED: turntables(generator, truth.captions, images, seed, "views"),
        "generated, image alone": turntables(generator, no_captions, images, seed, "views without text"),
        "one step, image and caption": turntables(
            one_step, truth.captions, images, seed, "views in one step"
        ),
        REPEATED: [repeated(rgb, alpha) for rgb, alpha in zip(truth.rgb, truth.alpha, strict=True)],
        TRAINING_MEAN: [training_mean] * len(truth),
        "bound on blur: the object's own mean view": [
            own_mean(rgb, alpha) for rgb, alpha in zip(truth.rgb, truth.alpha, strict=True)
        ],
    }
    rows = []
    with progress("score views", len(truth)) as bar:
        for b in range(len(truth)):
            judge = Judge((truth.rgb[b, 1:], truth.alpha[b, 1:]), perceptual)
            judged = {name: judge((views[b][0][1:], views[b][1][1:])) for name, views in candidates.items()}
            estimate_rad = estimate(estimator, torch.from_numpy(candidates[GENERATED][b][0]))
            row: dict[str, Any] = {"index": truth.indices[b], "caption": truth.captions[b]}
            row["category"] = truth.categories[b]
            row["scores"] = {name: score._asdict() for name, score in judged.items()}
            row["elevation_deg"] = float(np.rad2deg(truth.elevations_rad[b]))
            row["estimated_elevation_deg"] = float(np.rad2deg(estimate_rad))
            rows.append(row)
            bar.update()
    write_sheet(sheet, truth, candidates[GENERATED])
    return {"objects": rows}


def turntables(
    generator: Generator, captions: list[str], images: FirstViews, seed: int, what: str
) -> list[Pictures]:
    """Generated turntables (rgb, alpha) of B objects from their captions and first views.

    `what` names them in the progress bar, and their random stream.
    """
    count, pictures = len(captions), list[Pictures]()
    total = generator.video.num_steps * len(range(0, count, BATCH))
    with progress(what, total) as bar:
        for start in range(0, count, BATCH):
            chosen = np.arange(start, start + BATCH) % count
            rgb, alpha = (part[chosen] for part in images)
            given = generator.condition([captions[i] for i in chosen], rgb, alpha)
            key = stream(jax.random.key(seed), f"{what} {start}")
            latents = generator.turntable(given, key, lambda *_: bar.update())
            rgb, alpha = (np.array(x) for x in generator.decode(latents))
            pictures += zip(rgb, alpha, strict=True)
    return pictures[:count]


def repeated(rgb: Float[np.ndarray, "K H W 3"], alpha: Float[np.ndarray, "K H W 1"]) -> Pictures:
    """View 0 in place of every view."""
    return np.broadcast_to(rgb[:1], rgb.shape), np.broadcast_to(alpha[:1], alpha.shape)


def own_mean(rgb: Float[np.ndarray, "K H W 3"], alpha: Float[np.ndarray, "K H W 1"]) -> Pictures:
    """The mean of the object's true views in place of every view."""
    return np.broadcast_to(rgb.mean(0), rgb.shape), np.broadcast_to(alpha.mean(0), alpha.shape)


def write_sheet(path: Path, truth: Truth, generated: list[Pictures]) -> None:
    """Writes two rows for each object: the true views above the generated ones."""
    rows, labels = [], []
    for b, caption in enumerate(truth.captions):
        rows += [for_sheet(truth.rgb[b]), for_sheet(generated[b][0])]
        labels += [caption, "generated"]
    write_image(path, contact_sheet(rows, labels, tile_px=64))


def for_sheet(views: Float[np.ndarray, "K H W 3"]) -> Float[np.ndarray, "k H W 3"]:
    """At most 8 evenly spaced views, from view 0."""
    return views[:: -(-len(views) // SHEET_VIEWS)].clip(0, 1)
