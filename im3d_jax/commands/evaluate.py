"""`im3d evaluate`: measures a model on test objects whose ground truth is known.

    im3d evaluate --suite tiny --out out/evaluation
    im3d evaluate --suite tiny --out out/evaluation --parts views,elevation --num-objects 8

Writes table.md, results.json and contact sheets into OUT. What an earlier run with the same config and
weights has measured there is kept, so an interrupted run resumes: within the part `assets` at the next
object. Remove OUT to measure everything anew.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.evaluate import MAX_OBJECTS, Part, SuiteName
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory


def main(argv: list[str]) -> None:
    flags, config = config_flags.parse(argv, make_parser(), default="configs/tiny.py")
    parts = parse_parts(flags.parts)
    for name in ("num_objects", "asset_objects"):
        if not 1 <= getattr(flags, name) <= MAX_OBJECTS:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(flags, name)}, must be from 1 to {MAX_OBJECTS}")
    run(config, flags, parts)


def make_parser() -> CommandParser:
    parser = CommandParser("evaluate", __doc__)
    parser.add_argument(
        "--suite",
        choices=[str(each) for each in SuiteName],
        default=str(SuiteName.TINY),
        help="set of test objects (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for tables, results and sheets"
    )
    parser.add_argument("--parts", default=",".join(Part), metavar="PARTS", help="some of %(default)s")
    parser.add_argument(
        "--num-objects", type=int, default=24, metavar="N", help="test objects (default %(default)s)"
    )
    parser.add_argument(
        "--asset-objects",
        type=int,
        default=24,
        metavar="N",
        help="how many of them are made into assets (default %(default)s)",
    )
    return parser


def parse_parts(text: str) -> list[Part]:
    """Parts from "views,assets" and the like, in the order of `Part`. Raises UserError for unknown ones."""
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in list(Part)]
    if unknown or not wanted:
        raise UserError(f"--parts {text!r}: the parts are {','.join(Part)}")
    return [part for part in Part if part in wanted]


def run(config: ConfigDict, flags: Namespace, parts: list[Part]) -> None:
    """Loads the model, measures the parts and prints their tables."""
    # Imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.
    from im3d_jax import pipeline
    from im3d_jax.evaluate.suite import Suite, evaluate

    out = make_directory(flags.out)
    with pipeline.load(config) as loaded:
        suite = Suite(loaded, config.seed, out, flags.num_objects, flags.asset_objects)
        print(evaluate(suite, parts))
