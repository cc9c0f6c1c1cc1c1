"""`im3d evaluate`: measures a model on objects of the test split, whose ground truth is known.

    im3d evaluate --suite tiny --out out/evaluation
    im3d evaluate --suite tiny --out out/evaluation --parts views,elevation --num-objects 8

Writes table.md, results.json and contact sheets into OUT. What an earlier run with the same config and
weights has measured there is kept, so an interrupted run goes on where it was: within the assets at the next
object. Remove OUT to measure anew.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
import torch

from im3d_jax import config_flags
from im3d_jax.evaluate import assets, prompts, results, views
from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.scores import MAX_PSNR_DB
from im3d_jax.generator import Generator
from im3d_jax.method import INITIAL_ELEVATION_RAD
from recon_torch.elevation import estimator
from recon_torch.files import replacing, write_json
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process.client import ReconClient
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

SUITES = ("tiny",)

PARTS = ("views", "assets", "prompts", "elevation")

NUM_ELEVATION_OBJECTS = 200

NUM_TRAINING_OBJECTS = 128  # behind the mean training view


class Suite:
    """The parts, each a method that measures and returns what is to be kept, and what they share."""

    def __init__(self, config, num_objects: int, num_asset_objects: int, out: Path):
        """Loads the model. Raises UserError for weights that do not fit or cannot be found."""
        self.config, self.out = config, out
        self.num_objects, self.num_asset_objects = num_objects, min(num_asset_objects, num_objects)
        self.generator = Generator(config)
        self.estimator = estimator.load(
            config.elevation.weights or estimator.TINY_WEIGHTS, config.elevation.dino or None
        )
        self.settings = FitSettings(**config.fit)
        self.perceptual = PerceptualDistance(self.settings.lpips_net, self.settings.lpips_weights)

    @cached_property
    def truth(self) -> truths.Truth:
        return truths.render(self.config, self.num_objects)

    @cached_property
    def digest(self) -> str:
        """Of config and weights: results under the same digest are of the same model."""
        weights = hashlib.sha256()
        for array in jax.tree.leaves(self.generator.params):
            weights.update(np.ascontiguousarray(array))
        for tensor in self.estimator.state_dict().values():
            weights.update(np.ascontiguousarray(tensor))
        return f"{config_flags.config_digest(self.config)[:16]}-{weights.hexdigest()[:16]}"

    def views(self) -> dict:
        single = self.config.copy_and_resolve_references()
        single.video.num_steps = 1
        one_step = Generator(single, self.generator.params)
        training_mean = truths.mean_turntable(truths.render(self.config, NUM_TRAINING_OBJECTS, split="train"))
        sheet = self.out / "views.png"
        return views.measure(
            self.generator, one_step, self.estimator, self.truth, training_mean, self.perceptual, sheet
        )

    def assets(self) -> dict:
        count, azimuths_rad = self.num_asset_objects, truths.azimuths_between_rad(self.config.num_views)
        cameras = orbit(self.config.num_views, INITIAL_ELEVATION_RAD, self.config.size)
        with ReconClient(cameras, self.settings) as client:
            truth = truths.render(self.config, count)
            between = truths.render(self.config, count, azimuths_rad=azimuths_rad)
            return assets.measure(
                self.generator,
                client,
                self.estimator,
                truth,
                between,
                self.perceptual,
                self.out / "assets",
                self.digest,
            )

    def prompts(self) -> dict:
        return prompts.measure(self.generator, self.truth, self.perceptual, self.out / "prompts.png")

    def elevation(self) -> dict:
        truth = truths.render(self.config, NUM_ELEVATION_OBJECTS)
        estimates_rad = [estimator.estimate(self.estimator, torch.from_numpy(rgb)) for rgb in truth.rgb]
        rows = zip(truth.indices, np.rad2deg(truth.elevations_rad), np.rad2deg(estimates_rad), strict=True)
        keys = ("index", "elevation_deg", "estimated_elevation_deg")
        return {"objects": [dict(zip(keys, row, strict=True)) for row in rows]}

    def measure(self, part: str) -> dict:
        """The part's result, measured now or kept from an earlier run."""
        counts = {"assets": self.num_asset_objects, "elevation": NUM_ELEVATION_OBJECTS}
        key = f"{self.digest} {counts.get(part, self.num_objects)} objects"
        return results.kept(self.out / "parts" / f"{part}.json", key, getattr(self, part))

    def about(self) -> list[str]:
        """Remarks without which the tables would mislead."""
        lpips = f"LPIPS with {self.settings.lpips_net}"
        if self.perceptual.random_weights:
            lpips += (
                " and **random backbone weights** (none were given): it orders the rows of one table, but is"
                " not the published metric and cannot be compared with other papers"
            )
        return [
            f"Objects: the first of the test split, which training never meets; {self.config.size} px, "
            f"{self.config.num_views} views.",
            f"{lpips}.",
            f"PSNR is the mean of each view's, capped at {MAX_PSNR_DB:g} dB; in the foreground each pixel "
            "counts by its true coverage. A silhouette is what is at least half covered.",
            f"Config and weights: `{self.digest}`.",
        ]


def evaluate(suite: Suite, parts: list[str]) -> str:
    """Measures the parts one after the other, writes the tables after each, and returns them."""
    done: dict[str, dict] = {}
    for part in parts:
        done[part] = suite.measure(part)
        text = results.report(done, suite.about())
        with replacing(suite.out / "table.md") as temporary:
            temporary.write_text(text)
        write_json(suite.out / "results.json", {"model": suite.digest, "about": suite.about(), **done})
    return text
