"""`im3d evaluate suite`: measures a model on test objects whose ground truth is known.

    im3d evaluate suite --suite procedural --out out/evaluation
    im3d evaluate suite --suite procedural --out out/evaluation --parts views,elevation --num-objects 8
    im3d evaluate suite --suite meshes --meshes DIR --captions captions.csv --split-file split.json --out DIR

Writes table.md, results.json and contact sheets into OUT. What an earlier run with the same config and
weights has measured there is kept, so an interrupted run resumes: within the part `assets` at the next
object. Remove OUT to measure everything anew.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.evaluate import MAX_OBJECTS, Part, SuiteName
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import whole

if TYPE_CHECKING:
    from im3d_jax.evaluate.truth import Objects

EVALUATION = Kind(
    "evaluate",
    (
        r"table\.md",
        r"results\.json",
        r"(views|prompts)\.png",
        r"parts/\w+\.json",
        r"assets/\d+\.(json|png)",
    ),
    grows=True,
)
"""What the command writes into OUT."""


def main(argv: list[str]) -> None:
    flags, config = config_flags.parse(argv, make_parser(), default="configs/tiny.py")
    parts = parse_parts(flags.parts)
    check_suite(flags)
    run(config, flags, parts)


def make_parser() -> CommandParser:
    parser = CommandParser("evaluate suite", __doc__)
    add_objects(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for tables, results and sheets"
    )
    parser.add_argument("--parts", default=",".join(Part), metavar="PARTS", help="some of %(default)s")
    parser.add_argument(
        "--num-objects",
        type=whole(1, MAX_OBJECTS),
        default=24,
        metavar="N",
        help="test objects (default %(default)s)",
    )
    parser.add_argument(
        "--asset-objects",
        type=whole(1, MAX_OBJECTS),
        default=24,
        metavar="N",
        help="how many of them are made into assets (default %(default)s)",
    )
    return parser


def add_objects(parser: CommandParser) -> None:
    """Adds the flags that name test objects, see `check_suite` and `load_objects`."""
    parser.add_argument(
        "--suite",
        choices=[str(each) for each in SuiteName],
        default=str(SuiteName.PROCEDURAL),
        help="the kind of test objects (default %(default)s)",
    )
    parser.add_argument("--meshes", type=Path, metavar="DIR", help="of the suite meshes: their directory")
    parser.add_argument("--captions", type=Path, metavar="CSV", help="of the suite meshes: name,caption")
    parser.add_argument(
        "--split-file", type=Path, metavar="JSON", help="of the suite meshes: the names in train and test"
    )
    parser.add_argument(
        "--up", type=UpAxis, choices=list(UpAxis), default=UpAxis.Y, help="the meshes' axis that is up (y)"
    )


def parse_parts(text: str) -> list[Part]:
    """Parts from "views,assets" and the like, in the order of `Part`. Raises UserError for unknown ones."""
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in list(Part)]
    if unknown or not wanted:
        raise UserError(f"--parts {text!r}: the parts are {','.join(Part)}")
    return [part for part in Part if part in wanted]


def check_suite(flags: Namespace) -> None:
    """Raises UserError unless the flags of the suite meshes are there for that suite, and for it alone."""
    if flags.suite == SuiteName.MESHES:
        if not (flags.meshes and flags.split_file):
            raise UserError("--suite meshes needs --meshes and --split-file")
    elif flags.meshes or flags.captions or flags.split_file:
        raise UserError("--meshes, --captions and --split-file belong to --suite meshes")


def load_objects(config: ConfigDict, flags: Namespace) -> Objects:
    """The test objects that the flags name."""
    from im3d_jax.data.captions import read_captions
    from im3d_jax.data.placement import read_split_file
    from im3d_jax.evaluate.truth import MeshObjects, ProceduralObjects

    if flags.suite == SuiteName.PROCEDURAL:
        return ProceduralObjects(config.seed, config.size, config.num_views)
    captions = read_captions(flags.captions) if flags.captions else {}
    names = read_split_file(flags.split_file).names()
    every = [name for split in names.values() for name in split]
    without = [name for name in every if not captions.get(name)]
    if flags.captions and without:
        said = f"{len(without)} of {len(every)} objects have no caption, as {without[0]}"
        print(f"im3d: {flags.captions}: {said}", file=sys.stderr)
    return MeshObjects(flags.meshes, captions, names, flags.up, config.seed, config.size, config.num_views)


def run(config: ConfigDict, flags: Namespace, parts: list[Part]) -> None:
    """Loads the model, measures the parts and prints their tables."""
    # Imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.
    from im3d_jax import pipeline
    from im3d_jax.evaluate.suite import Suite, evaluate

    with outputs.opened(flags.out, EVALUATION) as out, pipeline.load(config) as loaded:
        objects = load_objects(config, flags)
        suite = Suite(loaded, objects, config.seed, out, flags.num_objects, flags.asset_objects)
        print(evaluate(suite, parts))
