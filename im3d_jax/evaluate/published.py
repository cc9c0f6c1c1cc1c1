"""Numbers of the paper, which tables print beside what was measured: those of its own method.

They are of its models, its prompts and a CLIP that it does not name.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A row of a table of the paper. CLIP scores are 100 times a cosine; None is not stated there."""

    table: str
    method: str
    clip_text: float | None = None
    clip_image: float | None = None
    minutes: float | None = None
    network_calls: int | None = None


ROWS = (
    Published("Table 1", "IM-3D, views", 31.92, 92.38, 3.0),
    Published("Table 1", "IM-3D, renders", 31.66, 91.40, 3.0),
    Published("Table 4", "IM-3D", minutes=3.0, network_calls=80),
)


def as_json() -> list[dict[str, Any]]:
    """The rows as a result file has them."""
    return [row._asdict() for row in ROWS]
