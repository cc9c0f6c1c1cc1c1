"""A loaded model that makes assets: `im3d_jax.load` returns it, `im3d generate` and `im3d batch` run it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from im3d_jax import config_flags, config_sections, generator, inputs, method, parts, sampling_checks
from im3d_jax import sides as sides_module
from im3d_jax.asset import REPORT, Asset, Picture, Request, opened, rank, read_pictures
from im3d_jax.asset_kinds import ASSET, PICTURE
from im3d_jax.conditions import pictures as placement
from im3d_jax.config_kinds import ModelConfig
from im3d_jax.generator import Generator
from im3d_jax.objects import copies
from im3d_jax.settings import (
    AssetSettings,
    ElevationSettings,
    PictureSettings,
    RoundSettings,
    TextToImageSettings,
    TurntableSettings,
)
from im3d_jax.stages import Show, Stages, progress
from recon_torch import locks, outputs, ranges
from recon_torch.elevation import estimator as elevation
from recon_torch.elevation.estimator import ElevationEstimator
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.process import ReconstructionClient
from recon_torch.process.client import ReconClient
from recon_torch.ranges import ElevationDeg, NumRetries, Seed
from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings, Verdict
from recon_torch.views.cameras import orbit
from recon_torch.views.images import write_image

INITIAL_ELEVATION_RAD = 0.3
"""Elevation of the worker's first cameras, before there is a video to estimate one from."""

RETRY_SEED_STEP = 1000
"""Between the seeds of two tries: large, so that no try repeats another of several assets."""


@dataclass(eq=False, repr=False)
class Pipeline:
    """A loaded model that makes assets. Make one with `im3d_jax.load`.

    It is a context manager: at its end, or by `close`, the 3D worker ends that the first asset has started.

    Attributes:
        generator: samples pictures and videos. estimator: tells the elevation of a video.
        settings: everything else that making an asset takes.
    """

    generator: Generator
    estimator: ElevationEstimator
    settings: AssetSettings
    _client: ReconstructionClient | None = field(default=None, init=False)
    _one_at_a_time: Any = field(default_factory=threading.Lock, init=False)

    def make(
        self,
        prompt: str = "",
        *,
        image: str | Path | Sequence[str | Path] = "",
        azimuth_deg: Sequence[float | int] = (),
        seed: int = 0,
        elevation_deg: float | int | None = None,
        out: str | Path | None = None,
        save_views: bool = False,
        retry_seeds: int = 0,
        show: Show = progress,
    ) -> Asset:
        """Makes one asset from a prompt, from a picture, or from both.

        Args:
            prompt: what to make, or what the picture shows.
            image: file with a picture to start from: RGBA, or an object on a plain background. Or several,
                from sides that `azimuth_deg` tells.
            azimuth_deg: of each picture's camera, counter-clockwise seen from above; one of them is 0.
            seed: the same seed makes the same asset on the same machine with as many threads.
            elevation_deg: how high above the object the picture was taken, between -90 and 90, if that is
                known; otherwise it is estimated from the generated video.
            out: directory for the files; None: a temporary one, which lasts as long as the asset.
            save_views: also write the views of every round.
            retry_seeds: so many further seeds are tried while the verdict on the asset is "bad".
            show: shows progress, see `stages.progress`.

        Raises UserError for what cannot be made.
        """
        given = [image] if isinstance(image, str | Path) else image
        images = [str(each) for each in given if str(each)]
        front, sides = sides_module.arranged(images, azimuth_deg)
        request = Request(prompt, front, seed, Path(out or ""), elevation_deg, save_views, sides)
        check(request, self.settings.num_views)
        ranges.taken(retry_seeds, NumRetries, "retry_seeds")
        pictures = read_pictures(request, self.settings.size, self.settings.picture)
        temporary = None if out is not None else Path(tempfile.mkdtemp(dir=locks.process_directory()))
        request = request._replace(out=temporary or request.out)
        try:
            with opened(request):
                if not pictures and self.settings.text_to_image.pipeline:
                    [request] = draw_pictures(self.settings, [request], show)
                self.warn([prompt], pictures)
                with self.own_client() as client:
                    asset = self.make_best(request, client, pictures, retry_seeds, show)
        except BaseException:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if temporary:
            weakref.finalize(asset, shutil.rmtree, temporary, ignore_errors=True)
        return asset

    def make_best(
        self,
        request: Request,
        client: ReconstructionClient,
        pictures: Sequence[Picture] = (),
        num_retries: int = 0,
        show: Show = progress,
    ) -> Asset:
        """Makes an asset in `request.out`, again with other seeds while the verdict is bad.

        Keeps the best of these tries, whose report lists them all. The picture is the same in all tries.
        Several threads may do this, each with a client of its own.

        pictures: of `request.images`, if they have been read already.

        Raises UserError also if something that is not ours lies where the asset is to be written, and if
        another process or thread makes one there.
        """
        pictures = pictures or read_pictures(request, self.settings.size, self.settings.picture)
        with opened(request):
            return self._make_best(request, client, pictures, num_retries, show)

    def _make_best(
        self,
        request: Request,
        client: ReconstructionClient,
        pictures: Sequence[Picture],
        num_retries: int,
        show: Show,
    ) -> Asset:
        best = self._make_once(request, client, pictures, show)
        tries = [best.report]
        while tries[-1]["quality"]["verdict"] == Verdict.BAD and len(tries) <= num_retries:
            with outputs.owned(request.out) as directory:
                seed = request.seed + RETRY_SEED_STEP * len(tries)
                another = request._replace(seed=seed, out=directory)
                made = self._make_once(another, client, pictures, show)
                tries.append(made.report)
                if rank(made.report) < rank(best.report):
                    best = dataclasses.replace(made, directory=request.out)
                    outputs.replace(directory, request.out, ASSET, REPORT)
        if len(tries) > 1:
            told = [{"seed": each["seed"], **each["quality"]} for each in tries]
            report = best.report | {"tries": told}
            best = dataclasses.replace(best, report=report)
            outputs.put(request.out, ASSET, REPORT, lambda path: write_json(path, report))
        return best

    def _make_once(
        self, request: Request, client: ReconstructionClient, pictures: Sequence[Picture], show: Show
    ) -> Asset:
        stages = Stages(show)
        return method.make_asset(
            self.generator, self.estimator, client, self.settings, request, pictures, stages
        )

    @contextmanager
    def own_client(self) -> Iterator[ReconstructionClient]:
        """The pipeline's own 3D worker, which starts when it is first needed. One thread has it at a time."""
        with self._one_at_a_time:
            self._client = self._client or self.start_client()
            yield self._client

    def start_client(self) -> ReconstructionClient:
        """Another 3D worker, which the caller closes. It gets ready while the first video is sampled."""
        settings = self.settings
        return ReconClient(orbit(settings.num_views, INITIAL_ELEVATION_RAD, settings.size), settings.fit)

    def warnings(self, prompt: str) -> list[str]:
        """What the model does not understand of a prompt."""
        return self.generator.text.warnings(prompt)

    def warn(self, prompts: Sequence[str], pictures: Sequence[Picture] = ()) -> None:
        """Says on stderr, once each, what is not understood of prompts, and what is doubtful in pictures."""
        told = [each for prompt in prompts for each in self.warnings(prompt)] + inputs.doubts(pictures)
        for warning in dict.fromkeys(told):
            print(f"im3d: warning: {warning}", file=sys.stderr)

    def close(self) -> None:
        """Ends the 3D worker. The next asset would start another one."""
        if self._client:
            self._client.close()
            self._client = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pipeline with {self.generator!r}>"


# ---- From a config ----


def load(config: ConfigDict) -> Pipeline:
    """The pipeline that a config describes. Raises UserError for weights that are missing or do not fit."""
    settings = read_settings(config)
    return Pipeline(generator.load(config), load_estimator(config), settings)


def load_estimator(config: ConfigDict) -> ElevationEstimator:
    """Loads the estimator of elevation that a config names. Raises UserError for unreadable weights."""
    settings = config_sections.settings(config, "elevation", ElevationSettings)
    with copies.local(settings.weights or elevation.TINY_WEIGHTS, keep=True) as weights:
        return elevation.load(weights, settings.dino or None)


def read_settings(config: ConfigDict) -> AssetSettings:
    """The settings of a config, without loading anything. Raises UserError for values that cannot be."""
    config_sections.require(config, "num_views", "size")
    config_sections.check(config, ModelConfig)
    parts.check(config)
    sampling_checks.check(config)
    return AssetSettings(
        num_views=config.num_views,
        size=config.size,
        rounds_at_steps=tuple(config_sections.settings(config, "rounds", RoundSettings).at_steps),
        config_digest=config_flags.config_digest(config),
        elevation_deg=config_sections.settings(config, "elevation", ElevationSettings).deg,
        clip=generator.clip_settings(config),
        picture=config_sections.settings(config, "image", PictureSettings),
        text_to_image=config_sections.settings(config, "text_to_image", TextToImageSettings),
        turntable=config_sections.settings(config, "turntable", TurntableSettings),
        fit=config_sections.settings(config, "fit", FitSettings),
        gates=config_sections.settings(config, "gates", GateSettings),
        export=config_sections.settings(config, "export", ExportSettings),
        mesh=config_sections.settings(config, "mesh", MeshSettings),
    )


# ---- Requests ----


def check(request: Request, num_views: int) -> None:
    """Raises UserError for a request without prompt and image, or with an impossible seed or elevation, or
    with more pictures than a turntable has views."""
    if not request.prompt.strip() and not request.image:
        raise UserError("nothing to make; give a prompt or an image")
    ranges.taken(request.seed, Seed, "seed")
    ranges.taken(request.elevation_deg, ElevationDeg | None, "elevation_deg")
    if len(request.images) > max(1, num_views):
        raise UserError(
            f"{len(request.images)} images, and config.num_views is {num_views}; give at most as many, or fit"
            " them by im3d fit"
        )


def draw_pictures(
    settings: AssetSettings, requests: Sequence[Request], show: Show = progress
) -> list[Request]:
    """The requests with a picture of each prompt, OUT/input.png, drawn by `config.text_to_image.pipeline`.

    It draws all pictures at once, because it is loaded and freed again within this call. Requests that have a
    picture stay as they are. Raises UserError if the pipeline does not load or blanks a picture.
    """
    from im3d_jax.conditions import text_to_image  # needs the extra "hosted"

    how, asked = settings.text_to_image, [request for request in requests if not request.image]
    if not asked:
        return list(requests)
    for request in asked:
        outputs.check(request.out, PICTURE)
    with show("images", how.num_steps * len(asked)) as bar:
        drawn = text_to_image.draw(
            how.pipeline,
            [request.prompt for request in asked],
            [request.seed for request in asked],
            how.num_steps,
            how.template,
            bar.update,
        )
    paths = {}
    for request, picture in zip(asked, drawn, strict=True):
        name = f"the picture of {request.prompt!r}"
        placement.place(picture, name, settings.size, **settings.picture.placing)  # or raises
        write = partial(write_image, image=picture)  # whole, so that what is doubtful in it is found again
        paths[request.out] = outputs.put(request.out, PICTURE, "input.png", write)
    return [r._replace(image=r.image or str(paths[r.out])) for r in requests]
