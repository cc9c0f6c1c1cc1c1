"""Plots of quality against calls, rounds and frames, with intervals, and contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from im3d_jax.evaluate.ablations.measuring import Bench
from im3d_jax.evaluate.ablations.reporting import COLUMNS
from im3d_jax.evaluate.ablations.rows import Ready
from im3d_jax.evaluate.ablations.tables import Table
from im3d_jax.evaluate.views import for_sheet
from im3d_jax.study.extra import needed
from recon_torch.files import replacing
from recon_torch.views.images import contact_sheet, write_image

COLORS, INK = ("#2456c4", "#c4562a", "#2a8a5c", "#8a4fb0"), "#1d2127"
AXES = {"network_calls": "calls of the network", "rounds": "rounds", "frames": "frames in the fit"}
PANELS = 2
SHEET_OBJECTS = 3


def check() -> None:
    """Raises UserError where the package that draws is not installed."""
    needed("matplotlib.figure", "a plot")


def plot(found: Mapping[str, Any], table: Table, path: Path) -> None:
    """Writes the plot of a table: the differences of its rows from the first one, along its axis if any."""
    backend, figures = needed("matplotlib.backends.backend_agg"), needed("matplotlib.figure")
    scores = _panels(found)
    methods = [each for each in found["methods"] if each["name"].startswith(f"{table.name}: ")]
    height = 3.4 if table.axis else 0.36 * len(methods) + 1.2
    figure = figures.Figure(figsize=(8.4 if table.axis else 9.6, height), layout="constrained")
    backend.FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(scores), squeeze=False)[0]
    for axis, score in zip(axes, scores, strict=True):
        draw = _along if table.axis else _differences
        draw(axis, found, methods, score)
        axis.spines[["top", "right"]].set_visible(False)
        if table.axis:
            axis.set_xlabel(AXES[table.axis], color=INK)
    if table.axis:
        axes[0].legend(frameon=False, fontsize=9)
    else:
        axes[1].set_yticklabels([])
    figure.suptitle(f"{table.name}: {table.about}", fontsize=11, color=INK)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _panels(found: Mapping[str, Any]) -> list[str]:
    """The scores that are drawn: those of the paper where they are, else those against truth."""
    there = {each["score"] for each in found["summary"]}
    wanted = ("clip_image", "clip_text", "psnr_foreground", "silhouette_iou")
    return [score for score in wanted if score in there][:PANELS]


def _along(axis: Any, found: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], score: str) -> None:
    """The first row is at 0. Objects differ far more than rows, so intervals of means would hide these."""
    cells = {each["first"]: each for each in found["differences"] if each["score"] == score}
    cells[methods[0]["name"]] = {"mean": 0.0, "interval": [0.0, 0.0]}
    for color, series in zip(COLORS, dict.fromkeys(each["series"] for each in methods), strict=False):
        some = [each for each in methods if each["series"] == series and each["name"] in cells]
        points = sorted((each["axis"], each["name"]) for each in some if each["axis"] is not None)
        x, found_there = [place for place, _ in points], [cells[name] for _, name in points]
        errors = [
            [each["mean"] - each["interval"][0] for each in found_there],
            [each["interval"][1] - each["mean"] for each in found_there],
        ]
        means = [each["mean"] for each in found_there]
        axis.errorbar(x, means, yerr=errors, color=color, marker="o", capsize=3, lw=1.4, label=series)
    axis.axhline(0, color=INK, lw=0.8, ls=":")
    axis.set_xticks(sorted({each["axis"] for each in methods if each["axis"] is not None}))
    axis.set_title(
        f"{COLUMNS[score][0]}, minus {methods[0]['row']}", fontsize=10, color=INK, parse_math=False
    )


def _differences(
    axis: Any, found: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], score: str
) -> None:
    """The rows from above, the first of which is the line at 0."""
    cells = {each["first"]: each for each in found["differences"] if each["score"] == score}
    for place, each in enumerate(methods[1:]):
        if cell := cells.get(each["name"]):
            low, high = cell["interval"]
            error = [[cell["mean"] - low], [high - cell["mean"]]]
            axis.errorbar(cell["mean"], place, xerr=error, color=COLORS[0], marker="o", capsize=3, lw=1.4)
    axis.axvline(0, color=INK, lw=0.8, ls=":")
    axis.set_ylim(len(methods) - 1.5, -0.5)
    axis.set_yticks(range(len(methods) - 1))
    axis.set_yticklabels([each["row"] for each in methods[1:]], fontsize=9, parse_math=False)
    axis.set_title(
        f"{COLUMNS[score][0]}, minus {methods[0]['row']}", fontsize=10, color=INK, parse_math=False
    )


def sheet(bench: Bench, table: Table, rows: Sequence[Ready], path: Path) -> None:
    """Writes the contact sheet of a table: of its first objects, the true views above those of each row."""
    pictures, labels = [], []
    for b, index in enumerate(bench.truth.indices[:SHEET_OBJECTS]):
        pictures.append(for_sheet(bench.between.rgb[b]))
        labels.append(bench.truth.captions[b] or f"object {index}")
        for each in rows:
            if "failed" not in bench.cells.get((each.digest, index), {"failed": ""}):
                pictures.append(bench.strip_views(each, index))
                labels.append(f"  {each.row.name}")
    write_image(path, contact_sheet(pictures, labels, tile_px=64))


def write(
    bench: Bench,
    found: Mapping[str, Any],
    tables: Mapping[str, Table],
    rows: Mapping[str, Sequence[Ready]],
) -> None:
    """Writes the plot and the contact sheet of each table."""
    for name, table in tables.items():
        plot(found, table, bench.out / "plots" / f"{file_name(table)}.png")
        sheet(bench, table, rows[name], bench.out / "sheets" / f"{file_name(table)}.png")


def file_name(table: Table) -> str:
    """Such as "table_2" and "fig_4"."""
    return table.name.lower().replace(".", "").replace(" ", "_")
