"""Rows as configs: each is checked before anything runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from im3d_jax import backbones, config_flags, config_sections, pipeline
from im3d_jax.evaluate.ablations.tables import OWN, TABLES, Row, Table
from im3d_jax.evaluate.result_file import digest
from recon_torch.errors import UserError, near, quoted

FIXED = ("size", "seed")
"""Entries that decide the true views, which all rows share."""

SAMPLING = ("num_views", "video", "rounds", "elevation")
FITTING = ("fit", "rounds", "gates", "export", "mesh", "turntable")
LONGEST_NAME = 60


class Ready(NamedTuple):
    """A row that can run.

    Attributes:
        config: of the row.
        digest: of the config and the number of frames: rows of one digest are the same.
        model_digest: rows of one digest have the same network.
        video_digest: rows of one digest have the same first videos.
    """

    row: Row
    config: ConfigDict
    digest: str
    model_digest: str
    video_digest: str

    @property
    def num_frames(self) -> int:
        """How many views the fit sees."""
        return self.row.frames or self.config.num_views


def own_table(texts: Sequence[str]) -> Table:
    """The table of a user's own rows, the first of which is the config as it is."""
    rows = [Row("as configured"), *map(parse, texts)]
    return Table("Own rows", "rows of --row", tuple(rows))


def parse(text: str) -> Row:
    """The row of "NAME: fit.w_ssim=0 frames=8". Raises UserError for another form."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    try:
        words = shlex.split(rest)
    except ValueError:  # a quote that is not closed
        words = []
    pairs = [word.removeprefix("--").removeprefix("config.").partition("=") for word in words]
    if not (colon and name and pairs and all(key and equals for key, equals, _ in pairs)):
        raise UserError(f"--row {quoted(text)} is not 'NAME: KEY=VALUE', such as 'no SSIM: fit.w_ssim=0'")
    if len(name) > LONGEST_NAME or not name.isprintable() or "|" in name:
        raise UserError(f"--row: {quoted(name)} is no name of at most {LONGEST_NAME} characters without |")
    overrides = {key: value for key, _, value in pairs}
    if len(overrides) < len(pairs):
        raise UserError(f"--row {quoted(text)} sets a key twice")
    frames = overrides.pop("frames", None)
    if frames is not None and not (frames.isascii() and frames.isdigit()):
        raise UserError(f"--row {quoted(name)}: frames is {quoted(frames)}; give a whole number")
    return Row(name, overrides, None if frames is None else int(frames))


def chosen(names: Sequence[str], own: Sequence[str]) -> dict[str, Table]:
    """The tables of these names, in the order of `TABLES`, and one of the user's own rows if there are any.

    Raises UserError for unknown names, for two rows of one name, and if nothing is asked for.
    """
    for name in names:
        if name not in TABLES:
            raise UserError(f"--table {quoted(name)}; there are {', '.join(TABLES)}{near(name, TABLES)}")
    tables = {name: table for name, table in TABLES.items() if name in names}
    if own:
        tables[OWN] = own_table(own)
        found = [row.name for row in tables[OWN].rows]
        if twice := [each for each in found if found.count(each) > 1]:
            raise UserError(f"two rows are called {quoted(twice[0])}; give each --row a name of its own")
    if not tables:
        raise UserError(f"nothing to measure; give --table, one of {', '.join(TABLES)}, or --row")
    return tables


def ready(config: ConfigDict, tables: Mapping[str, Table]) -> dict[str, list[Ready]]:
    """The rows of tables on a config.

    Raises UserError, which names table and row, for a row that cannot be: unknown keys, values out of their
    range or that do not go together, a row that changes what the true views are of, more frames than views.
    """
    return {name: [_ready(config, table, row) for row in table.rows] for name, table in tables.items()}


def _ready(config: ConfigDict, table: Table, row: Row) -> Ready:
    try:
        made = config_flags.with_overrides(config, dict(row.overrides))
        pipeline.read_settings(made)
        for key in FIXED:
            if made[key] != config[key]:
                raise UserError(
                    f"it changes config.{key}, and all rows are compared with the same true views"
                )
        takes = backbones.build(*config_sections.named(made, "backbone")).num_views
        if takes not in (None, made.num_views):
            raise UserError(f"config.num_views is {made.num_views}, but {made.backbone.name} makes {takes}")
        if row.frames is not None and not 1 <= row.frames <= made.num_views:
            raise UserError(f"frames is {row.frames}, of {made.num_views} views")
    except UserError as error:
        raise UserError(f"{table.name}, row {quoted(row.name)}: {error}") from None
    content = config_flags.as_json(made)
    return Ready(
        row,
        made,
        digest({"config": content, "frames": row.frames}),
        digest(_without(content, {*SAMPLING, *FITTING})),
        digest(_without(content, set(FITTING))),
    )


def _without(content: Mapping[str, Any], sections: set[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in sections}


def changes(config: ConfigDict, each: Ready) -> dict[str, Any]:
    """The entries in which the config of a row differs, with their values in the row."""
    before, now = (_flat(config_flags.as_json(x)) for x in (config, each.config))
    found = {key: value for key, value in now.items() if before[key] != value}
    return found | ({} if each.row.frames is None else {"frames": each.row.frames})


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def check_lpips(rows: Mapping[str, Sequence[Ready]], has_random_weights: bool) -> None:
    """Raises UserError for a row that means nothing without LPIPS, where the loss would go without it."""
    for name, each in ((name, each) for name, some in rows.items() for each in some):
        fit = each.config.fit
        if each.row.needs_lpips and has_random_weights and fit.lpips_weights != "random":
            raise UserError(
                f"{TABLES[name].name}, row {quoted(each.row.name)}: LPIPS has no trained weights here, so the"
                " loss would go without it; give --config.fit.lpips_weights=FILE, or =random for a network"
                " of random weights"
            )
