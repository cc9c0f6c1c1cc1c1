"""Part `assets`: the whole loop from the true first view and caption, seen from azimuths no fit has seen.

After each round the asset is rendered half a step between the turntable's azimuths, from the true elevation
also where the fit was given an estimated one: then the asset leans, and the score says so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch

from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.results import kept
from im3d_jax.evaluate.scores import Judge
from im3d_jax.evaluate.truth import Truth
from im3d_jax.evaluate.views import for_sheet
from im3d_jax.generator import Generator
from im3d_jax.method import fit_and_refine
from im3d_jax.random_streams import stream
from im3d_jax.stages import Stopwatch, progress
from recon_torch.elevation import estimator as elevation
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process.client import ReconClient
from recon_torch.views.cameras import orbit
from recon_torch.views.images import contact_sheet, write_image


def measure(
    generator: Generator,
    client: ReconClient,
    estimator: elevation.ElevationEstimator,
    truth: Truth,
    between: Truth,
    perceptual: PerceptualDistance,
    directory: Path,
    key: str,
) -> dict:
    """Scores of every object's asset after every round, with the elevation estimated and the true one.

    Args:
        between: the same objects from `azimuths_between_rad`.
        directory: takes each object's result and contact sheet; those that are there under `key` are kept.
    """
    rows = []
    for b, index in enumerate(truth.indices):
        sheet = directory / f"{index:04d}.png"
        make = partial(measure_one, generator, client, estimator, truth, between, b, perceptual, sheet)
        row = kept(directory / f"{index:04d}.json", key, make)
        rows.append({name: row[name] for name in ("index", "caption", "fits")})
    return {"objects": rows}


def measure_one(
    generator: Generator,
    client: ReconClient,
    estimator: elevation.ElevationEstimator,
    truth: Truth,
    between: Truth,
    b: int,
    perceptual: PerceptualDistance,
    sheet: Path,
) -> dict:
    """One video of object `b`, fitted twice: with the elevation read off the video, and with the true one."""
    config, caption = generator.config, truth.captions[b]
    key, seconds = jax.random.fold_in(jax.random.key(config.seed), truth.indices[b]), Stopwatch()
    given = generator.condition([caption], truth.rgb[b, :1], truth.alpha[b, :1])
    with seconds("video"), progress(f"object {b}, video", config.video.num_steps) as bar:
        latents = generator.turntable(given, stream(key, "video"), lambda *_: bar.update())
        video = jax.block_until_ready(generator.decode(latents))

    judge = Judge((between.rgb[b], between.alpha[b]), perceptual)
    azimuths_rad = truths.azimuths_between_rad(config.num_views)
    unseen = orbit(config.num_views, truth.elevations_rad[b], config.size, azimuths_rad=azimuths_rad)
    elevations_rad = {
        "estimated": elevation.estimate(estimator, torch.from_numpy(np.array(video[0][0]))),
        "true": float(truth.elevations_rad[b]),
    }
    rows, labels, fits = [for_sheet(between.rgb[b])], [caption], {}
    for name, elevation_rad in elevations_rad.items():
        client.reset(orbit(config.num_views, elevation_rad, config.size))
        scores = []
        for number, _ in enumerate(fit_and_refine(generator, client, given, video, key, seconds)):
            renders, alphas = (tensor.cpu().numpy() for tensor in client.render(unseen))
            scores.append(judge((renders, alphas))._asdict())
            rows.append(for_sheet(renders))
            labels.append(f"{name} elevation, round {number}")
        fits[name] = {"elevation_deg": float(np.rad2deg(elevation_rad)), "rounds": scores}
    write_image(sheet, contact_sheet(rows, labels, tile_px=64))
    return {"index": truth.indices[b], "caption": caption, "fits": fits, "seconds_by_stage": seconds.report()}
