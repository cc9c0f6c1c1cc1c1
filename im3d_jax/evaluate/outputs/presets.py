"""The layouts that known methods write by default, each with where in its public code that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A method's outputs. fields: of `layouts.Layout`; source: repository and path; note: what to know."""

    fields: Mapping[str, Any]
    source: str
    note: str = ""


PRESETS: dict[str, Preset] = {}
