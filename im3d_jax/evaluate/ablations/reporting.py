"""What the numbers show: the result file, the tables in Markdown, and where the paper's trend is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from im3d_jax.evaluate import published, result_file
from im3d_jax.evaluate.ablations.measuring import Bench, final
from im3d_jax.evaluate.ablations.rows import Ready, changes
from im3d_jax.evaluate.ablations.tables import Table
from im3d_jax.evaluate.result_file import Bootstrap, Row
from im3d_jax.evaluate.scores import MAX_PSNR_DB
from recon_torch.errors import UserError

CLIP_IMAGE = "clip_image"
COLUMNS = {
    "psnr_foreground": ("foreground PSNR, dB", ".2f"),
    "psnr": ("PSNR, dB", ".2f"),
    "silhouette_iou": ("silhouette IoU", ".3f"),
    "lpips": ("LPIPS", ".4f"),
    CLIP_IMAGE: ("CLIP (image)", ".2f"),
    "clip_text": ("CLIP (text)", ".2f"),
    "network_calls": ("calls", ".0f"),
    "asset_seconds": ("seconds", ".0f"),
}
COSTS = ("network_calls", "asset_seconds")


def name_of(table: Table, each: Ready) -> str:
    """What a result file calls a row."""
    return f"{table.name}: {each.row.name}"


def content(
    bench: Bench,
    tables: Mapping[str, Table],
    rows: Mapping[str, Sequence[Ready]],
    bootstrap: Bootstrap,
    config_digest: str,
    base: Any,
) -> dict[str, Any]:
    """The content of the result file. Differences are each row of a table minus its first one.

    base: the config without overrides.

    Raises UserError if no row has scores.
    """
    made = [row for name, table in tables.items() for row in _rows_of(bench, table, rows[name])]
    if not any(row.scores for row in made):
        raise UserError(f"nothing could be measured: {next(iter(_failures(bench)), 'no object')}")
    methods = [
        {
            "name": name_of(table, each),
            "table": name,
            "row": each.row.name,
            "changes": changes(base, each),
            "config_digest": each.digest,
            "axis": _place(bench, table, each),
            "series": each.row.series,
        }
        for name, table in tables.items()
        for each in rows[name]
    ]
    weights = sorted(set(bench.weights_digests.values()))
    found = result_file.content(
        "ablations",
        bench.protocol,
        made,
        methods=methods,
        config_digest=config_digest,
        weights_digest=weights[0] if len(weights) == 1 else result_file.digest(weights),
        bootstrap=bootstrap,
        seeds={"sampling": bench.seed},
        about=[*_about(bench), *_failures(bench)],
    )
    differences = [
        each for name, table in tables.items() for each in _differences(made, table, rows[name], bootstrap)
    ]
    found |= {"differences": differences, "published": published.as_json(*_names(tables))}
    return found | {"trends": [each for name in tables for each in _trends(found, tables[name], rows[name])]}


def _names(tables: Mapping[str, Table]) -> list[str]:
    return [table.name for table in tables.values()]


def _rows_of(bench: Bench, table: Table, rows: Iterable[Ready]) -> list[Row]:
    """The rows of a table on all objects; those that failed have no scores."""
    return [
        Row(
            name_of(table, each),
            str(index),
            cell.get("caption", ""),
            {} if "failed" in cell else dict(final(cell)),
        )
        for each in rows
        for (digest, index), cell in bench.cells.items()
        if digest == each.digest
    ]


def _place(bench: Bench, table: Table, each: Ready) -> int | None:
    """Where a row stands along the axis of its table's plot."""
    if table.axis == "frames":
        return each.num_frames
    if table.axis == "rounds":
        return len(each.config.rounds.at_steps)
    cells = [cell for (digest, _), cell in bench.cells.items() if digest == each.digest]
    calls = [cell["network_calls"] for cell in cells if "failed" not in cell]
    return calls[0] if table.axis == "network_calls" and calls else None


def _differences(
    made: Sequence[Row], table: Table, rows: Sequence[Ready], bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    by_method = result_file.by_method([row for row in made if row.scores])
    first, *others = (by_method.get(name_of(table, each), []) for each in rows)
    return [each for other in others if other for each in result_file.differences(other, first, bootstrap)]


def _about(bench: Bench) -> list[str]:
    protocol = bench.protocol
    weights = (
        " with random weights, which is not the published metric" if bench.perceptual.random_weights else ""
    )
    return [
        f"Objects: {bench.objects.about}, of the test split, which training never meets; {bench.size} px. An"
        " asset is made from the true first view and the caption, and rendered from"
        f" {bench.num_views} azimuths between those of its views, from the true elevation.",
        f"PSNR is the mean of each view's, at most {MAX_PSNR_DB:g} dB; in the foreground each pixel counts by"
        f" its true coverage. LPIPS, as a score, is of {protocol['lpips']}{weights}.",
        "Seconds are of sampling, refining and fitting one asset on this machine, whatever else it did.",
        f"Whether a trend shows is decided by {decides(protocol)}, the mean over objects of the difference"
        " from the first row, whose 95% interval (bootstrap over objects) is wholly on one side of 0 or not."
        f" Of fewer than {LEAST_OBJECTS} objects nothing is told. The paper decides by CLIP scores of other"
        " objects and another network.",
    ]


def _failures(bench: Bench) -> list[str]:
    said = dict.fromkeys(cell["failed"] for cell in bench.cells.values() if "failed" in cell)
    counts = [sum(cell.get("failed") == each for cell in bench.cells.values()) for each in said]
    return [
        f"{count} of {len(bench.cells)} assets failed: {each}"
        for each, count in zip(said, counts, strict=True)
    ]


def decides(protocol: Mapping[str, Any]) -> str:
    """The score, in words, by which trends are told."""
    return COLUMNS[_deciding(protocol)][0]


def _deciding(protocol: Mapping[str, Any]) -> str:
    return CLIP_IMAGE if protocol["clip"] else "psnr_foreground"


# ---- Trends ----


LEAST_OBJECTS = 6
"""Below, the differences of all objects have one sign by chance in more than one case of 20: 2 / 2^N."""

TOO_FEW = "too few objects"
SEEN = {
    "shows": "The paper's trend shows",
    "not seen": "it is not seen at this number of objects",
    "the reverse": "the reverse shows",
    TOO_FEW: "too few objects to tell",
}
"""What `trend` says of a row of which the paper claims something."""


def trend(expected: int, interval: Sequence[float], num_rows: int) -> str:
    """What the interval of a difference from the first row says of what the paper claims of a row.

    expected: see `tables.Row`.
    """
    low, high = interval
    if num_rows < LEAST_OBJECTS:
        return TOO_FEW
    if low <= 0 <= high:
        return "not seen" if expected else "no difference seen"
    sign = 1 if low > 0 else -1
    if not expected:
        return "better" if sign > 0 else "worse"
    return "shows" if sign == expected else "the reverse"


def _trends(found: Mapping[str, Any], table: Table, rows: Sequence[Ready]) -> list[dict[str, Any]]:
    """For each row of a table but the first, what is seen of the paper's trend."""
    score, made = _deciding(found["protocol"]), []
    differences = {each["first"]: each for each in found["differences"] if each["score"] == score}
    stated = {each.method: each.clip_image for each in published.of(table.name)}
    for each in rows[1:]:
        name = name_of(table, each)
        if difference := differences.get(name):
            ours, paper = difference["interval"], stated.get(each.row.name)
            first = stated.get(rows[0].row.name)
            made.append(
                {
                    "method": name,
                    "score": score,
                    "mean": difference["mean"],
                    "interval": ours,
                    "num_rows": difference["num_rows"],
                    "paper_clip_image": None if paper is None or first is None else round(paper - first, 2),
                    "expected": each.row.expected,
                    "seen": trend(each.row.expected, ours, difference["num_rows"]),
                }
            )
    return made


# ---- Markdown ----


def text(found: Mapping[str, Any], tables: Mapping[str, Table], rows: Mapping[str, Sequence[Ready]]) -> str:
    """The content of table.md."""
    parts = ["# Ablations\n", *(f"- {line}" for line in found["about"]), ""]
    for name, table in tables.items():
        parts += _section(found, table, rows[name])
    return "\n".join(parts)


def _section(found: Mapping[str, Any], table: Table, rows: Sequence[Ready]) -> list[str]:
    scores = [name for name in COLUMNS if any(each["score"] == name for each in found["summary"])]
    cells = {(each["method"], each["score"]): each for each in found["summary"]}
    lines = []
    for each in rows:
        some = [cells.get((name_of(table, each), score)) for score in scores]
        count = max((cell["num_rows"] for cell in some if cell), default=0)
        lines.append([each.row.name, str(count), *map(_cell, scores, some)])
    parts = [
        f"## {table.name}: {table.about}\n",
        result_file.table(["", "objects", *(COLUMNS[score][0] for score in scores)], lines),
        "Means over objects [95% interval].\n",
    ]
    trends = [each for each in found["trends"] if each["method"].startswith(f"{table.name}: ")]
    if trends:
        parts += [
            f"{decides(found['protocol'])}, minus that of the first row; the paper's is CLIP (image).\n",
            result_file.table(
                ["", "difference", "in the paper", "the paper's trend"], list(map(_trend, trends))
            ),
            verdict(trends),
        ]
    return [*parts, *(f"{line}\n" for line in table.remarks), *_published(table)]


def _cell(score: str, each: Mapping[str, Any] | None) -> str:
    if each is None or each["mean"] is None:
        return "-"
    form = COLUMNS[score][1]
    if score in COSTS or each["num_rows"] < 2:
        return f"{each['mean']:{form}}"
    low, high = each["interval"]
    return f"{each['mean']:{form}} [{low:{form}}, {high:{form}}]"


def _trend(each: Mapping[str, Any]) -> list[str]:
    low, high = each["interval"]
    stated, claims = each["paper_clip_image"], {-1: "worse", 0: "-", 1: "better"}
    claim = claims[each["expected"]]
    paper = claim if stated is None else f"{claim}, {stated:+.2f}".removeprefix("-, ")
    form = "+.3f" if abs(each["mean"]) < 0.1 else "+.2f"
    interval = f" [{low:{form}}, {high:{form}}]" if each["num_rows"] > 1 else ""
    return [each["method"].partition(": ")[2], f"{each['mean']:{form}}{interval}", paper, each["seen"]]


def verdict(trends: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on where the paper's trend shows in a table and where not; "" where it claims none."""
    claimed = [each for each in trends if each["expected"]]
    said = []
    for seen, words in SEEN.items():
        names = [each["method"].partition(": ")[2] for each in claimed if each["seen"] == seen]
        said += [f"{words}: {', '.join(names)}"] if names else []
    text = "; ".join(said)
    return f"**{text[0].upper()}{text[1:]}.**\n" if said else ""


def _published(table: Table) -> list[str]:
    """The paper's own rows."""
    found = published.of(table.name)
    if not found:
        return []
    if any(each.clip_image is not None for each in found):
        header = ["as published", "CLIP (text)", "CLIP (image)"]
        lines = [[each.method, f"{each.clip_text:.2f}", f"{each.clip_image:.2f}"] for each in found]
    else:
        header = ["as published", "calls"]
        lines = [[each.method, f"{each.network_calls:,}"] for each in found]
    return [result_file.table(header, lines)]
