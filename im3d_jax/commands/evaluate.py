"""`im3d evaluate`."""

from __future__ import annotations

from pathlib import Path

from im3d_jax import config_flags
from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.suite import PARTS, SUITES, Suite, evaluate
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory


def parse_parts(text: str) -> list[str]:
    """Parts from "views,assets" and the like, in the order of `PARTS`. Raises UserError for others."""
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise UserError(f"--parts {text!r}: the parts are {','.join(PARTS)}")
    return [part for part in PARTS if part in wanted]


def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", __doc__)
    parser.add_argument(
        "--suite", choices=SUITES, default="tiny", help="what to measure (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for tables, results and sheets")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--num-objects", type=int, default=24, help="test objects (default %(default)s)")
    parser.add_argument(
        "--asset-objects",
        type=int,
        default=24,
        help="of these, how many are made into assets (default %(default)s)",
    )
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    parts = parse_parts(flags.parts)
    for name in ("num_objects", "asset_objects"):
        if not 1 <= getattr(flags, name) <= truths.MAX_OBJECTS:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {getattr(flags, name)}, must be from 1 to {truths.MAX_OBJECTS}")
    suite = Suite(config, flags.num_objects, flags.asset_objects, make_directory(flags.out))
    print(evaluate(suite, parts))
