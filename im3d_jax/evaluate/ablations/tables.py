"""The tables of ablations, as data: each row is the config with other values for some of its entries.

The first row of a table is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: that of the row in `published`, where it is one of the paper's.
        overrides: values by dotted keys of the config.
        frames: the fit sees so many of the video's views, evenly spaced; None: all.
        expected: -1 where the paper says or shows that the row is worse than the first one, 1 where better.
        series: rows of one series are joined by a line in the plot.
        needs_lpips: whether the row means nothing without LPIPS in the loss.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    expected: int = 0
    series: str = ""
    needs_lpips: bool = False


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        name: that of the paper.
        about: what it shows.
        remarks: without which it would mislead.
        axis: what the plot has along its axis: "network_calls", "rounds", "frames", or "" for the rows.
    """

    name: str
    about: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    axis: str = ""


PAPER_LOSS = {"fit.w_lpips": 10.0, "fit.w_ssim": 0.2, "fit.w_mask": 1.0, "fit.w_rgb": 0.0, "fit.w_l1": 0.0}
"""A.1. Here there is an L1 loss besides, see `recon_torch.fit.loss`."""

RGB = PAPER_LOSS | {"fit.w_lpips": 0.0, "fit.w_rgb": 10.0}
"""The weight of the squared error is unspecified in the paper; this is that of LPIPS."""

PAPER_CALLS = {
    "video.num_steps": 40,
    "rounds.at_steps": (500, 1000),
    "rounds.num_runs": 2,
    "rounds.num_steps": 10,
}
"""A.1, read so that the calls are the 80 of Table 4."""


def _calls(video: int, at_steps: tuple[int, ...], runs: int, steps: int) -> dict[str, Any]:
    return dict(zip(PAPER_CALLS, (video, at_steps, runs, steps), strict=True))


NO_ROUNDS, TWO_ROUNDS = "no rounds", "two rounds"

TABLES = {
    "2": Table(
        "Table 2",
        "terms of the loss, and what is fitted",
        (
            Row("IM-3D", PAPER_LOSS, needs_lpips=True),
            Row("without LPIPS", PAPER_LOSS | {"fit.w_lpips": 0.0}, expected=-1),
            Row("RGB instead of LPIPS", RGB, expected=-1),
            Row("without SSIM", PAPER_LOSS | {"fit.w_ssim": 0.0}, expected=-1, needs_lpips=True),
            Row("without mask", PAPER_LOSS | {"fit.w_mask": 0.0}, expected=-1, needs_lpips=True),
            Row(
                "NeRF instead of Gaussians",
                PAPER_LOSS | {"fit.representation": "nerf"},
                expected=-1,
                needs_lpips=True,
            ),
            Row("L1 instead of LPIPS", PAPER_LOSS | {"fit.w_lpips": 0.0, "fit.w_l1": 5.0}),
            Row("L1 beside LPIPS", PAPER_LOSS | {"fit.w_l1": 5.0}, needs_lpips=True),
        ),
        (
            "The first row is the paper's loss, 10 LPIPS + 0.2 SSIM + mask; the two with L1 are not in the"
            " paper. L1 instead of LPIPS is the default of this project where LPIPS has no trained weights.",
            "The NeRF is a radiance field on a dense grid with this project's own ray marcher"
            " (`recon_torch/scene/nerf.py`), not the network of the paper, so its time is another one, too.",
        ),
    ),
    "3": Table(
        "Table 3",
        "fewer frames",
        (
            Row("16 frames", {"num_views": 16}, series="generated and fitted"),
            Row("8 frames", {"num_views": 8}, expected=-1, series="generated and fitted"),
            Row("4 frames", {"num_views": 4}, expected=-1, series="generated and fitted"),
            Row("8 of 16 frames", {"num_views": 16}, frames=8, expected=-1, series="16 generated"),
            Row("4 of 16 frames", {"num_views": 16}, frames=4, expected=-1, series="16 generated"),
        ),
        (
            "8 and 4 frames are generated and fitted, as in the paper; the network was not trained anew for"
            " them. Of 16 frames, 8 and 4 are in the fit, evenly spaced; all 16 are generated and refined.",
        ),
        axis="frames",
    ),
    "4": Table(
        "Table 4",
        "calls of the network",
        (
            Row("80 calls: 40 + 2 x 2 x 10", _calls(40, (500, 1000), 2, 10), series=TWO_ROUNDS),
            Row("60 calls: 40 + 2 x 1 x 10", _calls(40, (500, 1000), 1, 10), series=TWO_ROUNDS),
            Row("40 calls: 20 + 2 x 1 x 10", _calls(20, (500, 1000), 1, 10), series=TWO_ROUNDS),
            Row("20 calls: 10 + 2 x 1 x 5", _calls(10, (500, 1000), 1, 5), series=TWO_ROUNDS),
            Row("80 calls at once", _calls(80, (), 2, 10), series=NO_ROUNDS),
            Row("40 calls at once", _calls(40, (), 2, 10), series=NO_ROUNDS),
            Row("20 calls at once", _calls(20, (), 2, 10), series=NO_ROUNDS),
            Row("10 calls at once", _calls(10, (), 2, 10), series=NO_ROUNDS),
        ),
        (
            "The paper's Table 4 counts the calls of several methods and has no quality; what fewer calls"
            " cost is asked here. In the first rows calls are those of the first video + rounds x runs x"
            " steps; at once are those of the first video, without rounds.",
        ),
        axis="network_calls",
    ),
    "fig4": Table(
        "Fig. 4",
        "rounds of refinement",
        (
            Row("no rounds", _calls(40, (), 2, 10), series="rounds"),
            Row("1 round", _calls(40, (500,), 2, 10), expected=1, series="rounds"),
            Row("2 rounds", PAPER_CALLS, expected=1, series="rounds"),
            Row("3 rounds", _calls(40, (500, 750, 1000), 2, 10), series="rounds"),
        ),
        (
            "The paper shows by pictures that a round adds detail, and has no numbers; all fits here are of"
            " one length.",
        ),
        axis="rounds",
    ),
    "fig6": Table(
        "Fig. 6",
        "image-level and pixel-level losses",
        (
            Row("LPIPS", PAPER_LOSS, needs_lpips=True),
            Row("L2", RGB, expected=-1),
        ),
        ("The paper shows pictures. The rows are the first and the third of Table 2.",),
    ),
}
"""By what `--table` calls them."""

OWN = "own"
"""The table of a user's own rows."""
