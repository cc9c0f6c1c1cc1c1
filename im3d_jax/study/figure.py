"""The figure (Fig. 5): how often the first method of each pair is preferred, by question, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from im3d_jax.study.extra import needed

FIRST, SECOND, INK = "#2456c4", "#cfd5df", "#1d2127"
NARROW = 0.12
"""A part of a bar that is too narrow for its number, which then stands beside it on the other part."""
TITLES = {"alignment": "Image alignment", "quality": "3D quality"}


def write(comparisons: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Writes the figure in the formats of the paths' suffixes, such as .png and .pdf."""
    backend, figures = needed("matplotlib.backends.backend_agg"), needed("matplotlib.figure")
    questions = list(dict.fromkeys(each["question"] for each in comparisons))
    rows = len(comparisons) // len(questions)
    figure = figures.Figure(figsize=(4.6 * len(questions) + 0.6, 0.62 * rows + 1.3), layout="constrained")
    backend.FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(questions), squeeze=False)[0]
    for axis, question in zip(axes, questions, strict=True):
        _draw(axis, [each for each in comparisons if each["question"] == question])
        axis.tick_params(labelleft=axis is axes[0])  # the rows of all questions are alike
        axis.set_title(TITLES.get(question, question), fontsize=12, color=INK)
    for path in paths:
        # Without dates, equal results make equal files.
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
        figure.savefig(path, dpi=200, metadata=metadata)


def _draw(axis: Any, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Bars from 0 to 100%, the first pair on top. The names are text alone, whatever signs they have."""
    for row, each in enumerate(comparisons):
        rate = each["win_rate"]
        if rate is None:
            axis.text(2, row, "no answers", va="center", color=INK, fontsize=9)
            continue
        low, high = (100 * end for end in each["interval"])
        axis.barh(row, 100 * rate, color=FIRST, height=0.62)
        axis.barh(row, 100 * (1 - rate), left=100 * rate, color=SECOND, height=0.62)
        # The interval below the numbers, which it may reach.
        axis.errorbar(
            100 * rate,
            row + 0.17,
            xerr=[[max(100 * rate - low, 0)], [max(high - 100 * rate, 0)]],
            color=INK,
            capsize=3,
            lw=1.2,
        )
        if rate > NARROW:
            _number(axis, 2.0, row, rate, "left", "white")
        else:
            _number(axis, 100 * rate + 2, row, rate, "left", INK)
        if rate < 1 - NARROW:
            _number(axis, 98.0, row, 1 - rate, "right", INK)
        else:
            _number(axis, 100 * rate - 2, row, 1 - rate, "right", "white")
    axis.axvline(50, color=INK, lw=0.8, ls=":")
    axis.set(xlim=(0, 100), ylim=(len(comparisons) - 0.5, -0.5), xlabel="preferred in % of answers")
    axis.set_yticks(range(len(comparisons)))
    axis.set_yticklabels(
        [f"{each['first']}\nvs. {each['second']}" for each in comparisons], fontsize=9, parse_math=False
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=0)


def _number(axis: Any, x: float, row: int, share: float, align: str, ink: str) -> None:
    axis.text(x, row - 0.1, f"{100 * share:.0f}%", color=ink, va="center", ha=align, fontsize=9)
