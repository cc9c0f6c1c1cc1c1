"""`im3d export`: writes an asset in the format of another tool, and says how much the file differs."""

from __future__ import annotations

import contextlib
import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon_torch import outputs
from recon_torch.asset_files import ASSET, REPORT, gaussians_of
from recon_torch.errors import CommandParser, UserError, near, quoted
from recon_torch.outputs import Kind
from recon_torch.settings import UP_AXES, FileAxes, Format
from recon_torch.text_files import read_json

if TYPE_CHECKING:
    from recon_torch.formats.ply import Loaded
    from recon_torch.views.axes import Axes

PLY = "ply"
EXAMPLES = """examples:
  im3d export out/duck --to duck.spz                   # a directory with asset.ply, or a file
  im3d export out/duck --to duck.spz --format spz4     # PlayCanvas's engine reads version 4 alone
  im3d export trained.ply --up=-y --to trained.glb
  im3d export scan.sog --to scan.ply                   # formats are read as well as written

The file is read back and compared before it gets its name. docs/formats.md says what each format keeps.
"""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    kind = format_of(flags.to, flags.format)
    source = gaussians_of(flags.asset)
    ours = Kind("export", (re.escape(flags.to.name),))
    outputs.check(flags.to.parent, ours, [source])

    from recon_torch.fit.export import Difference, export  # torch takes seconds, see `commands.render`
    from recon_torch.formats import files

    choice = FileAxes(flags.axes) if flags.axes else FileAxes.WORLD if flags.up else None
    loaded = files.load(source, choice)
    upright, notes = _upright(flags, source, loaded)
    for note in [*loaded.notes, *notes]:
        print(f"note: {source}: {note}", flush=True)
    found: list[Difference] = []
    with outputs.opened(flags.to.parent, ours, [source]) as directory:
        outputs.put(
            directory,
            ours,
            flags.to.name,
            lambda path: found.append(export(loaded.gaussians, path, kind, upright)),
        )
    print(f"{flags.to}: {found[0]}")


def format_of(path: Path, given: str | None) -> Format | None:
    """The format of a file to write, by its suffix and, where two have it, by its name; None for .ply.

    Raises UserError for a suffix that no format has, or that another one has than is given.
    """
    suffixes = {f".{PLY}": PLY} | {each.suffix: str(each) for each in reversed(Format)}
    longest_first = sorted(suffixes, key=len, reverse=True)
    suffix = next((each for each in longest_first if path.name.lower().endswith(each)), None)
    if suffix is None:
        known = ", ".join(sorted(suffixes))
        hint = near(path.suffix, suffixes) if path.suffix else ""
        raise UserError(f"--to {path} has no suffix of a format ({known}){hint}")
    if path.name.lower() == suffix:
        raise UserError(f"--to {path} is a suffix alone; give it a name")
    if given is None:
        return None if suffixes[suffix] == PLY else Format(suffixes[suffix])
    if Format(given).suffix != suffix:
        raise UserError(f"--to {path} and --format {given} are two formats; take one of them out")
    return Format(given)


def _upright(flags: Namespace, source: Path, loaded: Loaded) -> tuple[Axes, list[str]]:
    """The axes of a file in which the object stands, and a note where nothing says which these are."""
    import numpy as np

    from recon_torch.views import axes

    if flags.up:
        return axes.chosen(FileAxes.UPRIGHT, np.array(UP_AXES[flags.up])), []
    if loaded.upright is not None:
        return loaded.upright, []
    up = _up_of_report(source)
    if up is not None:
        return axes.chosen(FileAxes.UPRIGHT, np.array(up)), []
    return axes.WORLD, ["does not say which of its axes is up, so they are kept; --up says it"]


def _up_of_report(source: Path) -> tuple[float, float, float] | None:
    """The axis that is up in the world of an asset, by the report beside it."""
    report: Any = None
    if source.name == ASSET:
        with contextlib.suppress(UserError):  # one that is damaged, or of another program
            report = read_json(source.with_name(REPORT))
    if not isinstance(report, dict):
        return None
    if "config_digest" in report:  # of `im3d generate`, whose world has +Z up
        return UP_AXES["z"]
    place = report.get("world")
    up = place.get("up") if isinstance(place, dict) else None
    return next((each for each in UP_AXES.values() if up == list(each)), None)


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser(
        "export", "Writes an asset in the format of another tool, reads it back and compares."
    )
    parser.epilog = EXAMPLES
    add = parser.add_argument
    # fmt: off
    add("asset", type=Path, metavar="ASSET", help="a directory with asset.ply, or a file of Gaussians")
    add("--to", type=Path, required=True, metavar="FILE", help="what to write; its suffix tells the format")
    add("--format", choices=tuple(map(str, Format)), help="where the suffix does not: spz4 is .spz, too")
    add("--up", choices=UP_AXES, help="the axis that is up in the asset; by default what the asset says")
    add("--axes", choices=tuple(map(str, FileAxes)),
        help="of an asset that does not say it: upright in viewers, the default but of a plain .ply, or "
        "those of its world")
    # fmt: on
    flags = parser.parse_args(argv)
    if not flags.to.name:
        raise UserError(f"--to is {quoted(str(flags.to))}, which names no file")
    return flags
