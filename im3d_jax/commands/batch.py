"""`im3d batch`: makes an asset of each prompt in a file, in any number of processes, and resumes.

    im3d batch --prompts prompts.txt --out out/batch
    im3d batch --prompts prompts.jsonl --out out/batch --shard 3/16 --retry-seeds 2
    im3d batch --prompts prompts.jsonl --out out/batch --ray auto --gpus-per-actor 1
    im3d batch --prompts s3://bucket/prompts.jsonl --out s3://bucket/batch
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.cluster import flags as cluster_flags
from im3d_jax.objects.urls import Url, path_or_url
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import Flag, NumAssets, NumRetries, Seed, whole

if TYPE_CHECKING:
    from im3d_jax.jobs.batch import Batch
    from im3d_jax.jobs.lanes import Maker
    from im3d_jax.jobs.making import Making
    from im3d_jax.jobs.storage import Storage
    from im3d_jax.settings import AssetSettings

DEFAULT_CONFIG = "configs/tiny.py"
WHOLE = "0/1"


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
        type=path_or_url,
        metavar="FILE|URL",
        help="file of prompts: .txt, .json or .jsonl, see docs/batch.md",
    )
    parser.add_argument(
        "--out", type=path_or_url, metavar="DIR|URL", help="directory of the batch, or s3://BUCKET/NAME"
    )
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
    cluster_flags.add(parser)
    parser.add_argument("--status", type=path_or_url, metavar="DIR", help="only show what DIR has and lacks")
    parser.add_argument(
        "--summarize", type=path_or_url, metavar="DIR", help="only write DIR's summary and gallery"
    )
    return parser


def check(flags: Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    if not (flags.summarize or flags.status or (flags.prompts and flags.out)):
        raise UserError("give --prompts FILE and --out DIR, or --status DIR, or --summarize DIR")
    cluster_flags.check(flags)


# The rest is imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.


def show_status(place: Path | Url) -> int:
    """Prints what a batch has and lacks. Returns 0 if all that was asked for is there, otherwise 1."""
    from im3d_jax.jobs import storage, summary

    with storage.at(place) as batch:
        text, is_whole = summary.screen(batch)
    print(text)
    return 0 if is_whole else 1


def summarize(place: Path | Url) -> int:
    """Writes the summary and the gallery of a batch that is there. Returns the exit code."""
    from im3d_jax.jobs import publish, storage
    from im3d_jax.jobs.index import Index

    with storage.at(place) as batch:
        print(f"{batch}: {publish.write(Index(batch).refresh())}")
    return 0


def run(config: ConfigDict, flags: Namespace) -> int:
    """Makes what is missing of this shard. Returns the exit code."""
    from im3d_jax import pipeline
    from im3d_jax.jobs import batch, storage
    from im3d_jax.jobs.stop import Stop

    asked = batch.Batch(
        prompts=flags.prompts,
        out=Path(),
        shard=WHOLE if flags.ray else flags.shard,
        seed=flags.seed,
        num_assets=flags.num_assets,
        num_retries=flags.retry_seeds,
        overwrite=flags.overwrite,
        save_views=flags.save_views,
        config=config_flags.as_json(config),
    )
    settings = pipeline.read_settings(config)
    load = partial(pipeline.load, config)
    with storage.at(flags.out) as place, Stop() as stop:
        asked = asked._replace(out=place.out)
        return batch.run(asked, settings, _making(flags, asked, settings, load, place), stop, place)


def _making(
    flags: Namespace, asked: Batch, settings: AssetSettings, load: Callable[[], Maker], place: Storage
) -> Making:
    """In this process, or on a cluster."""
    from im3d_jax.jobs.making import InProcess

    if not flags.ray:
        return InProcess(load, flags.lanes, flags.retry_seeds, place.keep)
    from im3d_jax.cluster.making import Cluster, Needs, OnCluster

    least, most = cluster_flags.actor_range(flags.actors)
    labels = cluster_flags.node_labels(flags.node_labels)
    needs = Needs(float(flags.cpus_per_actor or 1), flags.gpus_per_actor or 0.0, labels, most)
    cluster = Cluster(flags.ray, needs, least, flags.asset_timeout_s or 0.0, flags.patience_s or 600.0)
    return OnCluster(cluster, load, settings, asked, num_lanes=flags.lanes, storage=place)
