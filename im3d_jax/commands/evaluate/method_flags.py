"""The flag --method, which the commands that measure outputs share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from im3d_jax.evaluate.outputs import finding, layouts, presets
from im3d_jax.evaluate.outputs.finding import Asked, MethodOutputs
from im3d_jax.evaluate.outputs.layouts import Source
from recon_torch.errors import CommandParser, UserError, quoted

HELP = f"""--method is NAME=DIR, a directory whose layout is found by convention; PRESET:NAME=DIR, the default
layout of a known method; or a YAML file. docs/evaluate.md describes all three. The presets are
{textwrap.fill(", ".join(presets.PRESETS), 100)}."""


def add(parser: CommandParser) -> None:
    """Adds the flag, which may be repeated, as `methods`: texts for `find`."""
    parser.add_argument(
        "--method",
        action="append",
        required=True,
        dest="methods",
        metavar="NAME=DIR",
        help="a method and its outputs; the first one is compared with each of the others",
    )


def sources(texts: Sequence[str]) -> list[Source]:
    """The methods of the flags. Raises UserError as `layouts.named` does."""
    return [layouts.named(text, "--method ") for text in texts]


def find(methods: Sequence[Source], asked: Sequence[Asked] = ()) -> list[MethodOutputs]:
    """The outputs of methods. Raises UserError for two of one name, and where there are none."""
    found = [each for method in methods for each in finding.find(method, asked)]
    labels = [each.label for each in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two methods are called {quoted(twice[0])}; give them other names, as NAME=DIR")
    if not asked:
        finding.name_missing(found)
    return found
