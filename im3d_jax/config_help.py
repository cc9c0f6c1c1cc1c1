"""What `--help-config` prints: the entries of a config, their values, and what each takes."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from recon_torch import ranges
from recon_torch.errors import UserError, quoted

SHOWN = 40
"""So many characters of a value are shown."""

Row = tuple[str, Any, str]
"""(dotted key, value, what it takes)"""


def lines(config: ConfigDict, kind: type) -> list[str]:
    """A line for each entry, in columns: `--config.KEY`, its value in this config, and what it takes.

    kind: the settings class of a whole config of this kind.
    """
    rows = [*_rows(config, kind, ""), *_part_rows(config)]
    names = [f"--config.{name}" for name, _, _ in rows]
    values = [quoted(value, SHOWN) for _, value, _ in rows]
    widths = [max(map(len, column), default=0) for column in (names, values)]
    return [
        f"{name:<{widths[0]}}  {value:<{widths[1]}}  {takes}".rstrip()
        for name, value, (_, _, takes) in zip(names, values, rows, strict=True)
    ]


def _rows(values: ConfigDict, kind: type, prefix: str) -> Iterator[Row]:
    """The entries of a section that `kind` knows."""
    for name, hint in ranges.hints_of(kind).items():
        if name not in values:
            continue
        value, key = values[name], f"{prefix}{name}"
        if isinstance(value, ConfigDict) and (section := ranges.section_of(hint)):
            yield from _rows(value, section, f"{key}.")
        elif isinstance(value, ConfigDict) and (section := ranges.sections_by_name(hint)):
            for each in value:
                yield from _rows(value[each], section, f"{key}.{each}.")
        else:
            yield key, value, ranges.told(hint)


def _part_rows(config: ConfigDict) -> Iterator[Row]:
    """The parts that the config names, and the arguments that it gives them."""
    from im3d_jax.parts import REGISTRIES  # imports JAX

    for section, registry in REGISTRIES.items():
        part = config.get(section)
        if not isinstance(part, ConfigDict) or not part:
            continue
        entry = registry.key.rpartition(".")[2]
        name, prefix = part.get(entry), registry.section.removeprefix("config.")
        yield f"{section}.{entry}", name, f"one of {', '.join(registry.ours)}, or a module of your own"
        kwargs = part.get("kwargs", {}) if entry == "name" else {k: part[k] for k in part if k != entry}
        try:
            hints: Mapping[str, Any] = ranges.arguments_of(registry.find(name))
        except UserError:  # a name of nothing, which is no reason not to list the rest
            hints = {}
        for argument, value in kwargs.items():
            yield f"{prefix}.{argument}", value, ranges.told(hints.get(argument, typing.Any))
