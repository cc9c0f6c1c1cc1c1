"""The one machine-readable file that every command of `im3d evaluate` writes: results.json.

    protocol          what decides what a number means: test objects, judges, views. Files can be compared if
                      their commands and protocols are equal
    config_digest     of the settings of what is measured; "" where there are none
    weights_digest    of the weights that were used, see `about`
    methods           what was measured: names, digests of inputs, and what is left out by which rule
    rows              a row for each method and prompt or object: {method, key, prompt, scores}
    summary           for each method and score the mean over rows, standard deviation and 95% interval
    differences       of the first method from each other one, over the rows that both have
    about             remarks without which the numbers would mislead

Other entries are the command's own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from im3d_jax import intervals
from recon_torch.errors import UserError, quoted
from recon_torch.files import write_json
from recon_torch.text_files import parse_json, read_text

NAME = "results.json"
FORMAT, FORMAT_VERSION = "im3d evaluation", 1
FEW_ROWS = 6
"""Below, a bootstrap knows so little of the spread that a remark says so."""
PACKAGES = ("im3d", "numpy", "pillow", "torch", "transformers", "jax", "lpips")


class Row(NamedTuple):
    """Scores of one method on one prompt or object.

    Attributes:
        key: the same for all methods.
        scores: by name; None where the score does not apply, such as one that needs a picture.
        against: a digest of what a score compares with, such as that picture, where it may differ by method.
    """

    method: str
    key: str
    prompt: str
    scores: Mapping[str, float | None]
    against: str = ""


class Bootstrap(NamedTuple):
    """Of the intervals."""

    num_resamples: int = intervals.NUM_RESAMPLES
    seed: int = 0


def content(
    command: str,
    protocol: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    methods: Sequence[Mapping[str, Any]],
    config_digest: str = "",
    weights_digest: str = "",
    bootstrap: Bootstrap = Bootstrap(),  # noqa: B008 - of values that do not change
    seeds: Mapping[str, int] | None = None,
    about: Sequence[str] = (),
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        command: such as "faithfulness".
        protocol: see the module. methods: at least a "name" each, in the order of tables.
        seeds: of what is random besides the bootstrap.
        packages: whose versions are named.

    Raises ValueError for two rows of one method with one key.
    """
    if twice := [each for each, count in Counter((row.method, row.key) for row in rows).items() if count > 1]:
        raise ValueError(f"two rows of {twice[0]}")
    names = [str(each["name"]) for each in methods]
    numbers = summary(rows, names, bootstrap)
    if any(1 < each["num_rows"] < FEW_ROWS for each in numbers):
        about = [
            *about,
            f"Intervals over fewer than {FEW_ROWS} rows are too narrow, as a bootstrap of so few is.",
        ]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "command": command,
        "protocol": dict(protocol),
        "protocol_digest": digest(protocol),
        "config_digest": config_digest,
        "weights_digest": weights_digest,
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "seeds": {**(seeds or {}), "bootstrap": bootstrap.seed},
        "interval": f"95%, percentiles of {bootstrap.num_resamples} resamples of the rows",
        "about": list(about),
        "methods": [dict(each) for each in methods],
        "summary": numbers,
        "differences": [
            each
            for other in names[1:]
            for each in differences(_of(rows, names[0]), _of(rows, other), bootstrap)
        ],
        "rows": [{**row._asdict(), "scores": dict(row.scores)} for row in rows],
    }


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Writes a result file; NaN and infinity are no results. Raises ValueError for them."""
    write_json(path, found)


def read(path: Path) -> dict[str, Any]:
    """The content of a result file, which may be named by its directory.

    Raises UserError for a file that no command of `im3d evaluate` has written, or a newer one.
    """
    path = path / NAME if path.is_dir() else path
    found = parse_json(read_text(path), path, finite=True)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is no {NAME} of `im3d evaluate`; give one, or its directory")
    if found.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {quoted(found.get('format_version'))}, and this reads {FORMAT_VERSION}"
        )
    try:
        assert all(isinstance(found[name], str) for name in ("command", "protocol_digest"))
        assert isinstance(found["protocol"], dict)
        assert found["protocol_digest"] == digest(found["protocol"])
        names = [each["name"] for each in found["methods"]]
        assert all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        rows = rows_of(found)
        for row in rows:
            assert all(isinstance(each, str) for each in (row.key, row.prompt, row.against))
            assert row.method in names
            for each in row.scores.values():
                assert each is None or type(each) in (int, float) and abs(each) <= sys.float_info.max
        assert len({(row.method, row.key) for row in rows}) == len(rows)
    except (AssertionError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged or was changed; run the command again") from None
    return found


def rows_of(found: Mapping[str, Any]) -> list[Row]:
    """The rows of a file."""
    return [
        Row(each["method"], each["key"], each["prompt"], each["scores"], each.get("against", ""))
        for each in found["rows"]
    ]


def digest(content: Any) -> str:
    """The SHA-256, in hex, of something as JSON has it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- Numbers over rows ----


def summary(rows: Sequence[Row], methods: Sequence[str], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """For each method and score: mean, standard deviation over rows (of the sample), interval, count.

    They are None where no row has the score; a single row has no standard deviation.
    """
    made = []
    for name in methods:
        own = _of(rows, name)
        for score in names_of(own):
            values = np.array([row.scores[score] for row in own if row.scores.get(score) is not None], float)
            made.append({"method": name, "score": score, **_statistics(values, bootstrap)})
    return made


def differences(first: Sequence[Row], second: Sequence[Row], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """First minus second, for each score that both have, over the rows that both have, paired by key.

    "num_against_others" of the pairs were compared with different things, see `Row`.
    """
    others, made = {row.key: row for row in second}, []
    pairs = [(row, others[row.key]) for row in first if row.key in others]
    num_other = num_against_others(pairs)
    for score in [name for name in names_of(first) if name in names_of(second)]:
        both = [(one.scores.get(score), other.scores.get(score)) for one, other in pairs]
        values = np.array([a - b for a, b in both if a is not None and b is not None], float)
        said = {"first": first[0].method, "second": second[0].method, "score": score}
        counts = {"num_positive": int((values > 0).sum()), "num_against_others": num_other}
        made.append({**said, **_statistics(values, bootstrap), **counts})
    return made


def num_against_others(pairs: Sequence[tuple[Row, Row]]) -> int:
    """How many pairs of rows were compared with different things."""
    return sum(bool(one.against and other.against and one.against != other.against) for one, other in pairs)


def names_of(rows: Sequence[Row]) -> list[str]:
    """The names of scores, in the order in which rows have them."""
    return list(dict.fromkeys(itertools.chain.from_iterable(row.scores for row in rows)))


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method."""
    found = defaultdict(list)
    for row in rows:
        found[row.method].append(row)
    return dict(found)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    header, *rows = ([each.replace("|", "\\|") for each in line] for line in (header, *rows))
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row.method == method]


def _statistics(values: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    if not len(values):
        return {"num_rows": 0, "mean": None, "std": None, "interval": None}
    return {
        "num_rows": len(values),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "interval": intervals.bootstrap(values, *bootstrap),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
