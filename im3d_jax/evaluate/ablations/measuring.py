"""Makes the assets of rows, and scores them from azimuths that no fit has seen.

What is shared: the true views, and the first video of an object by all rows that sample it alike (those of
Table 2, of Fig. 4 and 6, and most of Table 3). Refined videos begin with renders of a row's own fit, so each
row makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float

from im3d_jax import generator as generators
from im3d_jax import pipeline
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.evaluate import result_file, results
from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.ablations.fewer_views import FewerViews
from im3d_jax.evaluate.ablations.rows import Ready
from im3d_jax.evaluate.faithfulness import Embedder
from im3d_jax.evaluate.scores import Judge
from im3d_jax.evaluate.suite import digest_of_weights
from im3d_jax.evaluate.truth import Objects
from im3d_jax.evaluate.views import for_sheet
from im3d_jax.evidence import Video
from im3d_jax.generator import Generator
from im3d_jax.method import fit_and_refine, sample_video
from im3d_jax.pipeline import Pipeline
from im3d_jax.stages import Stages
from recon_torch.elevation.estimator import estimate
from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process import ReconstructionClient
from recon_torch.views.cameras import orbit
from recon_torch.views.images import read_image, to_uint8, write_image

DIGITS = 16  # of digests in paths


class Sampled(NamedTuple):
    """A first video, and what it took."""

    video: Video
    calls: int
    seconds: float


class Seen(NamedTuple):
    """An object: what the method is given of it, and what it is compared with."""

    number: int
    caption: str
    picture: tuple[Float[np.ndarray, "1 H W 3"], Float[np.ndarray, "1 H W 1"]]
    elevation_rad: float
    between: Float[np.ndarray, "K H W 3"]
    judge: Judge


Cell = dict[str, Any]
"""What was measured of a row on an object; its "failed" says why there are no scores."""


@dataclass
class Bench:
    """What all rows share.

    Attributes:
        num_views, size: of the config without overrides; the true views are of these.
        seed: of the sampling.
        perceptual: LPIPS as a score, of the config without overrides.
        clip: scores renders against caption and picture, as the paper's tables do; None for none.
        cells: by digest of a row and index of an object.
    """

    objects: Objects
    count: int
    num_views: int
    size: int
    seed: int
    perceptual: PerceptualDistance
    protocol: Mapping[str, Any]
    clip: Embedder | None
    out: Path
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    weights_digests: dict[str, str] = field(default_factory=dict)

    def measure(self, rows: Sequence[Ready], after_object: Callable[[], object]) -> None:
        """Measures all rows, object by object, so that a run that is cut short has whole objects.

        after_object: called when an object has all rows of a network, once there is any score.

        Raises UserError for weights that cannot be loaded.
        """
        self.truth = self.objects.render(self.count)
        azimuths_rad = truths.azimuths_between_rad(self.num_views)
        self.between = self.objects.render(self.count, azimuths_rad=azimuths_rad)
        by_model: dict[str, dict[str, Ready]] = {}
        for each in rows:
            by_model.setdefault(each.model_digest, {}).setdefault(each.digest, each)
        for same in by_model.values():
            self._measure(list(same.values()), after_object)

    def _measure(self, rows: Sequence[Ready], after_object: Callable[[], object]) -> None:
        """Measures rows of one network."""
        first = pipeline.load(rows[0].config)
        self.weights_digests[rows[0].model_digest] = digest_of_weights(first)
        loaded = {rows[0].digest: first}
        with closing(first.start_client()) as client:
            for b in range(len(self.truth)):
                seen = self._seen(b)
                for each in rows:
                    if each.digest not in loaded:
                        loaded[each.digest] = _like(first, each)
                    cell = self._cell(loaded[each.digest], client, each, seen)
                    self.cells[each.digest, seen.number] = cell
                if any("failed" not in cell for cell in self.cells.values()):
                    after_object()

    def _seen(self, b: int) -> Seen:
        truth, between = self.truth, self.between
        return Seen(
            truth.indices[b],
            truth.captions[b],
            (truth.rgb[b, :1], truth.alpha[b, :1]),
            float(truth.elevations_rad[b]),
            between.rgb[b],
            Judge((between.rgb[b], between.alpha[b]), self.perceptual),
        )

    def _weights_of(self, each: Ready) -> str:
        return self.weights_digests[each.model_digest][:DIGITS]

    def _cell(self, loaded: Pipeline, client: ReconstructionClient, each: Ready, seen: Seen) -> Cell:
        """A row on an object, measured now or kept from an earlier run. One that fails is tried again."""

        def make() -> Cell:
            print(f"object {seen.number}, {each.row.name}", flush=True)
            sampled = self._sampled(loaded, each, seen)
            own: ReconstructionClient = client
            if each.row.frames is not None:
                own = FewerViews(client, each.row.frames)
            cell, renders = self._asset(loaded, own, seen, sampled)
            write_image(self.strip(each, seen.number), np.concatenate(list(for_sheet(renders)), 1))
            return cell

        path = self.strip(each, seen.number).with_suffix(".json")
        key = f"{self._weights_of(each)} {result_file.digest(self.protocol)[:DIGITS]}"
        try:
            return results.kept(path, key, make)
        except UserError as error:
            print(f"object {seen.number}, {each.row.name}: {error}", flush=True)
            return {"failed": str(error)}

    def strip(self, each: Ready, index: int) -> Path:
        """Where some renders of a row are kept, side by side."""
        return self.out / "cells" / each.digest[:DIGITS] / f"{index:04d}.png"

    def strip_views(self, each: Ready, index: int) -> Float[np.ndarray, "k H W 3"]:
        """These renders."""
        strip = read_image(self.strip(each, index))[..., :3]
        return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], axis=1))

    def _sampled(self, loaded: Pipeline, each: Ready, seen: Seen) -> Sampled:
        """The first video of an object, sampled once for all rows that sample it alike."""
        path = self.out / "videos" / each.video_digest[:DIGITS] / f"{seen.number:04d}.npz"
        key = f"{self._weights_of(each)} {self.objects.about} seed {self.seed}"
        try:
            with np.load(path) as kept:
                if str(kept["key"]) == key:
                    video = Video(jnp.array(kept["rgb"]), jnp.array(kept["alpha"]))
                    return Sampled(video, int(kept["calls"]), float(kept["seconds"]))
        except Exception:  # there is none, or it is damaged in one of the ways in which a zip file can be
            pass
        stages, counting = Stages(), loaded.generator.counting()
        video = sample_video(counting, self._given(loaded, seen), self._key(seen), stages)
        sampled = Sampled(video, counting.count.calls, stages.seconds()["video"])
        rgb, alpha = np.asarray(video.rgb), np.asarray(video.alpha)
        with replacing(path) as temporary:
            np.savez(temporary, key=key, rgb=rgb, alpha=alpha, calls=sampled.calls, seconds=sampled.seconds)
        return sampled

    def _key(self, seen: Seen) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), seen.number)

    def _given(self, loaded: Pipeline, seen: Seen) -> Conditioning:
        return loaded.generator.condition([seen.caption], *seen.picture, _known_rad(loaded))

    def _asset(
        self, loaded: Pipeline, client: ReconstructionClient, seen: Seen, sampled: Sampled
    ) -> tuple[Cell, Float[np.ndarray, "K H W 3"]]:
        """Makes the asset of a row by the method, and scores its renders after each round."""
        settings, counting, stages = loaded.settings, loaded.generator.counting(), Stages()
        elevation_rad = _known_rad(loaded)
        if elevation_rad is None:
            elevation_rad = estimate(loaded.estimator, torch.from_numpy(np.array(sampled.video[0][0])))
        client.reset(orbit(settings.num_views, elevation_rad, self.size), settings.fit)
        unseen = orbit(
            self.num_views,
            seen.elevation_rad,
            self.size,
            azimuths_rad=truths.azimuths_between_rad(self.num_views),
        )
        given, until_steps, scores = self._given(loaded, seen), settings.until_steps, []
        made = fit_and_refine(
            counting, client, given, sampled.video, elevation_rad, self._key(seen), until_steps, stages
        )
        for each in made:
            renders, alphas = (tensor.cpu().numpy().copy() for tensor in client.render(unseen))
            judged = seen.judge((renders, alphas))._asdict() | self._by_clip(renders, seen)
            scores.append(judged | {"fit_psnr": each.quality["psnr"]})
        seconds = stages.seconds()
        cell = {
            "index": seen.number,
            "caption": seen.caption,
            "rounds": scores,
            "network_calls": sampled.calls + counting.count.calls,
            "fit_seconds": seconds["fit"],
            "asset_seconds": sampled.seconds + seconds["fit"] + seconds.get("renoise_denoise", 0.0),
            "num_gaussians": client.num_gaussians,
        }
        return cell, renders

    def _by_clip(self, renders: Float[np.ndarray, "K H W 3"], seen: Seen) -> dict[str, float]:
        """The scores of the paper's tables, see `faithfulness`."""
        if self.clip is None:
            return {}
        embedded = self.clip.embed_pictures(list(to_uint8(renders)))
        picture = self.clip.embed_pictures([to_uint8(seen.picture[0][0])])[0]
        found = {"clip_image": float(100 * (embedded @ picture).mean())}
        if seen.caption:
            text = self.clip.embed_captions([seen.caption])[0][0]
            found["clip_text"] = float(100 * (embedded @ text).mean())
        return found


def _known_rad(loaded: Pipeline) -> float | None:
    """The elevation that the config gives; None if it is to be estimated from the video."""
    deg = loaded.settings.elevation_deg
    return None if deg is None else float(np.deg2rad(deg))


def _like(first: Pipeline, each: Ready) -> Pipeline:
    """The pipeline of a row that has the same network as another one, whose parameters it shares."""
    made: Generator = generators.load(each.config, first.generator.params)
    return Pipeline(made, pipeline.load_estimator(each.config), pipeline.read_settings(each.config))


def final(cell: Cell) -> Iterator[tuple[str, float | None]]:
    """The scores of a cell as a result file has them: those after the last round, and what it cost."""
    yield from cell["rounds"][-1].items()
    for name in ("network_calls", "fit_seconds", "asset_seconds"):
        yield name, cell[name]
