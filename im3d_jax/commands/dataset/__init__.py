"""`im3d dataset`: data sets of turntables to train on, from objects to the records that training reads.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --size 512
    im3d dataset caption --views data/views --model models/blip
    im3d dataset select --views data/views --model models/clip --keep 0.5 --out selected
    im3d dataset build --views data/views --out data/turntables --selection selected/selection.json
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py
    im3d dataset show data/turntables --out sheet.png
    im3d dataset words data/turntables --out words.txt

`im3d dataset COMMAND --help` lists the flags of each. docs/data.md describes the directories.
"""

from __future__ import annotations

import importlib

from recon_torch.errors import UserError

COMMANDS = ("render", "caption", "select", "build", "show", "words")
"""Each is a module of this package, with a `main`."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in COMMANDS:
        raise UserError(f"im3d dataset has no {argv[0]!r}; it has {', '.join(COMMANDS)}")
    else:
        importlib.import_module(f"{__name__}.{argv[0]}").main(argv[1:])
