"""`im3d generate`: makes assets from prompts or from a picture.

    im3d generate --prompt "a red mushroom with a beige stem" --out out/mushroom
    im3d generate --image photo.png --out out/photo --seed 3
    im3d generate --image front.png --image back.png --azimuth-deg 0 --azimuth-deg 180 --out out/both
    im3d generate --prompt "a blue car" --prompt "a green duck" --num-assets 2 --out out/four
    im3d generate --prompt "a lamp" --retry-seeds 3 --out out/lamp      # tries again while the result is bad

Several assets go to OUT/0000, OUT/0001, ... and share one loaded model and one worker process.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ml_collections import ConfigDict

from im3d_jax import config_flags
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import AzimuthDeg, ElevationDeg, Flag, NumAssets, NumRetries, Seed

DEFAULT_CONFIG = "configs/tiny.py"


def main(argv: list[str]) -> None:
    flags, config = config_flags.parse(argv, make_parser(), default=DEFAULT_CONFIG)
    check(flags)
    if flags.mesh:
        config.export.mesh = True
    generate(config, flags)


def make_parser() -> CommandParser:
    parser = CommandParser("generate", __doc__)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to make; may be given several times",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="picture to start from: RGBA, or on a plain background; may be given several times, for pictures"
        " of one object from several sides",
    )
    parser.add_argument(
        "--azimuth-deg",
        action="append",
        type=Flag(AzimuthDeg),
        default=[],
        metavar="DEG",
        help="for each --image, how far around the object its camera stood, counter-clockwise from above: 0"
        " is the front and 180 the back (default 0, for a single picture)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for the asset's files"
    )
    parser.add_argument(
        "--seed",
        type=Flag(Seed),
        default=0,
        metavar="N",
        help="seed of the first asset; the next ones count up",
    )
    parser.add_argument(
        "--num-assets",
        type=Flag(NumAssets),
        default=1,
        metavar="N",
        help="assets for each prompt (default 1)",
    )
    parser.add_argument(
        "--elevation-deg",
        type=Flag(ElevationDeg),
        metavar="DEG",
        help="elevation of the camera that took the pictures, if it is known (default: estimated)",
    )
    parser.add_argument("--save-views", action="store_true", help="keep the views of every round as pictures")
    parser.add_argument(
        "--mesh", action="store_true", help="also write mesh.glb, as config.mesh says (config.export.mesh)"
    )
    parser.add_argument(
        "--retry-seeds",
        type=Flag(NumRetries),
        default=0,
        metavar="N",
        help="further seeds to try while the result is bad (default 0)",
    )
    return parser


def check(flags: Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    if "" in flags.image:
        raise UserError("--image is empty; is a variable of your shell not set?")
    if not flags.prompt and not flags.image:
        raise UserError("nothing to make; give --prompt TEXT or --image FILE")
    if flags.image and len(flags.prompt) > 1:
        raise UserError("--image takes at most one --prompt, which describes it")
    if flags.azimuth_deg and not flags.image:
        raise UserError("--azimuth-deg is of an --image; give that, too")
    if any(not prompt.strip() for prompt in flags.prompt):
        raise UserError(
            "--prompt is empty; describe the object, as in --prompt 'a red car with a blue cabin'"
        )


def generate(config: ConfigDict, flags: Namespace) -> None:
    """Makes the assets one after the other with one generator and one worker, and prints a line for each."""
    # Imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.
    from im3d_jax import pipeline
    from im3d_jax.asset import Request, read_pictures
    from im3d_jax.asset_kinds import ASSET
    from im3d_jax.sides import arranged

    front, sides = arranged(flags.image, flags.azimuth_deg)
    wanted = [(prompt, flags.seed + n) for prompt in flags.prompt or [""] for n in range(flags.num_assets)]
    outs = [flags.out] if len(wanted) == 1 else [flags.out / f"{i:04d}" for i in range(len(wanted))]
    requests = [
        Request(prompt, front, seed, out, flags.elevation_deg, flags.save_views, sides)
        for (prompt, seed), out in zip(wanted, outs, strict=True)
    ]
    # Mistakes come to light before directories are made and minutes are spent.
    settings = pipeline.read_settings(config)
    pipeline.check(requests[0], settings.num_views)
    pictures = read_pictures(requests[0], settings.size, settings.picture)
    for out in outs:
        outputs.check(out, ASSET, flags.image, root=flags.out)
    with outputs.opened(flags.out, Kind(ASSET.command, ())):
        if settings.text_to_image.pipeline:
            requests = pipeline.draw_pictures(settings, requests)
        with pipeline.load(config) as loaded:
            loaded.warn([request.prompt for request in requests], pictures)
            with loaded.own_client() as client:
                for request in requests:
                    print(loaded.make_best(request, client, pictures, flags.retry_seeds))
