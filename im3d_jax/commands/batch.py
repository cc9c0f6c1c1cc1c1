"""`im3d batch`: makes an asset of each prompt in a file, in any number of processes, and resumes.

    im3d batch --prompts prompts.txt --out out/batch
    im3d batch --prompts prompts.jsonl --out out/batch --shard 3/16 --retry-seeds 2
    im3d batch --status out/batch
    im3d batch --summarize out/batch

Asset i goes to OUT/assets/00000i, with the files that `im3d generate` writes. With --num-assets n, prompt i
has the n assets from i * n on. Shard I of N makes the assets I, I + N, ...; all shards may share OUT. Assets
that are there already are not made again. In the end OUT/summary.json and OUT/gallery.html are written.
--status DIR shows what is made, what is missing and who works on it, and exits with 1 unless all is made.

Exit codes: 0, all assets of the shard are there; 1, some failed (their error.json says why, and the next call
tries them again); 75, stopped by SIGTERM or SIGUSR1.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from im3d_jax import config_flags
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import Flag, NumAssets, NumRetries, Seed, whole

DEFAULT_CONFIG = "configs/tiny.py"


def main(argv: list[str]) -> None:
    flags, config = config_flags.parse(argv, make_parser(), default=DEFAULT_CONFIG)
    check(flags)
    if flags.status:
        code = show_status(flags.status)
    else:
        code = summarize(flags.summarize) if flags.summarize else run(config, flags)
    if code:
        raise SystemExit(code)


def make_parser() -> CommandParser:
    parser = CommandParser("batch", __doc__)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts: .txt, .json or .jsonl, see docs/batch.md",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the batch")
    parser.add_argument(
        "--shard", default="", metavar="I/N", help="make the assets I, I + N, ... (default: SLURM's, or all)"
    )
    parser.add_argument(
        "--lanes",
        type=whole(1, 256),
        metavar="N",
        default=1,
        help="assets made at once: one is sampled while another is fitted",
    )
    parser.add_argument(
        "--seed",
        type=Flag(Seed),
        metavar="N",
        default=0,
        help="seed of each prompt's first asset (default 0)",
    )
    parser.add_argument(
        "--num-assets",
        type=Flag(NumAssets),
        metavar="N",
        default=1,
        help="assets for each prompt (default 1)",
    )
    parser.add_argument(
        "--retry-seeds",
        type=Flag(NumRetries),
        metavar="N",
        default=0,
        help="further seeds to try while the result is bad (default 0)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make again what was made from another prompt or config"
    )
    parser.add_argument(
        "--save-views",
        action="store_true",
        help="keep the views of every round as pictures, of the assets that are made now",
    )
    parser.add_argument("--status", type=Path, metavar="DIR", help="only show what DIR has and lacks")
    parser.add_argument("--summarize", type=Path, metavar="DIR", help="only write DIR's summary and gallery")
    return parser


def check(flags: Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    if not (flags.summarize or flags.status or (flags.prompts and flags.out)):
        raise UserError("give --prompts FILE and --out DIR, or --status DIR, or --summarize DIR")


# The rest is imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.


def show_status(out: Path) -> int:
    """Prints what a batch has and lacks. Returns 0 if all that was asked for is there, otherwise 1."""
    from im3d_jax.jobs import summary

    text, is_whole = summary.screen(out)
    print(text)
    return 0 if is_whole else 1


def summarize(out: Path) -> int:
    """Writes the summary and the gallery of a batch that is there. Returns the exit code."""
    from im3d_jax.jobs import publish
    from im3d_jax.jobs.index import Index

    print(f"{out}: {publish.write(Index(out).refresh())}")
    return 0


def run(config: ConfigDict, flags: Namespace) -> int:
    """Makes what is missing of this shard. Returns the exit code."""
    from im3d_jax import pipeline
    from im3d_jax.jobs import batch
    from im3d_jax.jobs.stop import Stop

    asked = batch.Batch(
        prompts=flags.prompts,
        out=flags.out,
        shard=flags.shard,
        num_lanes=flags.lanes,
        seed=flags.seed,
        num_assets=flags.num_assets,
        num_retries=flags.retry_seeds,
        overwrite=flags.overwrite,
        save_views=flags.save_views,
        config=config_flags.as_json(config),
    )
    with Stop() as stop:
        return batch.run(asked, pipeline.read_settings(config), partial(pipeline.load, config), stop)
