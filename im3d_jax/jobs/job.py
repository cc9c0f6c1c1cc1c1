"""What a batch was asked for when it began: job.json. A file of prompts that has changed since is an error.

Assets are numbered by their place in the file, so that prompts that move would be made under the numbers of
others. Further prompts at its end are no change: they get new numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from im3d_jax.jobs import BATCH
from im3d_jax.jobs.prompt_files import Entry
from im3d_jax.objects.urls import Url, absolute
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json

JOB = "job.json"

SHORT = 8
"""Hexadecimal digits of the digest of one entry: enough to find the one that differs."""


class Job(NamedTuple):
    """What a batch is asked for.

    Attributes:
        began: the date of its first call, or of the one that overwrote it.
        num_entries: of the file of prompts. digest: SHA-256 of them all, in hex.
        entries: the first `SHORT` digits of the digest of each, one after another.
        num_assets: of each entry. seed: of the entries that name none; None if there are none such.
    """

    began: str
    num_entries: int
    digest: str
    entries: str
    num_assets: int
    seed: int | None


def read_job(entries: Sequence[Entry], prompts: Path | Url, num_assets: int, seed: int) -> Job:
    """The job of this call. prompts: the file, to which the paths of pictures are relative."""
    lines = [canonical(entry, absolute(prompts.parent)) for entry in entries]
    short = "".join(hashlib.sha256(line).hexdigest()[:SHORT] for line in lines)
    needs_seed = any(entry.seed is None for entry in entries)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    return Job(began, len(lines), _digest(lines), short, num_assets, seed if needs_seed else None)


def canonical(entry: Entry, folder: str) -> bytes:
    """An entry as JSON, the same wherever the file of prompts lies with the pictures in its folder."""
    images = [absolute(image) for image in entry.images]
    images = [image.removeprefix(f"{folder}{os.sep}") for image in images]
    elevation_deg = None if entry.elevation_deg is None else float(entry.elevation_deg)
    azimuths_deg = [float(each) for each in entry.azimuths_deg]
    return json.dumps([entry.prompt, images, entry.seed, elevation_deg, azimuths_deg]).encode()


def _digest(lines: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line + b"\n")
    return whole.hexdigest()


def check(out: Path, job: Job, prompts: Path | Url, overwrite: bool) -> Job:
    """Raises UserError if a batch began as another job, unless that is to be overwritten.

    Returns the job with the date at which the batch began.
    """
    before = _read(out)
    if before is None:
        return job
    changed = _difference(before, job, prompts.name)
    if changed and not overwrite:
        raise UserError(f"{changed}; give it as it was, another --out, or --overwrite to make it again")
    return job if changed else job._replace(began=before.began)


def keep(out: Path, job: Job, prompts: Path | Url, overwrite: bool) -> None:
    """Writes job.json, if it does not say the same. Raises UserError as `check` does.

    Only the process that holds the index may do so: of shards that start together, the first is what counts.
    """
    kept, before = check(out, job, prompts, overwrite), _read(out)
    if before is None and (out / JOB).exists():
        lost = "is damaged and written anew; whether the prompts have changed is not known"
        print(f"im3d: warning: {out / JOB} {lost}", file=sys.stderr)
    if kept != before:
        outputs.check(out, BATCH)
        outputs.claim(out, BATCH)
        write_json(out / JOB, kept._asdict())


def _difference(before: Job, now: Job, name: str) -> str:
    """How a job differs from the one that a batch began as; "" if it is the same, or has more at its end."""
    since = f"since this batch began ({before.began})"
    only_more = before.num_entries == 1 and now.num_assets > before.num_assets
    if now.num_assets != before.num_assets and not only_more:
        return f"--num-assets has changed {since}, from {before.num_assets} to {now.num_assets}"
    if before.entries != now.entries[: len(before.entries)]:
        pairs = zip(_shorts(before), _shorts(now), strict=False)
        number = next((n for n, (old, new) in enumerate(pairs, 1) if old != new), 0)
        fewer = f"it has {now.num_entries} entries, and had {before.num_entries}"
        how = f"entry {number} is another" if number else fewer
        return f"{name} has changed {since}: {how}"
    if before.seed is not None and now.seed != before.seed:
        return f"--seed has changed {since}, from {before.seed} to {now.seed}"
    return ""


def _shorts(job: Job) -> list[str]:
    return [job.entries[i : i + SHORT] for i in range(0, len(job.entries), SHORT)]


def _read(out: Path) -> Job | None:
    """The job of a batch; None if it has none, as those of earlier versions, or one that cannot be read."""
    try:
        job = Job(**json.loads((out / JOB).read_text()))
        if _is_sound(job):
            return job
    except (OSError, ValueError, TypeError):
        pass
    return None


def _is_sound(job: Job) -> bool:
    texts = all(isinstance(each, str) for each in (job.began, job.digest, job.entries))
    numbers = all(type(each) is int for each in (job.num_entries, job.num_assets, job.seed or 0))
    return texts and numbers and len(job.entries) == SHORT * job.num_entries
