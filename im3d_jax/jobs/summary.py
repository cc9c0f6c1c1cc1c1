"""What all shards of a batch have made, in numbers: summary.json, and the screen of `im3d batch --status`.

summary.json is written when a shard begins and when it ends, so that a shard that is lost is missing there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from im3d_jax.asset import REPORT
from im3d_jax.jobs import ASSETS, BATCH, ERROR
from im3d_jax.jobs.outcomes import FAILED
from recon_torch import locks, outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.page import PAGE
from recon_torch.settings import Verdict

SUMMARY = "summary.json"
KINDS = (*Verdict, FAILED)

NUM_NAMED = 1000
"""So many missing assets summary.json names; it counts them all."""

NUM_ROWS = 8
"""So many shards, failures and missing assets a screen lists."""


class Asked(NamedTuple):
    """What the newest call asked for: assets of the whole batch, and shards."""

    num_assets: int
    num_shards: int


class Entry(NamedTuple):
    """What one directory of the batch holds.

    Attributes:
        name: of the directory, a number.
        kind: the verdict on the asset, or `FAILED`.
        told: the content of its report.json or error.json.
        has_page: whether there is a page to look at it.
    """

    name: str
    kind: str
    told: dict[str, Any]
    has_page: bool = False

    @property
    def reasons(self) -> list[str]:
        """What speaks against the asset."""
        if self.kind == FAILED:
            return [str(self.told["error"])]
        return [*self.told["quality"]["reasons"], *self.told["quality"]["hints"]]

    @property
    def psnr(self) -> float:
        """In dB, of the renders to the views of the last round. Only whole assets have it."""
        return float(self.told["rounds"][-1]["psnr"])

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, and in total. Only whole assets have them."""
        return {stage: float(seconds) for stage, seconds in self.told["seconds"].items()}


def write(out: Path, asked: Asked | None = None) -> tuple[list[Entry], dict[str, Any]]:
    """Writes summary.json. Returns the entries of the assets that are there, and its content.

    asked: by default what summary.json says, if it is there.

    Raises UserError if `out` is not the directory of a batch, and for files of a batch's names that are not
    ours.
    """
    assets = collect(out)
    outputs.check(out, BATCH)
    outputs.claim(out, BATCH)
    content = totals(assets, asked or read_asked(out))
    write_json(out / SUMMARY, content)
    return assets, content


def read_asked(out: Path) -> Asked | None:
    """What was asked for, by the summary.json that is there; None if it does not say it."""
    try:
        told = json.loads((out / SUMMARY).read_text())
        asked = Asked(told["num_asked"], told["num_shards"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return asked if all(isinstance(number, int) and number > 0 for number in asked) else None


def collect(out: Path) -> list[Entry]:
    """The assets that are whole or have failed, in the order of their numbers."""
    if not (out / ASSETS).is_dir():
        raise UserError(f"no batch in {out}; give a directory that `im3d batch --out` wrote")
    directories = [path for path in (out / ASSETS).iterdir() if path.name.isascii() and path.name.isdigit()]
    found = (read(path) for path in sorted(directories, key=lambda path: int(path.name)))
    return [asset for asset in found if asset]


def read(directory: Path) -> Entry | None:
    """The entry of a directory; None if it has neither a whole report nor a reason for a failure."""
    for name in (REPORT, ERROR):
        try:
            told = json.loads((directory / name).read_text(), parse_constant=str)
            kind = FAILED if name == ERROR else told["quality"]["verdict"]
            asset = Entry(directory.name, kind, told, (directory / PAGE).is_file())
            _ = asset.reasons, asset.kind == FAILED or (asset.psnr, asset.seconds["total"])
            if asset.kind in KINDS:
                return asset
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return None


def missing_numbers(assets: Sequence[Entry], asked: Asked | None) -> list[int]:
    """The numbers of the assets that were asked for and have neither been made nor failed."""
    there = {int(asset.name) for asset in assets}
    return [number for number in range(asked.num_assets if asked else 0) if number not in there]


def totals(assets: list[Entry], asked: Asked | None) -> dict[str, Any]:
    """The content of summary.json. Means are over whole assets; assets_per_hour counts one lane.

    asked: None if nobody knows it, as in batches of earlier versions.
    """
    missing = missing_numbers(assets, asked)
    made = [asset for asset in assets if asset.kind != FAILED]
    stages = sorted({stage for asset in made for stage in asset.seconds})
    seconds = {stage: fmean(asset.seconds.get(stage, 0.0) for asset in made) for stage in stages}
    counts = Counter(asset.kind for asset in assets)
    return {
        "num_asked": asked.num_assets if asked else None,
        "num_shards": asked.num_shards if asked else None,
        "num_assets": len(made),
        "verdicts": {str(verdict): counts[verdict] for verdict in Verdict},
        "num_failed": counts[FAILED],
        "num_missing": len(missing) if asked else None,
        "mean_psnr": fmean(asset.psnr for asset in made) if made else None,
        "mean_seconds": seconds,
        "assets_per_hour": 3600 / seconds["total"] if made else None,
        "failures": {asset.name: asset.reasons[0] for asset in assets if asset.kind == FAILED},
        "missing": [f"{number:06d}" for number in missing[:NUM_NAMED]],
    }


# ---- The screen ----


def screen(out: Path) -> tuple[str, bool]:
    """(what there is of a batch, who works on it and what is missing, on one screen; whether all is made).

    Raises UserError if `out` is not the directory of a batch.
    """
    assets, asked = collect(out), read_asked(out)
    state, missing = totals(assets, asked), missing_numbers(assets, asked)
    of_all = f"of {asked.num_assets} " if asked else ""
    lost = f"{len(missing)} missing" if asked else "it is not known how many were asked for"
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in state["verdicts"].items())
    lines = [f"{out}: {state['num_assets']} {of_all}made ({verdicts}), {state['num_failed']} failed, {lost}"]
    lines += _rows(out, assets, missing, asked) if asked else []
    lines += _first(f"{name} failed: {error}"[:110] for name, error in state["failures"].items())
    if missing:
        names = [f"{number:06d}" for number in missing[:NUM_ROWS]]
        lines.append(f"missing: {', '.join(names)}{', ...' * (len(missing) > NUM_ROWS)}")
    return "\n".join(lines), bool(asked) and not missing and not state["num_failed"]


def _rows(out: Path, assets: Sequence[Entry], missing: Sequence[int], asked: Asked) -> list[str]:
    """A table of the shards that are not whole, those that lack most first."""
    at_work = locks.parts_at_work(out)
    made, failed = Counter[int](), Counter[int]()
    for asset in assets:
        (failed if asset.kind == FAILED else made)[int(asset.name) % asked.num_shards] += 1
    lacks = Counter(number % asked.num_shards for number in missing)
    unfinished = sorted(lacks.keys() | failed.keys(), key=lambda shard: (-lacks[shard], shard))
    rows = [
        f"{f'{shard}/{asked.num_shards}':>9} {made[shard]:>9} {failed[shard]:>9} {lacks[shard]:>9}"
        f"   {at_work.pop((shard, asked.num_shards), 'nobody works on it')}"
        for shard in unfinished
    ]
    head = ["    shard      made    failed   missing"] if rows else []
    whole = [f"{asked.num_shards - len(rows)} of {asked.num_shards} shards are whole"]
    others = [f"{number}/{count}: {holder}" for (number, count), holder in sorted(at_work.items())]
    return [*head, *_first(rows), *whole, *_first(others)]


def _first(lines: Sequence[str] | Iterator[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - NUM_ROWS
    return lines[:NUM_ROWS] + ([f"... and {more} more"] if more > 0 else [])
