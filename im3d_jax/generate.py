"""`im3d generate`: the method, Figure 2 of the paper, read downwards in `make_asset`.

    im3d generate --prompt "a red mushroom with a beige stem" --out out/mushroom
    im3d generate --image photo.png --out out/photo --seed 3
    im3d generate --prompt "a blue car" --prompt "a green duck" --num-assets 2 --out out/four
    im3d generate --prompt "a lamp" --retry-seeds 3 --out out/lamp      # tries again while it is bad

Several assets go to OUT/0000, OUT/0001, ... and share one loaded model and one worker process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch

from im3d_jax import bridge, conditioning, config_flags
from im3d_jax.generator import Generator
from im3d_jax.stages import Show, Stopwatch, progress
from recon_torch import elevation, export
from recon_torch.cameras import Cameras, orbit, write_transforms
from recon_torch.client import ReconClient
from recon_torch.errors import CommandParser, UserError
from recon_torch.settings import FitSettings, GateSettings

PACKAGES = ("im3d", "jax", "flax", "torch", "gsplat", "numba", "lpips")
RETRY_SEED_STEP = 1000  # apart, so that no try repeats another of several assets
VERDICTS = ("good", "suspect", "bad")
REPORT = "report.json"
INITIAL_ELEVATION_RAD = 0.3  # of the worker's first cameras, before a video has been seen


class Request(NamedTuple):
    """One asset to make. Either the prompt or the image (a path) may be empty, not both."""

    prompt: str
    image: str
    seed: int
    out: Path
    elevation_rad: float | None = None  # of the views, where it is known
    save_views: bool = False


class Round(NamedTuple):
    """A round of the fit: what it was given and what it made."""

    until_step: int
    quality: dict[str, float]
    targets: np.ndarray
    renders: np.ndarray
    alphas: np.ndarray


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
        picture = conditioning.load_image(request.image, config.size, **config.image)
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
    export.write_json(request.out / REPORT, report)
    return report


def make_best_asset(
    generator: Generator,
    client: ReconClient,
    estimator,
    request: Request,
    num_retries: int,
    show: Show = progress,
) -> dict:
    """`make_asset`, again with other seeds while the verdict is bad. Keeps the best, whose report lists all.

    A picture, given or drawn by `config.text_to_image.pipeline`, is that of the first try.
    """
    best = make_asset(generator, client, estimator, request, show)
    tries = [best]
    while tries[-1]["quality"]["verdict"] == "bad" and len(tries) <= num_retries:
        with tempfile.TemporaryDirectory(prefix=".im3d_", dir=request.out) as directory:
            seed = request.seed + RETRY_SEED_STEP * len(tries)
            another = request._replace(seed=seed, out=Path(directory))
            tries.append(make_asset(generator, client, estimator, another, show))
            if rank(tries[-1]) < rank(best):
                best = tries[-1]
                move_into(another.out, request.out)
    if len(tries) > 1:
        told = [{"seed": each["seed"], **each["quality"]} for each in tries]
        best = best | {"tries": told}
        export.write_json(request.out / REPORT, best)
    return best


def rank(report: dict) -> tuple[int, int, float]:
    """Less is better: the verdict, how much speaks against the asset, how far it is from its views."""
    quality, last = report["quality"], report["rounds"][-1]
    return VERDICTS.index(quality["verdict"]), len(quality["reasons"]), -last["silhouette_iou"]


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


def version_of(package: str) -> str:
    """Its version; of a source tree that is only on the path there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def copied(tensor: torch.Tensor) -> np.ndarray:
    """What the worker will write over, on the host."""
    return tensor.cpu().numpy().copy()


def write_asset(
    request: Request, client: ReconClient, cameras, config, rounds: list[Round], report: dict
) -> None:
    """Writes an asset's files beside `out` and then moves them in, so that none is ever half there."""
    with tempfile.TemporaryDirectory(prefix=".im3d_", dir=request.out) as directory:
        staging = Path(directory)
        client.export(staging / "asset.ply")
        final = np.concatenate([rounds[-1].renders, rounds[-1].alphas], -1)
        write_views(staging, "images", final, cameras)
        if request.save_views:
            for number, each in enumerate(rounds):
                write_views(staging / f"views_{number}", "images", each.targets, cameras)
        rows = [rounds[0].targets[:1, ..., :3]]
        labels = ["input"]
        for number, each in enumerate(rounds):
            rows += [each.targets[..., :3], each.renders.clip(0, 1)]
            labels += [f"views {number}", f"renders {number}"]
        export.write_image(staging / "views.png", export.contact_sheet(rows, labels))
        around = orbit(
            config.turntable.num_frames, np.deg2rad(report["elevation_deg"]), config.turntable.size
        )
        client.render(around)
        export.write_video(
            staging / "turntable.mp4", client.renders.clamp(0, 1).cpu().numpy(), config.turntable.fps
        )
        move_into(staging, request.out)


def move_into(source: Path, target: Path) -> None:
    """Moves all that is in one directory to another, in place of what has the same name there.

    The report, which stands for a whole asset, goes first and comes last.
    """
    (target / REPORT).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == REPORT):
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)


def write_views(directory: Path, folder: str, rgba: np.ndarray, cameras: Cameras) -> None:
    """Pictures [K, H, W, 4] whose colours are over white, as RGBA files with a transforms.json beside."""
    names = [f"{folder}/{k:03d}.png" for k in range(len(rgba))]
    for name, picture in zip(names, export.straight(rgba[..., :3], rgba[..., 3:].clip(0, 1)), strict=True):
        export.write_image(directory / name, picture)
    write_transforms(directory / "transforms.json", cameras, names)


def image_digest(request: Request) -> str:
    """SHA-256, in hex, of the picture's file; "" without a picture."""
    return hashlib.sha256(Path(request.image).read_bytes()).hexdigest() if request.image else ""


def given_elevation_deg(request: Request) -> float | None:
    """What the user said, free of the rounding of its way to radians and back."""
    return None if request.elevation_rad is None else round(float(np.rad2deg(request.elevation_rad)), 6)


def stream(key: jax.Array, name: str) -> jax.Array:
    """The random stream of a named use: no two uses share numbers, and none depends on the order of calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def parse_requests(flags) -> list[Request]:
    """The assets that the command line asks for. Raises UserError for what cannot be made."""
    if not flags.prompt and not flags.image:
        raise UserError("nothing to make; give --prompt TEXT or --image FILE")
    if flags.image and len(flags.prompt) > 1:
        raise UserError("--image takes at most one --prompt, which describes it")
    if any(not prompt.strip() for prompt in flags.prompt):
        raise UserError(
            "--prompt is empty; describe the object, as in --prompt 'a red car with a blue cabin'"
        )
    if flags.num_assets < 1:
        raise UserError(f"--num-assets is {flags.num_assets}, needs at least 1")
    if flags.retry_seeds < 0:
        raise UserError(f"--retry-seeds is {flags.retry_seeds}, needs at least 0")
    if flags.elevation_deg is not None and not -90 < flags.elevation_deg < 90:
        raise UserError(f"--elevation-deg is {flags.elevation_deg:g}, must lie between -90 and 90")
    elevation_rad = None if flags.elevation_deg is None else float(np.deg2rad(flags.elevation_deg))
    wanted = [(prompt, flags.seed + n) for prompt in flags.prompt or [""] for n in range(flags.num_assets)]
    outs = [flags.out] if len(wanted) == 1 else [flags.out / f"{i:04d}" for i in range(len(wanted))]
    return [
        Request(prompt, flags.image, seed, out, elevation_rad, flags.save_views)
        for (prompt, seed), out in zip(wanted, outs, strict=True)
    ]


def known_elevation_rad(config, request: Request) -> float | None:
    """Of the views: what the user says or the generator is told; None if the video has to say it."""
    if request.elevation_rad is None and config.elevation.deg is not None:
        return float(np.deg2rad(config.elevation.deg))
    return request.elevation_rad


def generate(config, requests: list[Request], num_retries: int = 0) -> list[dict]:
    """Makes the assets one after the other with one generator and one worker. Returns their reports.

    num_retries: with other seeds, of each asset whose verdict is bad.
    """
    # Mistakes come to light before directories are made and minutes are spent.
    settings = fit_settings(config)
    for request in requests:
        if request.image:
            conditioning.load_image(request.image, config.size, **config.image)
    if config.text_to_image.pipeline:
        requests = draw_images(config, requests)
    generator, estimator = load(config)
    for request in requests:
        export.make_directory(request.out)
    for warning in dict.fromkeys(each for r in requests for each in generator.text.warnings(r.prompt)):
        print(f"im3d: warning: {warning}", file=sys.stderr)
    with start_client(config, settings) as client:
        return [make_best_asset(generator, client, estimator, each, num_retries) for each in requests]


def load(config) -> tuple[Generator, elevation.ElevationEstimator]:
    """What samples the views and what reads their elevation. Raises UserError if their weights do not fit."""
    weights = config.elevation.weights or elevation.TINY_WEIGHTS
    return Generator(config), elevation.load(weights, config.elevation.dino or None)


def start_client(config, settings: FitSettings) -> ReconClient:
    """A worker that gets ready while the first video is sampled."""
    return ReconClient(orbit(config.num_views, INITIAL_ELEVATION_RAD, config.size), settings)


def draw_images(config, requests: list[Request]) -> list[Request]:
    """The requests with pictures of their prompts, OUT/input.png, by `config.text_to_image.pipeline`.

    All at once, so that the pipeline is gone before the video model is loaded.
    """
    from im3d_jax import text_to_image  # needs the extra "hosted"

    settings, asked = config.text_to_image, [r for r in requests if not r.image]
    with progress("images", settings.num_steps * len(asked)) as bar:
        drawn = text_to_image.draw(
            settings.pipeline,
            [request.prompt for request in asked],
            [request.seed for request in asked],
            settings.num_steps,
            settings.template,
            bar.update,
        )
    paths = {}
    for request, picture in zip(asked, drawn, strict=True):
        name = f"the picture of {request.prompt!r}"
        placed = conditioning.place(picture, name, config.size, **config.image)
        paths[request.out] = export.make_directory(request.out) / "input.png"
        export.write_image(paths[request.out], export.straight(*placed))
    return [r._replace(image=r.image or str(paths[r.out])) for r in requests]


def fit_settings(config) -> FitSettings:
    """Of the config. Raises UserError, also for rounds that do not come one after another within the fit."""
    at_steps, num_steps = config.rounds.at_steps, config.fit.num_steps
    if (np.diff([0, *at_steps, num_steps]) <= 0).any():
        steps = f"config.rounds.at_steps {tuple(at_steps)}, config.fit.num_steps {num_steps}"
        raise UserError(f"{steps}: make each larger than the one before")
    return FitSettings(**config.fit)


def main(argv: list[str]) -> None:
    parser = CommandParser("generate", __doc__)
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to make; may be given several times"
    )
    parser.add_argument("--image", default="", help="picture to start from: RGBA, or on a plain background")
    parser.add_argument("--out", type=Path, required=True, help="directory for the asset's files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first asset; the next ones count up")
    parser.add_argument(
        "--num-assets", type=int, default=1, help="assets for each prompt (default %(default)s)"
    )
    parser.add_argument(
        "--elevation-deg", type=float, help="camera height of the picture, if known, instead of an estimate"
    )
    parser.add_argument("--save-views", action="store_true", help="keep the views of every round as pictures")
    parser.add_argument(
        "--retry-seeds", type=int, default=0, help="further seeds to try while the result is bad (default 0)"
    )
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    requests = parse_requests(flags)
    for request, report in zip(requests, generate(config, requests, flags.retry_seeds), strict=True):
        last, quality = report["rounds"][-1], report["quality"]
        judged = "; ".join([quality["verdict"], *quality["reasons"], *quality["hints"]])
        print(f"{request.out}: {last['psnr']:.1f} dB to the last views; quality: {judged}")
