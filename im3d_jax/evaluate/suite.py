"""The parts of an evaluation on one set of test objects, and the files of their results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from im3d_jax.data.objects import Split
from im3d_jax.evaluate import Part, assets, prompts, result_file, results, views
from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.scores import MAX_PSNR_DB
from im3d_jax.evaluate.truth import Objects, Truth
from im3d_jax.pipeline import Pipeline
from recon_torch.elevation.estimator import estimate
from recon_torch.files import replacing, write_json
from recon_torch.losses.lpips import PerceptualDistance

NUM_ELEVATION_OBJECTS = 200
NUM_TRAINING_OBJECTS = 128
"""Objects whose mean view is a baseline of the part `views`."""


class Suite:
    """What the parts share: the loaded model, the test objects, LPIPS, and where results are kept.

    Attributes:
        pipeline: the model.
        objects: the test objects, and training objects whose mean is a baseline.
        seed: of the sampling.
        out: directory for all results.
        num_objects: test objects of the parts `views` and `prompts`.
        num_asset_objects: test objects of the part `assets`, at most `num_objects`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        objects: Objects,
        seed: int,
        out: Path,
        num_objects: int,
        num_asset_objects: int,
    ) -> None:
        """Loads LPIPS. Raises UserError if its weights cannot be found."""
        self.pipeline, self.objects, self.seed, self.out = pipeline, objects, seed, out
        self.num_objects, self.num_asset_objects = num_objects, min(num_asset_objects, num_objects)
        settings = pipeline.settings
        self.perceptual = PerceptualDistance(settings.fit.lpips_net, settings.fit.lpips_weights)

    @cached_property
    def truth(self) -> Truth:
        return self.objects.render(self.num_objects)

    @property
    def digest(self) -> str:
        """A digest of config and weights: results under the same digest are of the same model."""
        return f"{self.pipeline.settings.config_digest[:16]}-{self.weights_digest[:16]}"

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256, in hex, of the parameters of the network and of the elevation's estimator."""
        return digest_of_weights(self.pipeline)

    @property
    def key(self) -> str:
        """What results are kept under: they are of the same model on the same objects."""
        return f"{self.digest} {self.objects.about}"

    def measure(self, part: Part) -> dict[str, Any]:
        """The result of a part, measured now or kept from an earlier run."""
        parts = {
            Part.VIEWS: (self.measure_views, self.num_objects),
            Part.ASSETS: (self.measure_assets, self.num_asset_objects),
            Part.PROMPTS: (self.measure_prompts, self.num_objects),
            Part.ELEVATION: (self.measure_elevation, NUM_ELEVATION_OBJECTS),
        }
        make, count = parts[part]
        return results.kept(self.out / "parts" / f"{part}.json", f"{self.key} {count} objects", make)

    def measure_views(self) -> dict[str, Any]:
        generator = self.pipeline.generator
        one_step = dataclasses.replace(generator, video=dataclasses.replace(generator.video, num_steps=1))
        training_mean = truths.mean_turntable(self.objects.render(NUM_TRAINING_OBJECTS, Split.TRAIN))
        return views.measure(
            generator,
            one_step,
            self.pipeline.estimator,
            self.truth,
            training_mean,
            self.perceptual,
            seed=self.seed,
            sheet=self.out / "views.png",
        )

    def measure_assets(self) -> dict[str, Any]:
        count, settings = self.num_asset_objects, self.pipeline.settings
        with closing(self.pipeline.start_client()) as client:
            azimuths_rad = truths.azimuths_between_rad(settings.num_views)
            return assets.measure(
                self.pipeline.generator,
                client,
                self.pipeline.estimator,
                self.objects.render(count),
                self.objects.render(count, azimuths_rad=azimuths_rad),
                self.perceptual,
                seed=self.seed,
                until_steps=settings.until_steps,
                directory=self.out / "assets",
                key=self.key,
            )

    def measure_prompts(self) -> dict[str, Any]:
        sheet = self.out / "prompts.png"
        return prompts.measure(
            self.pipeline.generator, self.truth, self.perceptual, seed=self.seed, sheet=sheet
        )

    def measure_elevation(self) -> dict[str, Any]:
        truth = self.objects.render(NUM_ELEVATION_OBJECTS)
        estimates_rad = [estimate(self.pipeline.estimator, torch.from_numpy(rgb)) for rgb in truth.rgb]
        rows = zip(truth.indices, np.rad2deg(truth.elevations_rad), np.rad2deg(estimates_rad), strict=True)
        keys = ("index", "elevation_deg", "estimated_elevation_deg")
        return {"objects": [dict(zip(keys, row, strict=True)) for row in rows]}

    def about(self) -> list[str]:
        """Remarks without which the tables would mislead."""
        settings = self.pipeline.settings
        lpips = f"LPIPS with {settings.fit.lpips_net}"
        if self.perceptual.random_weights:
            lpips += (
                " and **random backbone weights** (none were given): it orders the rows of one table, but is"
                " not the published metric and cannot be compared with other papers"
            )
        return [
            f"Objects: {self.objects.about}, of the test split, which training never meets; {settings.size} "
            f"px, {settings.num_views} views.",
            f"{lpips}.",
            f"PSNR is the mean of each view's, capped at {MAX_PSNR_DB:g} dB; in the foreground each pixel "
            "counts by its true coverage. A silhouette is what is at least half covered.",
            f"Config and weights: `{self.digest}`.",
        ]

    def content(self, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The content of results.json of the parts that are done: the common entries, and each part."""
        settings, rows = self.pipeline.settings, results.rows(done)
        protocol = {
            "objects": self.objects.about,
            "size": settings.size,
            "num_views": settings.num_views,
            "lpips": settings.fit.lpips_net,
            "lpips_has_random_weights": self.perceptual.random_weights,
        }
        common = result_file.content(
            "suite",
            protocol,
            rows,
            methods=[{"name": name} for name in result_file.by_method(rows)],
            config_digest=settings.config_digest,
            weights_digest=self.weights_digest,
            seeds={"sampling": self.seed},
            about=self.about(),
        )
        return {**common, "model": self.digest, **done}


def digest_of_weights(pipeline: Pipeline) -> str:
    """SHA-256, in hex, of the parameters of the network and of the elevation's estimator."""
    weights = hashlib.sha256()
    for array in jax.tree.leaves(pipeline.generator.params):
        weights.update(np.ascontiguousarray(array).tobytes())
    for tensor in pipeline.estimator.state_dict().values():
        weights.update(np.ascontiguousarray(tensor).tobytes())
    return weights.hexdigest()


def evaluate(suite: Suite, parts: Sequence[Part]) -> str:
    """Measures the parts one after the other, writes all tables anew after each, and returns them."""
    done: dict[str, dict[str, Any]] = {}
    for part in parts:
        done[str(part)] = suite.measure(part)
        text = results.report(done, suite.about())
        with replacing(suite.out / "table.md") as temporary:
            temporary.write_text(text)
        write_json(suite.out / result_file.NAME, suite.content(done))
    return text
