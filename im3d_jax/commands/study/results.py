"""`im3d study results`: win rates with intervals, consensus, agreement, and the figure."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from im3d_jax.study import ANSWERS, RESULTS, plan
from im3d_jax.study.extra import needed
from recon_torch import outputs
from recon_torch.errors import CommandParser
from recon_torch.files import write_json
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, Seed, Share, whole

DESCRIPTION = """Says what annotators have answered, also while a study is served.

    im3d study results study

Writes results.json (all numbers), and figure.png and figure.pdf (as Fig. 5 of the paper). A win rate is the
mean over prompts of the share of answers for the first method; its interval is a bootstrap over prompts.
Annotators who get too few of their attention checks right are left out and named."""
FOUND = Kind("study results", (r"results\.json", r"figure\.(png|pdf)"))
"""What the command writes."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    study = plan.read(flags.study)
    for package in ("sqlalchemy", "krippendorff", "matplotlib"):
        needed(package)
    from im3d_jax.study import figure, results, store

    answers = store.Store(study, flags.database or store.default_url(flags.study, ANSWERS), create=False)
    rules = results.Rules(flags.min_passed, flags.resamples, flags.seed)
    found = results.compute(study, answers.answers(), rules)
    answers.close()
    out = flags.out or flags.study / RESULTS
    with outputs.opened(out, FOUND), outputs.owned(out) as staging:
        write_json(staging / "results.json", found)
        figure.write(found["comparisons"], [staging / "figure.png", staging / "figure.pdf"])
        outputs.replace(staging, out, FOUND, "results.json")
    print(results.screen(found))
    print(f"see {out / 'results.json'} and figure.png, figure.pdf")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("study results", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("study", type=Path, metavar="STUDY", help="a directory that `im3d study new` made")
    add("--database", metavar="URL", help="of SQLite or PostgreSQL; by default the file STUDY/answers.sqlite")
    add("--out", type=Path, metavar="DIR", help="directory for the results (default STUDY/results)")
    add("--min-passed", type=Flag(Share), default=0.8, metavar="SHARE",
        help="leave out annotators with less of their checks right" + default)
    add("--resamples", type=whole(100, 1_000_000), default=10_000, metavar="N",
        help="of the bootstrap over prompts" + default)
    add("--seed", type=Flag(Seed), default=0, help="of the bootstrap" + default)
    # fmt: on
    return parser.parse_args(argv)
