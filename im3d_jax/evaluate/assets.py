"""Part `assets`: the whole method from the true first view and caption, judged from azimuths no fit has seen.

After each round the asset is rendered half a step between the turntable's azimuths. The cameras there have
the true elevation even where the fit was given an estimated one: if that is wrong, the asset leans, and its
score is lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.results import kept
from im3d_jax.evaluate.scores import Judge
from im3d_jax.evaluate.truth import Truth
from im3d_jax.evaluate.views import for_sheet
from im3d_jax.generator import Generator
from im3d_jax.method import fit_and_refine, sample_video
from im3d_jax.stages import Stages
from recon_torch.elevation.estimator import Estimator, estimate
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process import ReconstructionClient
from recon_torch.views.cameras import orbit
from recon_torch.views.images import contact_sheet, write_image


def measure(
    generator: Generator,
    client: ReconstructionClient,
    estimator: Estimator,
    truth: Truth,
    between: Truth,
    perceptual: PerceptualDistance,
    *,
    seed: int,
    until_steps: Sequence[int],
    directory: Path,
    key: str,
) -> dict[str, Any]:
    """Scores every object's asset after every round, with the elevation estimated and with the true one.

    Args:
        between: the same objects from `azimuths_between_rad`.
        until_steps: see `method.fit_and_refine`.
        directory: gets each object's result and contact sheet. Results that it holds under `key` are kept.
    """
    rows = []
    for b, index in enumerate(truth.indices):
        sheet = directory / f"{index:04d}.png"
        make = partial(
            measure_one, generator, client, estimator, truth, between, b, perceptual, seed, until_steps, sheet
        )
        row = kept(directory / f"{index:04d}.json", key, make)
        rows.append({name: row[name] for name in ("index", "caption", "fits")})
    return {"objects": rows}


def measure_one(
    generator: Generator,
    client: ReconstructionClient,
    estimator: Estimator,
    truth: Truth,
    between: Truth,
    b: int,
    perceptual: PerceptualDistance,
    seed: int,
    until_steps: Sequence[int],
    sheet: Path,
) -> dict[str, Any]:
    """One video of object `b`, fitted twice: with the estimated elevation and with the true one."""
    caption, key = truth.captions[b], jax.random.fold_in(jax.random.key(seed), truth.indices[b])
    stages = Stages()
    given = generator.condition([caption], truth.rgb[b, :1], truth.alpha[b, :1])
    video = sample_video(generator, given, key, stages)

    judge = Judge((between.rgb[b], between.alpha[b]), perceptual)
    num_views, size = generator.num_views, generator.size
    azimuths_rad = truths.azimuths_between_rad(num_views)
    unseen = orbit(num_views, truth.elevations_rad[b], size, azimuths_rad=azimuths_rad)
    elevations_rad = {
        "estimated": estimate(estimator, torch.from_numpy(np.array(video[0][0]))),
        "true": float(truth.elevations_rad[b]),
    }
    rows, labels, fits = [for_sheet(between.rgb[b])], [caption], {}
    for name, elevation_rad in elevations_rad.items():
        client.reset(orbit(num_views, elevation_rad, size))
        scores = []
        rounds = fit_and_refine(generator, client, given, video, elevation_rad, key, until_steps, stages)
        for number, _ in enumerate(rounds):
            renders, alphas = (tensor.cpu().numpy() for tensor in client.render(unseen))
            scores.append(judge((renders, alphas))._asdict())
            rows.append(for_sheet(renders))
            labels.append(f"{name} elevation, round {number}")
        fits[name] = {"elevation_deg": float(np.rad2deg(elevation_rad)), "rounds": scores}
    write_image(sheet, contact_sheet(rows, labels, tile_px=64))
    return {"index": truth.indices[b], "caption": caption, "fits": fits, "seconds_by_stage": stages.seconds()}
