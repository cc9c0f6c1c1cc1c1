"""Results: kept on disk from run to run, and laid out as tables in Markdown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from im3d_jax.evaluate import scores, views
from im3d_jax.evaluate.result_file import Row, table
from im3d_jax.evaluate.scores import Score
from recon_torch.files import write_json

Part = dict[str, Any]
"""The result of a part of the evaluation, as its JSON file holds it; "objects" has a row for each object."""

SCORE_COLUMNS = ["PSNR, dB", "foreground PSNR, dB", "silhouette IoU", "LPIPS"]


def kept(path: Path, key: str, make: Callable[[], Part]) -> Part:
    """What `make()` has returned in an earlier run with the same `key`, or returns now; "seconds" is added.

    path: keeps the result. Another key there means that it is of another model or of other objects; what is
        there and cannot be read is measured again.
    """
    if _read(path).get("key") != key:
        start = time.monotonic()
        made = make()
        write_json(path, {"key": key, **made, "seconds": round(time.monotonic() - start, 1)})
    # What was just made is read back, too, so that this run and the next hold the same numbers.
    return _read(path)


def _read(path: Path) -> Part:
    """The file's content; empty if there is none that can be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def rows(parts: Mapping[str, Part]) -> list[Row]:
    """The rows of a result file. What a part compares, such as generated and repeated views, are methods."""
    made = []
    for name, part in parts.items():
        for place, row in enumerate(part["objects"]):
            key, prompt = str(row.get("index", place)), row.get("caption") or row.get("prompt", "")
            for method, found in ROWS[name](row).items():
                made.append(Row(f"{name}: {method}", key, prompt, found))
    return made


def _assets_scores(row: Part) -> dict[str, dict[str, float]]:
    return {
        f"{name} elevation, round {number}": found
        for name, fit in row["fits"].items()
        for number, found in enumerate(fit["rounds"])
    }


def _elevation_scores(row: Part) -> dict[str, dict[str, float]]:
    return {"estimated": {"error_deg": abs(row["estimated_elevation_deg"] - row["elevation_deg"])}}


def _prompts_scores(row: Part) -> dict[str, dict[str, float]]:
    return {
        "generated": {"neighbour_lpips": row["neighbour_lpips"]},
        "true": {"neighbour_lpips": row["true_neighbour_lpips"]},
    }


ROWS: dict[str, Callable[[Part], dict[str, dict[str, float]]]] = {
    "views": lambda row: row["scores"],
    "assets": _assets_scores,
    "prompts": _prompts_scores,
    "elevation": _elevation_scores,
}


def report(parts: Mapping[str, Part], about: Sequence[str]) -> str:
    """The content of table.md, of the parts that there are. about: remarks to begin with."""
    sections = [tables(parts[name]) for name, tables in SECTIONS.items() if name in parts]
    if "elevation" in parts or "views" in parts:
        sections.append(elevation_section(parts))
    return "\n".join(["# Evaluation on test objects\n", *(f"- {line}" for line in about), "", *sections])


def views_section(part: Part) -> str:
    rows = part["objects"]
    names = list(rows[0]["scores"])
    overall = [[name, *_format(scores.mean([row["scores"][name] for row in rows]))] for name in names]
    return "\n".join(
        [
            f"## Views 1 to the last, from the true first view: mean over objects ({len(rows)})\n",
            table(["", *SCORE_COLUMNS], overall),
            "The object's own mean view is made from the truth: what a perfect blur would reach.\n",
            "### By category\n",
            _category_table(rows),
        ]
    )


def _category_table(rows: list[Part]) -> str:
    lines = []
    for category in sorted({row["category"] for row in rows}):
        members = [row["scores"] for row in rows if row["category"] == category]
        ours = scores.mean([member[views.GENERATED] for member in members])
        psnr = [
            scores.mean([member[name] for member in members]).psnr
            for name in (views.REPEATED, views.TRAINING_MEAN)
        ]
        lines.append([category, str(len(members)), *_format(ours), *(f"{value:.2f}" for value in psnr)])
    return table(["category", "objects", *SCORE_COLUMNS, "PSNR, first view", "PSNR, training mean"], lines)


def assets_section(part: Part) -> str:
    rows, lines = part["objects"], []
    for name in rows[0]["fits"]:
        for number in range(len(rows[0]["fits"][name]["rounds"])):
            mean = scores.mean([row["fits"][name]["rounds"][number] for row in rows])
            lines.append([f"{name} elevation, round {number}", *_format(mean)])
    return "\n".join(
        [
            f"## Renders of the asset between the turntable's azimuths: mean over objects ({len(rows)})\n",
            table(["", *SCORE_COLUMNS], lines),
            "All are rendered from the true elevation.\n",
        ]
    )


def prompts_section(part: Part) -> str:
    rows = part["objects"]
    generated, true = (np.mean([row[f"{kind}neighbour_lpips"] for row in rows]) for kind in ("", "true_"))
    return "\n".join(
        [
            f"## From the prompt alone: mean over prompts ({len(rows)})\n",
            table(
                ["LPIPS between neighbouring views", "mean"],
                [["generated", f"{generated:.3f}"], ["true turntables", f"{true:.3f}"]],
            ),
            "Whether the prompts are met is for the eye: `prompts.png`.\n",
        ]
    )


def elevation_section(parts: Mapping[str, Part]) -> str:
    lines = []
    for name, what in (("elevation", "true views"), ("views", "generated views")):
        if name in parts:
            errors_deg = [
                abs(r["estimated_elevation_deg"] - r["elevation_deg"]) for r in parts[name]["objects"]
            ]
            figures = (np.median(errors_deg), np.mean(errors_deg), np.percentile(errors_deg, 90))
            lines.append([what, str(len(errors_deg)), *(f"{value:.2f}" for value in figures)])
    return "\n".join(
        [
            "## Error of the estimated elevation, degrees\n",
            table(["", "objects", "median", "mean", "90th percentile"], lines),
        ]
    )


def _format(score: Score) -> list[str]:
    return [
        f"{score.psnr:.2f}",
        f"{score.psnr_foreground:.2f}",
        f"{score.silhouette_iou:.3f}",
        f"{score.lpips:.3f}",
    ]


SECTIONS = {"views": views_section, "assets": assets_section, "prompts": prompts_section}
