"""A shard of a batch from its prompts to its gallery."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from im3d_jax import pipeline
from im3d_jax.asset import Request
from im3d_jax.asset_kinds import ASSET
from im3d_jax.jobs import ASSETS, BATCH, FAILED, FAILURE, job, prompt_files, summary
from im3d_jax.jobs.configs import Configs
from im3d_jax.jobs.index import Index
from im3d_jax.jobs.making import Making
from im3d_jax.jobs.outcomes import Outcome, Progress
from im3d_jax.jobs.pictures import draw_missing
from im3d_jax.jobs.publish import Publisher
from im3d_jax.jobs.resume import is_made
from im3d_jax.jobs.shards import Shard, make_requests, read_shard
from im3d_jax.jobs.stop import Stop
from im3d_jax.jobs.storage import Disk, Storage
from im3d_jax.objects.urls import Url
from im3d_jax.settings import AssetSettings
from im3d_jax.training.hosts import EXIT_REQUEUE
from recon_torch import outputs
from recon_torch.files import make_directory

EXIT_INCOMPLETE = 1


class Batch(NamedTuple):
    """What a shard is asked for; the flags of `im3d batch`.

    Attributes:
        prompts: the file. out: directory of the batch, or in which this process works for it, see `Storage`.
        shard: "I/N"; "": SLURM's environment says it, or the shard is the whole batch.
        seed: of each prompt's first asset. num_assets: of each prompt.
        num_retries: further seeds while an asset is bad.
        overwrite: whether to make again what was made from another prompt or config.
        save_views: of the assets that are made now, see `Request`.
        config: as JSON holds it; a later call with another one names what differs.
    """

    prompts: Path | Url
    out: Path
    shard: str = ""
    seed: int = 0
    num_assets: int = 1
    num_retries: int = 0
    overwrite: bool = False
    save_views: bool = False
    config: Mapping[str, Any] = MappingProxyType({})


def run(
    batch: Batch, settings: AssetSettings, making: Making, stop: Stop, storage: Storage | None = None
) -> int:
    """Makes what is missing of a shard, and writes summary and gallery. Returns the exit code.

    storage: where the batch lies; default: in `batch.out`.
    """
    storage = storage or Disk(batch.out)
    # Mistakes in prompts and flags come to light before anything is loaded or written.
    entries = prompt_files.read(batch.prompts)
    requests = make_requests(entries, batch.out, batch.seed, batch.num_assets)
    requests = [request._replace(save_views=batch.save_views) for request in requests]
    for request in requests:
        pipeline.check(request, settings.num_views)
    shard = read_shard(batch.shard, os.environ)
    asked = summary.Asked(len(requests), shard.num_shards)
    requests = requests[shard.number :: shard.num_shards]
    configs = Configs(batch.out, settings.config_digest, batch.config)
    outputs.check(batch.out, BATCH)
    asked_for = job.read_job(entries, batch.prompts, batch.num_assets, batch.seed)
    job.check(batch.out, asked_for, batch.prompts, batch.overwrite)
    with storage.hold(shard, stop.give_up):
        index, rules = Index(storage), (settings, batch.num_retries, batch.overwrite, configs)
        rows = index.refresh().rows if storage.is_begun() else {}
        missing = [r for r in requests if not is_made(r, rows.get(r.out.name), *rules)]
        images = [image for request in requests for image in request.images]
        storage.check([request.out for request in missing], images, (ASSET, FAILURE))
        # What failed before comes last: whatever is wrong with it does not keep the others waiting.
        failed = {name for name, row in rows.items() if row.verdict == FAILED}
        missing.sort(key=lambda request: request.out.name in failed)
        with making.begun(missing, stop) if missing else nullcontext():
            make_directory(batch.out / ASSETS)
            with index.held():
                job.keep(batch.out, asked_for, batch.prompts, batch.overwrite)
                configs.keep()
                index.write()
                summary.write(batch.out, index.in_order(), asked)
            return _make(storage, settings, requests, missing, failed, making, stop, shard, Publisher(index))


def _make(
    storage: Storage,
    settings: AssetSettings,
    requests: Sequence[Request],
    missing: Sequence[Request],
    failed_before: Collection[str],
    making: Making,
    stop: Stop,
    shard: Shard,
    publisher: Publisher,
) -> int:
    def tell(outcome: Outcome) -> None:
        progress.tell(outcome, outcome.name in failed_before)
        publisher.tell(outcome.name)

    progress = Progress(len(requests), len(requests) - len(missing), stop)
    with progress.bar:
        if not making.draws:
            missing, failed = draw_missing(settings, missing, storage)
            for outcome in failed:
                tell(outcome)
        if missing and not stop.soon:
            making.make_all(missing, stop, tell)

    print(f"{storage}: shard {shard}: {progress}; {publisher.finish()}")
    is_complete = progress.num_done == len(requests)
    if stop.by_signal and not is_complete:
        return EXIT_REQUEUE
    return 0 if is_complete and not progress.counts[FAILED] else EXIT_INCOMPLETE
