"""`im3d study`: asks people which of two turntables is better, and says what they answered (Fig. 5, A.2).

    im3d study new ours=out/batch mvdream=out/mvdream --out study
    im3d study serve study
    im3d study results study

    im3d study export study --video-url https://my.host/study      for Mechanical Turk
    im3d study import study Batch_123_batch_results.csv

`im3d study COMMAND --help` lists the flags of each. docs/study.md is the guide.
"""

from __future__ import annotations

import importlib

from recon_torch.errors import UserError, near

MODULES = {
    "new": "new",
    "serve": "serve",
    "export": "export",
    "import": "read_back",  # a module cannot be called import
    "results": "results",
}
"""The commands, and the module of this package that has the `main` of each."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in MODULES:
        hint = near(argv[0], MODULES)
        raise UserError(f"im3d study has no {argv[0]!r}; it has {', '.join(MODULES)}{hint}")
    else:
        importlib.import_module(f"{__name__}.{MODULES[argv[0]]}").main(argv[1:])
