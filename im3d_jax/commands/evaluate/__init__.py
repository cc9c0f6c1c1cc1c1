"""`im3d evaluate`: numbers on a model, and on the outputs of any method.

    im3d evaluate suite --suite procedural --out out/suite
    im3d evaluate faithfulness --method ours=out/batch --method other=other.yaml --clip DIR --out out/table1
    im3d evaluate ablations --table 3 --table 4 --num-objects 6 --out out/ablations
    im3d evaluate truth --meshes shapes/ --protocol sv3d-static --out truth/shapes
    im3d evaluate views3d --truth truth/shapes --method ours=out/batch --out out/views3d
    im3d evaluate distribution --reference truth/shapes --method ours=out/batch --inception FILE --out out/fid
    im3d evaluate compare out/a/results.json out/b/results.json

Flags without a command are those of `suite`. `im3d evaluate COMMAND --help` lists the flags of each.
docs/evaluate.md is the guide.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from recon_torch.errors import UserError, near

COMMANDS = ("suite", "ablations", "faithfulness", "truth", "views3d", "distribution", "compare")
"""Each is a module of this package, with a `main`."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0].startswith("-"):  # as the command was called before it had others beside it
        _main_of("suite")(argv)
    elif argv[0] not in COMMANDS:
        hint = near(argv[0], COMMANDS)
        raise UserError(f"im3d evaluate has no {argv[0]!r}; it has {', '.join(COMMANDS)}{hint}")
    else:
        _main_of(argv[0])(argv[1:])


def _main_of(command: str) -> Callable[[list[str]], None]:
    return importlib.import_module(f"{__name__}.{command}").main
