"""Numbers of the paper, which tables print beside what was measured.

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
    Published("Table 4", "SyncDreamer", network_calls=200),
    Published("Table 4", "Zero123XL", network_calls=1200),
    Published("Table 4", "MVDream", network_calls=20_000),
    Published("Table 4", "ImageDream", network_calls=25_000),
    Published("Table 4", "ProlificDreamer", network_calls=320_000),
    Published("Table 2", "IM-3D", 31.66, 91.40, 3.0),
    Published("Table 2", "without LPIPS", 29.38, 84.71),
    Published("Table 2", "RGB instead of LPIPS", 29.67, 84.99),
    Published("Table 2", "without SSIM", 31.53, 90.64),
    Published("Table 2", "without mask", 31.43, 90.14),
    Published("Table 2", "NeRF instead of Gaussians", 30.42, 87.37, 40.0),
    Published("Table 3", "16 frames", 31.66, 91.40),
    Published("Table 3", "8 frames", 31.38, 90.06),
    Published("Table 3", "4 frames", 30.06, 86.96),
)


def of(*tables: str) -> list[Published]:
    """The rows of some tables, in the order of `ROWS`."""
    return [row for row in ROWS if row.table in tables]


def as_json(*tables: str) -> list[dict[str, Any]]:
    """The rows of some tables as a result file has them."""
    return [row._asdict() for row in of(*tables)]
