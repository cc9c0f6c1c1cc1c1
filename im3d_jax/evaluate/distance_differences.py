"""Differences of the distances of two sets of pictures from one reference, which a result file has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from im3d_jax.evaluate import jackknife, result_file

NAMES = {"fid": ("FID", 1.0), "kid": ("KID x 1000", 1000.0), "cmmd": ("CMMD", 1.0)}
"""What tables call a distance, and by what they multiply it."""


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """First minus second, for each distance that both have.

    The interval is None where they are not of the same rows: it leaves the same ones out of both.
    """
    made = []
    for score in NAMES:
        if first[score] is None or second[score] is None:
            continue
        mean, interval = first[score] - second[score], None
        without = [each["without"].get(score) for each in (first, second)]
        if first["groups"] == second["groups"] and all(without):
            interval = jackknife.interval(mean, np.subtract(*without))
        said = {"first": first["method"], "second": second["method"], "score": score}
        made.append({**said, "mean": mean, "interval": interval})
    return made


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The differences as Markdown."""
    lines = []
    for each in found:
        title, scale = NAMES[each["score"]]
        cells = [f"{scale * each['mean']:+.3f}", "-"]
        if each["interval"] is not None:
            low, high = (scale * end for end in each["interval"])
            cells[1] = f"[{low:+.3f}, {high:+.3f}]"
        lines.append([f"{each['first']} minus {each['second']}, {title}", *cells])
    return result_file.table(["", "difference", "95% interval"], lines)
