"""`im3d study import`: reads the results of Mechanical Turk into the answers of a study."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from im3d_jax.study import ANSWERS, plan
from im3d_jax.study.extra import needed
from recon_torch.errors import CommandParser

DESCRIPTION = """Reads the results of a batch on Mechanical Turk, as its page downloads them.

    im3d study import study Batch_123_batch_results.csv

The answers join those that are there, whichever way these came; what was read before changes nothing.
Rejected assignments are left out and counted. Either all of a file is kept or nothing."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    study = plan.read(flags.study)
    needed("sqlalchemy")
    from im3d_jax.study import mturk, store

    results = mturk.read_results(flags.results, study)
    answers = store.Store(study, flags.database or store.default_url(flags.study, ANSWERS))
    new, differing = answers.record_all(results.answers)
    answers.close()
    told = [f"{new} answers are new", f"{len(results.answers) - new} were there"]
    if differing:
        told.append(f"of which {differing} differ from the first ones of these workers, which stand")
    told += [f"{results.num_rejected} assignments were rejected"] * bool(results.num_rejected)
    told += [f"{results.num_blank} questions have no answer"] * bool(results.num_blank)
    print(f"{flags.results}: {', '.join(told)}")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("study import", DESCRIPTION)
    add = parser.add_argument
    # fmt: off
    add("study", type=Path, metavar="STUDY", help="a directory that `im3d study new` made")
    add("results", type=Path, metavar="CSV", help="the results of a batch")
    add("--database", metavar="URL", help="of SQLite or PostgreSQL; by default the file STUDY/answers.sqlite")
    # fmt: on
    return parser.parse_args(argv)
