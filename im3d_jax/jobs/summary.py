"""What all shards of a batch have made, in numbers: summary.json, and the screen of `im3d batch --status`.

Both are made from the batch's `Index`. summary.json is written when a shard begins, so that one that is lost
is missing there, and from then on now and then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from im3d_jax.jobs import BATCH, FAILED
from im3d_jax.jobs.index import Index
from im3d_jax.jobs.rows import Row
from im3d_jax.jobs.storage import Storage
from recon_torch import outputs
from recon_torch.files import write_json
from recon_torch.settings import Verdict

SUMMARY = "summary.json"

NUM_NAMED = 1000
"""So many missing assets summary.json names; it counts them all."""

NUM_ROWS = 8
"""So many shards, failures and missing assets a screen lists."""


class Asked(NamedTuple):
    """What the newest call asked for: assets of the whole batch, and shards."""

    num_assets: int
    num_shards: int


def write(out: Path, rows: Sequence[Row], asked: Asked | None = None) -> dict[str, Any]:
    """Writes summary.json of a batch with these assets. Returns its content.

    asked: by default what summary.json says, if it is there.

    Raises UserError for files of a batch's names that are not ours.
    """
    outputs.check(out, BATCH)
    outputs.claim(out, BATCH)
    content = totals(rows, asked or read_asked(out))
    write_json(out / SUMMARY, content)
    return content


def read_asked(out: Path) -> Asked | None:
    """What was asked for, by the summary.json that is there; None if it does not say it."""
    try:
        told = json.loads((out / SUMMARY).read_text())
        asked = Asked(told["num_asked"], told["num_shards"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return asked if all(isinstance(number, int) and number > 0 for number in asked) else None


def missing_numbers(rows: Sequence[Row], asked: Asked | None) -> list[int]:
    """The numbers of the assets that were asked for and have neither been made nor failed."""
    there = {int(row.name) for row in rows}
    return [number for number in range(asked.num_assets if asked else 0) if number not in there]


def totals(rows: Sequence[Row], asked: Asked | None) -> dict[str, Any]:
    """The content of summary.json. Means are over whole assets; assets_per_hour counts one lane.

    asked: None if nobody knows it, as in batches of earlier versions.
    """
    missing = missing_numbers(rows, asked)
    made = [row for row in rows if row.verdict != FAILED]
    stages = sorted({stage for row in made for stage in row.seconds})
    seconds = {stage: fmean(row.seconds.get(stage, 0.0) for row in made) for stage in stages}
    counts = Counter(row.verdict for row in rows)
    return {
        "num_asked": asked.num_assets if asked else None,
        "num_shards": asked.num_shards if asked else None,
        "num_assets": len(made),
        "verdicts": {str(verdict): counts[verdict] for verdict in Verdict},
        "num_failed": counts[FAILED],
        "num_missing": len(missing) if asked else None,
        "mean_psnr": fmean(row.scores["psnr"] for row in made) if made else None,
        "mean_seconds": seconds,
        "assets_per_hour": 3600 / seconds["total"] if made and seconds["total"] else None,
        "failures": {row.name: row.error for row in rows if row.verdict == FAILED},
        "missing": [f"{number:06d}" for number in missing[:NUM_NAMED]],
    }


# ---- The screen ----


def screen(place: Path | Storage) -> tuple[str, bool]:
    """(what there is of a batch, who works on it and what is missing, on one screen; whether all is made).

    Raises UserError if there is no batch.
    """
    index = Index(place).refresh()
    rows, asked = index.in_order(), read_asked(index.out)
    state, missing = totals(rows, asked), missing_numbers(rows, asked)
    of_all = f"of {asked.num_assets} " if asked else ""
    lost = f"{len(missing)} missing" if asked else "it is not known how many were asked for"
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in state["verdicts"].items())
    made = f"{index.storage}: {state['num_assets']} {of_all}made"
    lines = [f"{made} ({verdicts}), {state['num_failed']} failed, {lost}"]
    lines += _table(index.storage, rows, missing, asked) if asked else []
    lines += _first(f"{name} failed: {error}"[:110] for name, error in state["failures"].items())
    if missing:
        names = [f"{number:06d}" for number in missing[:NUM_ROWS]]
        lines.append(f"missing: {', '.join(names)}{', ...' * (len(missing) > NUM_ROWS)}")
    return "\n".join(lines), bool(asked) and not missing and not state["num_failed"]


def _table(storage: Storage, rows: Sequence[Row], missing: Sequence[int], asked: Asked) -> list[str]:
    """A table of the shards that are not whole, those that lack most first."""
    at_work = dict(storage.at_work())
    made, failed = Counter[int](), Counter[int]()
    for row in rows:
        (failed if row.verdict == FAILED else made)[int(row.name) % asked.num_shards] += 1
    lacks = Counter(number % asked.num_shards for number in missing)
    unfinished = sorted(lacks.keys() | failed.keys(), key=lambda shard: (-lacks[shard], shard))
    lines = [
        f"{f'{shard}/{asked.num_shards}':>9} {made[shard]:>9} {failed[shard]:>9} {lacks[shard]:>9}"
        f"   {at_work.pop((shard, asked.num_shards), 'nobody works on it')}"
        for shard in unfinished
    ]
    head = ["    shard      made    failed   missing"] if lines else []
    whole = [f"{asked.num_shards - len(lines)} of {asked.num_shards} shards are whole"]
    others = [f"{number}/{count}: {holder}" for (number, count), holder in sorted(at_work.items())]
    return [*head, *_first(lines), *whole, *_first(others)]


def _first(lines: Sequence[str] | Iterator[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - NUM_ROWS
    return lines[:NUM_ROWS] + ([f"... and {more} more"] if more > 0 else [])
