"""The method: Figure 2 of the paper, read downwards."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import jax
import numpy as np
import torch

from im3d_jax import bridge, config_flags
from im3d_jax.asset import (
    PACKAGES,
    REPORT,
    Request,
    Round,
    given_elevation_deg,
    image_digest,
    version_of,
    write_asset,
)
from im3d_jax.conditions import pictures
from im3d_jax.generator import Generator
from im3d_jax.random_streams import stream
from im3d_jax.stages import Show, Stopwatch, progress
from recon_torch.elevation import estimator as elevation
from recon_torch.files import write_json
from recon_torch.process.client import ReconClient
from recon_torch.settings import GateSettings
from recon_torch.views.cameras import orbit

INITIAL_ELEVATION_RAD = 0.3  # of the worker's first cameras, before a video has been seen


def make_asset(
    generator: Generator, client: ReconClient, estimator, request: Request, show: Show = progress
) -> dict:
    """Prompt or image -> asset in `request.out`. Returns the report.

    Several threads may do this with one generator and estimator, each with a client of its own.
    """
    generator = generator.counting_anew()
    config, seconds = generator.config, Stopwatch()
    key = jax.random.key(request.seed)

    # ---- prompt -> image ----
    if request.image:
        picture = pictures.load_image(request.image, config.size, **config.image)
        rgb, alpha = (part[None] for part in picture)
    else:
        image_key, num_steps = stream(key, "image"), config.text_to_image.num_steps
        with generator.turn, seconds("text_to_image"), show("image", num_steps) as bar:
            drawn = generator.text_to_image([request.prompt], image_key, lambda *_: bar.update())
            rgb, alpha = jax.block_until_ready(drawn)
    image_calls, image_evaluations = generator.num_calls, generator.num_evaluations

    # ---- image -> video J ----
    elevation_rad = known_elevation_rad(config, request)
    given = generator.condition([request.prompt], rgb, alpha, elevation_rad)
    with generator.turn, seconds("video"), show("video", config.video.num_steps) as bar:
        latents = generator.turntable(given, stream(key, "video"), lambda *_: bar.update())
        views, masks = jax.block_until_ready(generator.decode(latents))

    # ---- video -> cameras ----
    with seconds("elevation"):
        if elevation_rad is None:
            elevation_rad = elevation.estimate(estimator, torch.from_dlpack(views[0]).cpu())
    cameras = orbit(config.num_views, elevation_rad, config.size)
    client.reset(cameras)

    # ---- J -> Gaussians G, and twice: renders of G, renoised and denoised, are the next J ----
    rounds = list(fit_and_refine(generator, client, given, (views, masks), key, seconds, show))

    # ---- G -> verdict ----
    with seconds("inspect"):
        judged = client.inspect(GateSettings(**config.gates))

    # ---- G -> files ----
    report = {
        "prompt": request.prompt,
        "image": request.image,
        "image_digest": image_digest(request),
        "seed": request.seed,
        "network_calls": generator.num_calls - image_calls,
        "network_evaluations": generator.num_evaluations - image_evaluations,
        "text_to_image_calls": image_calls,
        "text_to_image_evaluations": image_evaluations,
        "elevation_deg": float(np.rad2deg(elevation_rad)),
        "given_elevation_deg": given_elevation_deg(request),
        "num_gaussians": client.num_gaussians,
        "quality": judged,
        "rounds": [{"until_step": r.until_step, **r.quality} for r in rounds],
        "config_digest": config_flags.config_digest(config),
        "versions": {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "notes": client.notes,
    }
    with seconds("export"):
        write_asset(request, client, cameras, config, rounds, report)
    report["seconds"] = seconds.report()
    # Last, so that a report stands for a whole asset.
    write_json(request.out / REPORT, report)
    return report


def fit_and_refine(
    generator: Generator,
    client: ReconClient,
    given,
    first_video,
    key: jax.Array,
    seconds: Stopwatch,
    show: Show = progress,
) -> Iterator[Round]:
    """The fit to the first video (views [1,K,H,W,3], masks [1,K,H,W,1]), and its rounds (Sec. 3.3, 3.4).

    Yields each round when it is fitted; until the next is asked for, `client` may render other cameras.
    """
    config, (views, masks) = generator.config, first_video
    for number, until_step in enumerate((*config.rounds.at_steps, config.fit.num_steps)):
        if number > 0:
            total = config.rounds.num_runs * config.rounds.num_steps
            name = f"denoise, round {number}"
            with generator.turn, seconds("renoise_denoise"), show(name, total) as bar:
                for run in range(config.rounds.num_runs):
                    run_key = stream(key, f"round {number - 1} run {run}")
                    latents = generator.refine(latents, given, run_key, lambda *_, bar=bar: bar.update())
                views, masks = jax.block_until_ready(generator.decode(latents))
        with seconds("fit"), show(f"fit, round {number}", config.fit.num_steps, client.step) as bar:
            bridge.write(views[0], client.views)
            bridge.write(masks[0], client.masks)
            client.set_targets()
            quality = client.fit(until_step, lambda step, _, bar=bar: bar.update(step - bar.n))
            client.render()
            bar.update(until_step - bar.n)
        renders, alphas = (bridge.as_jax(tensor)[None] for tensor in (client.renders, client.alphas))
        # Done before anybody renders into the same memory again.
        latents = jax.block_until_ready(generator.codec.encode(renders, alphas))
        targets = np.concatenate([views[0], masks[0]], -1)
        yield Round(until_step, quality, targets, *map(copied, (client.renders, client.alphas)))


def copied(tensor: torch.Tensor) -> np.ndarray:
    """What the worker will write over, on the host."""
    return tensor.cpu().numpy().copy()


def known_elevation_rad(config, request: Request) -> float | None:
    """Of the views: what the user says or the generator is told; None if the video has to say it."""
    if request.elevation_rad is None and config.elevation.deg is not None:
        return float(np.deg2rad(config.elevation.deg))
    return request.elevation_rad
