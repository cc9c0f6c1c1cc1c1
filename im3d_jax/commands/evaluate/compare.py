"""`im3d evaluate compare`: paired differences of two result files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from im3d_jax.commands.evaluate import files
from im3d_jax.evaluate import comparison, result_file
from im3d_jax.evaluate.result_file import NAME, Bootstrap
from recon_torch import outputs
from recon_torch.errors import CommandParser
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, Seed, whole

DESCRIPTION = """Compares two results.json of any command of `im3d evaluate`, row by row.

    im3d evaluate compare out/mine out/theirs
    im3d evaluate compare out/mine out/table1 --method-b "mvdream, renders" --out out/compared

Both must be of the same command and measured alike: the same test objects, the same CLIP or other judge, as
many views; and they must have the same rows. What differs is named. Methods of one name are compared with
each other, or the only ones of each file, or those that --method-a and --method-b name."""

FOUND = Kind("evaluate compare", (r"results\.json", r"table\.md"))
"""What the command writes, with --out."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    a, b = result_file.read(flags.a), result_file.read(flags.b)
    comparison.check_alike(a, b, flags.a, flags.b)
    pairs = comparison.paired(a, b, flags.method_a, flags.method_b)
    found = comparison.compare(a, b, pairs, Bootstrap(flags.resamples, flags.seed), flags.common)
    text = comparison.table(found)
    if flags.out:
        _write(found, text, flags)
    print(text)


def _write(found: dict[str, Any], text: str, flags: Namespace) -> None:
    inputs = [path / NAME if path.is_dir() else path for path in (flags.a, flags.b)]
    with outputs.opened(flags.out, FOUND, inputs):
        files.write(flags.out, FOUND, found, text)


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("evaluate compare", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("a", type=Path, metavar="A", help="a results.json, or its directory")
    add("b", type=Path, metavar="B", help="another one; differences are A minus B")
    add("--method-a", metavar="NAME", default="", help="which method of A, as its table calls it")
    add("--method-b", metavar="NAME", default="", help="which method of B")
    add("--common", action="store_true", help="compare the rows that both have, and say how many they lack")
    add("--out", type=Path, metavar="DIR", help="directory for results.json and table.md of the differences")
    add("--resamples", type=whole(100, 1_000_000), default=10_000, metavar="N",
        help="of the bootstrap over rows" + default)
    add("--seed", type=Flag(Seed), default=0, help="of the bootstrap" + default)
    # fmt: on
    return parser.parse_args(argv)
