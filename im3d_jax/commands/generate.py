"""`im3d generate`: the method, Figure 2 of the paper, read downwards in `make_asset`.

    im3d generate --prompt "a red mushroom with a beige stem" --out out/mushroom
    im3d generate --image photo.png --out out/photo --seed 3
    im3d generate --prompt "a blue car" --prompt "a green duck" --num-assets 2 --out out/four
    im3d generate --prompt "a lamp" --retry-seeds 3 --out out/lamp      # tries again while it is bad

Several assets go to OUT/0000, OUT/0001, ... and share one loaded model and one worker process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from im3d_jax import config_flags
from im3d_jax.asset import REPORT, Request, move_into, rank
from im3d_jax.conditions import pictures
from im3d_jax.generator import Generator
from im3d_jax.method import INITIAL_ELEVATION_RAD, make_asset
from im3d_jax.stages import Show, progress
from recon_torch.elevation import estimator as elevation
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory, write_json
from recon_torch.process.client import ReconClient
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit
from recon_torch.views.images import straight, write_image

RETRY_SEED_STEP = 1000  # apart, so that no try repeats another of several assets


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
        write_json(request.out / REPORT, best)
    return best


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


def generate(config, requests: list[Request], num_retries: int = 0) -> list[dict]:
    """Makes the assets one after the other with one generator and one worker. Returns their reports.

    num_retries: with other seeds, of each asset whose verdict is bad.
    """
    # Mistakes come to light before directories are made and minutes are spent.
    settings = fit_settings(config)
    for request in requests:
        if request.image:
            pictures.load_image(request.image, config.size, **config.image)
    if config.text_to_image.pipeline:
        requests = draw_images(config, requests)
    generator, estimator = load(config)
    for request in requests:
        make_directory(request.out)
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
    from im3d_jax.conditions import text_to_image  # needs the extra "hosted"

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
        placed = pictures.place(picture, name, config.size, **config.image)
        paths[request.out] = make_directory(request.out) / "input.png"
        write_image(paths[request.out], straight(*placed))
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
