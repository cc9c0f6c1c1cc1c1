"""One asset of a batch as a row of its table, from what its report.json or error.json says."""

from __future__ import annotations

import functools
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from json import JSONDecoder
from typing import Any, NamedTuple

from im3d_jax.jobs import ASSETS, ERROR, FAILED
from recon_torch.asset_files import REPORT
from recon_torch.page import PAGE
from recon_torch.settings import Verdict

KINDS = (*Verdict, FAILED)
SECONDS = "seconds"
"""The column of the total; those of the stages are seconds_fit and the like."""

NUMBER = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""The names of scores and stages that become columns."""

DECODE = JSONDecoder(parse_constant=str).decode


class Row(NamedTuple):
    """One asset: what its report.json or, where it failed, its error.json says.

    Attributes:
        name: of its directory, a number.
        verdict: on the asset, or `FAILED`.
        seed: of the asset as it is; first_seed: of its first try, which is what was asked for.
        tries: how many were made of it.
        reasons, hints: of its quality.
        scores: of the last round: psnr [dB], ssim ... Only whole assets have them, and psnr is always there.
        seconds: by stage, and in total; of whole assets.
        error: why it failed. node: the host that it was made on.
        has_page: whether there is a page to look at it.
        image_digest, given_elevation_deg, config_digest: see `asset.origin`.
        size, mtime_ns: of the file that the row was read from.
    """

    name: str
    verdict: str
    prompt: str = ""
    image: str = ""
    seed: int | None = None
    first_seed: int | None = None
    tries: int = 1
    reasons: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    scores: dict[str, float] = {}
    seconds: dict[str, float] = {}
    error: str = ""
    node: str = ""
    has_page: bool = False
    image_digest: str | None = None
    given_elevation_deg: float | None = None
    config_digest: str | None = None
    size: int = 0
    mtime_ns: int = 0

    @property
    def path(self) -> str:
        """Relative to the batch's directory."""
        return f"{ASSETS}/{self.name}"


NOT_SCORES = re.compile("|".join(["until_step", f"{SECONDS}.*", "path", *Row._fields]))
"""Names that other columns have."""


# ---- From its file ----


def is_number(name: str) -> bool:
    """Whether a directory has the name of an asset's."""
    return name.isascii() and name.isdigit()


def read(directory: str | os.PathLike, known: Row | None = None) -> Row | None:
    """The row of an asset's directory; None if it has neither a whole report nor a reason for a failure.

    known: an earlier row, which is returned if its file has not changed.
    """
    directory = os.fspath(directory)
    for kind in (REPORT, ERROR):
        path = f"{directory}/{kind}"
        try:
            found = os.stat(path)
            has_page = kind == REPORT and os.access(f"{directory}/{PAGE}", os.F_OK)
            place = Place(os.path.basename(directory), has_page, found.st_size, found.st_mtime_ns)
            if row := unchanged(known, kind, place):
                return row
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                continue
            with open(path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                content = file.read()
        except OSError:
            continue
        if row := parse(kind, content, place._replace(size=found.st_size, mtime_ns=found.st_mtime_ns)):
            return row
    return None


class Place(NamedTuple):
    """What a row has from its files rather than from what they say; see `Row`."""

    name: str
    has_page: bool
    size: int
    mtime_ns: int


def unchanged(known: Row | None, kind: str, place: Place) -> Row | None:
    """A known row of the same file, report.json or error.json, if that has not changed; otherwise None."""
    if known is None or (known.verdict == FAILED) != (kind == ERROR):
        return None
    if (known.size, known.mtime_ns) != (place.size, place.mtime_ns):
        return None
    return known if known.has_page == place.has_page else known._replace(has_page=place.has_page)


def parse(kind: str, content: bytes, place: Place) -> Row | None:
    """The row that a report.json or an error.json (`kind`) tells; None if it is no whole one."""
    try:
        told = DECODE(content.decode())
        return _success(told, place) if kind == REPORT else _failure(told, place)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _failure(told: dict[str, Any], place: Place) -> Row:
    seed = _whole(told.get("seed"))
    return Row(
        verdict=FAILED,
        prompt=_text(told.get("prompt") or ""),
        image=_text(told.get("image") or ""),
        seed=seed,
        first_seed=seed,
        error=_text(told["error"]),
        node=_text(told.get("node") or ""),
        **place._asdict(),
    )


def _success(told: dict[str, Any], place: Place) -> Row:
    """Raises one of many errors for what is no whole report."""
    quality, tries = told["quality"], told.get("tries", [told])
    scores, seconds = _numbers(told["rounds"][-1], _score), _numbers(told["seconds"], _stage)
    _ = scores["psnr"], seconds["total"]
    elevation_deg = told.get("given_elevation_deg")
    return Row(
        verdict=str(Verdict(quality["verdict"])),
        prompt=_text(told.get("prompt") or ""),
        image=_text(told.get("image") or ""),
        seed=_whole(told.get("seed")),
        first_seed=_whole(tries[0].get("seed")),
        tries=len(tries),
        reasons=tuple(map(_text, quality["reasons"])),
        hints=tuple(map(_text, quality["hints"])),
        scores=scores,
        seconds=seconds,
        node=sys.intern(_text(told.get("node") or "")),
        image_digest=_text_or_none(told.get("image_digest")),
        given_elevation_deg=None if elevation_deg is None else float(elevation_deg),
        config_digest=_text_or_none(told.get("config_digest")),
        **place._asdict(),
    )


def _numbers(told: dict[str, Any], name_of: Callable[[str], str | None]) -> dict[str, float]:
    """What of an object are finite numbers with names of columns."""
    return {
        column: float(value)
        for name, value in told.items()
        if type(value) in (float, int) and math.isfinite(value) and (column := name_of(name))
    }


@functools.lru_cache(1000)
def _stage(name: str) -> str | None:
    """The one string for all stages of this name; None if it cannot be the name of a column."""
    return name if NUMBER.fullmatch(name) else None


@functools.lru_cache(1000)
def _score(name: str) -> str | None:
    """The same for a score."""
    return name if NUMBER.fullmatch(name) and not NOT_SCORES.fullmatch(name) else None


def _text(value: object) -> str:
    """As UTF-8 can have it: half a character becomes a question mark."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _text_or_none(value: object) -> str | None:
    return None if value is None else sys.intern(_text(value))


def _whole(value: object) -> int | None:
    return value if type(value) is int and -(2**63) <= value < 2**63 else None
