"""The method: Figure 2 of the paper, from a prompt or a picture to an asset, read downwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
import torch
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax import asset, bridge, inputs
from im3d_jax.asset import Asset, Made, Picture, Request, Round
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.evidence import Evidence, Video
from im3d_jax.generator import CallCount, Generator
from im3d_jax.random_streams import stream
from im3d_jax.settings import AssetSettings
from im3d_jax.stages import Stages
from recon_torch.elevation.estimator import Estimator, estimate
from recon_torch.process import ReconstructionClient
from recon_torch.views import rigidity
from recon_torch.views.cameras import orbit


def make_asset(
    generator: Generator,
    estimator: Estimator,
    client: ReconstructionClient,
    settings: AssetSettings,
    request: Request,
    pictures: Sequence[Picture],
    stages: Stages,
) -> Asset:
    """Makes the asset of a request, and writes it into `request.out`.

    Several threads may do this with the same generator and estimator, each with a client of its own.

    Args:
        pictures: of `request.images`; none: the backbone draws one of the prompt.
    """
    key = jax.random.key(request.seed)
    elevation_rad = known_elevation_rad(request, settings)

    # ---- prompt -> picture ----
    drawing = generator.counting()
    rgb, alpha = pictures[0].batch if pictures else draw(drawing, request.prompt, key, stages)

    # ---- pictures -> video J ----
    generator = generator.counting()
    shown = {view: each.batch for each in pictures[1:] if (view := each.view(generator.num_views))}
    given = generator.condition([request.prompt], rgb, alpha, elevation_rad, shown)
    video = sample_video(generator, given, key, stages)

    # ---- video -> elevation -> cameras ----
    with stages.timed("elevation"):
        if elevation_rad is None:
            elevation_rad = estimate(estimator, torch.from_dlpack(video[0][0]).cpu())
    turntable = orbit(settings.num_views, elevation_rad, settings.size)
    evidence = Evidence.of(pictures, settings.num_views, settings.picture.weight)
    cameras = evidence.cameras(turntable, elevation_rad)

    # ---- J -> Gaussians G; in each round the renders of G, noised and denoised again, are the next J ----
    client.reset(cameras)
    until_steps = settings.until_steps
    rounds = list(
        fit_and_refine(generator, client, given, video, elevation_rad, key, until_steps, stages, evidence)
    )

    # ---- G -> verdict ----
    with stages.timed("inspect"):
        seen = inputs.look(request.prompt, pictures, generator.text)
        seen = inputs.closing(seen, video.closure_db, settings.clip.closure_psnr)
        # Later views are made of renders of a fit, which does not move, so the first ones tell.
        excursions = rigidity.excursions(cameras, rounds[0].targets[..., 3:])
        quality = inputs.judge(client.inspect(settings.gates, turntable, excursions), seen)

    # ---- G -> files ----
    counts = named_counts(generator.count, drawing.count)
    digest = asset.images_digest(request, [each.digest for each in pictures])
    views = evidence.views
    made = Made(elevation_rad, cameras, rounds, quality, digest, counts, seen.not_understood, views)
    return asset.write(made, request, client, settings, stages)


def fit_and_refine(
    generator: Generator,
    client: ReconstructionClient,
    given: Conditioning,
    video: Video,
    elevation_rad: float,
    key: PRNGKeyArray,
    until_steps: Sequence[int],
    stages: Stages,
    evidence: Evidence | None = None,
) -> Iterator[Round]:
    """Fits the first video, then refines and fits again, once for each further element of `until_steps`.

    Sec. 3.3 is the fit and Sec. 3.4 the refinement. Yields each round when it is fitted; until the next one
    is asked for, `client` may render from other cameras.

    elevation_rad: of the video's cameras.
    evidence: what pictures add to the views of the fit, whose cameras the client has.
    """
    evidence = evidence or Evidence.of((), generator.num_views)
    *earlier_steps, last_step = until_steps
    for number, until_step in enumerate(earlier_steps):
        fitted = fit_video(client, video, evidence, until_step, last_step, number, stages)
        latents = encode_renders(generator, client, elevation_rad)
        yield fitted
        video = refine_video(generator, latents, given, key, number + 1, stages)
    yield fit_video(client, video, evidence, last_step, last_step, len(earlier_steps), stages)


# ---- The arrows ----


def known_elevation_rad(request: Request, settings: AssetSettings) -> float | None:
    """The elevation that the user or the config gives; None if it is to be estimated from the video."""
    given_deg = settings.elevation_deg if request.elevation_deg is None else request.elevation_deg
    return None if given_deg is None else float(np.deg2rad(given_deg))


def draw(
    generator: Generator, prompt: str, key: PRNGKeyArray, stages: Stages
) -> tuple[Float[Array, "1 H W 3"], Float[Array, "1 H W 1"]]:
    """The backbone's own picture of a prompt, (rgb, alpha)."""
    with generator.turn, stages.shown("text_to_image", "image", generator.image.num_steps) as bar:
        drawn = generator.text_to_image([prompt], stream(key, "image"), lambda *_: bar.update())
        return jax.block_until_ready(drawn)


def sample_video(generator: Generator, given: Conditioning, key: PRNGKeyArray, stages: Stages) -> Video:
    """The first video (Sec. 3.1)."""
    with generator.turn, stages.shown("video", "video", generator.video.num_steps) as bar:
        latents = generator.turntable(given, stream(key, "video"), lambda *_: bar.update())
        return decode(generator, latents)


def refine_video(
    generator: Generator,
    latents: Float[Array, "1 F h w c"],
    given: Conditioning,
    key: PRNGKeyArray,
    number: int,
    stages: Stages,
) -> Video:
    """The video of round `number`, counted from 1: latent renders, noised and denoised again (Sec. 3.4)."""
    settings = generator.rounds
    total = settings.num_runs * settings.num_steps
    with generator.turn, stages.shown("renoise_denoise", f"denoise, round {number}", total) as bar:
        for run in range(settings.num_runs):
            run_key = stream(key, f"round {number - 1} run {run}")
            latents = generator.refine(latents, given, run_key, lambda *_: bar.update())
        return decode(generator, latents)


def decode(generator: Generator, latents: Float[Array, "1 F h w c"]) -> Video:
    """The video of latents, with a look at how its clip closes."""
    pictures = jax.block_until_ready(generator.decode_clip(latents))
    closure_db = generator.clip.closure_db(*pictures)
    rgb, alpha = map(generator.clip.views, pictures)
    return Video(rgb, alpha, None if closure_db is None else float(closure_db[0]))


def fit_video(
    client: ReconstructionClient,
    video: Video,
    evidence: Evidence,
    until_step: int,
    last_step: int,
    number: int,
    stages: Stages,
) -> Round:
    """Fits the Gaussians to a video until their step `until_step` (Sec. 3.3), and renders them."""
    views, masks = (each[0] for each in evidence.within(video))

    def move_to(step: int, losses: dict[str, float]) -> None:
        bar.update(step - bar.n)

    with stages.shown("fit", f"fit, round {number}", last_step, client.step) as bar:
        bridge.write(views, client.views)
        bridge.write(masks, client.masks)
        client.set_targets(evidence.weights)
        quality = client.fit(until_step, move_to)
        renders, alphas = client.render()
        bar.update(until_step - bar.n)
    targets = np.concatenate([views, masks], -1)
    return Round(until_step, quality, targets, host_copy(renders), host_copy(alphas))


def encode_renders(
    generator: Generator, client: ReconstructionClient, elevation_rad: float
) -> Float[Array, "1 F h w c"]:
    """Latents of the client's renders, which may be overwritten when this returns.

    Its last renders are those of the fit's cameras: the views and, after them, pictures that are no views,
    which are left out. A clip that has pictures between the views is rendered for the purpose.
    """
    clip = generator.clip
    if clip.pictures_per_view > 1:
        client.render(orbit(clip.num_orbit, elevation_rad, generator.size))
    shared = (bridge.as_jax(tensor) for tensor in (client.renders, client.alphas))
    renders, alphas = (array[None, : clip.num_orbit] for array in shared)
    return jax.block_until_ready(generator.encode(renders, alphas))


def host_copy(tensor: Float[torch.Tensor, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """A copy on the host of a tensor that the worker will write to again."""
    return tensor.cpu().numpy().copy()


def named_counts(video: CallCount, drawing: CallCount) -> dict[str, int]:
    """Calls of the network as the report names them: for the videos, and for the picture."""
    return {
        "network_calls": video.calls,
        "network_evaluations": video.evaluations,
        "text_to_image_calls": drawing.calls,
        "text_to_image_evaluations": drawing.evaluations,
    }
