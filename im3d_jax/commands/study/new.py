"""`im3d study new`: pairs of turntable videos of two or more methods, and two questions on each."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from im3d_jax.evaluate.outputs import layouts, names
from im3d_jax.stages import progress
from im3d_jax.study import ANNOTATORS, FILES, NEW, STUDY, annotators, drawing, plan, sources
from im3d_jax.study.plan import Study
from im3d_jax.study.sources import Source
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import Flag, Seed, real, whole

DESCRIPTION = """Makes a study of the turntables of two or more methods.

    im3d study new ours=out/batch mvdream=out/mvdream zero123=renders/zero123 --out study

DIR is what `im3d batch` or `im3d generate` wrote, a folder of such, a folder with NAME.mp4 for each prompt,
or any outputs that `im3d evaluate` reads but files in 3D; docs/evaluate.md says which, and that a YAML file
or PRESET:NAME=DIR may stand for them. Pictures are shown as a turn of 4 seconds. Videos belong together whose
prompts are equal but for case and punctuation; what a method lacks is named. The first method is compared
with each of the others by two questions: which video fits the picture (or, where there is none, the prompt)
better, and which shows the better 3D object.

STUDY gets study.json, files/ with the videos under names that do not tell the method, and annotators.csv with
a secret token for each annotator."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    if (flags.out / STUDY).exists():  # there may be answers to it
        raise UserError(f"{flags.out} has a study already; choose another --out")
    found = [sources.read(layouts.named(text)) for text in flags.methods]
    with outputs.opened(flags.out, NEW, _videos(found)), outputs.owned(flags.out) as staging:
        (staging / FILES).mkdir()
        study = _draw(found, flags, staging / FILES)
        plan.write(study, staging / STUDY)
        annotators.write(staging / ANNOTATORS, flags.annotators)
        outputs.replace(staging, flags.out, NEW, STUDY)
    print(_told(flags.out, study))


def _videos(found: Sequence[Source]) -> list[Path]:
    return [path for source in found for each in source.turntables.values() for path in each.paths]


def _draw(found: Sequence[Source], flags: Namespace, folder: Path) -> Study:
    pictures = names.references(flags.pictures) if flags.pictures else {}
    settings = drawing.Settings(
        seed=flags.seed,
        answers_per_item=flags.answers,
        num_annotators=flags.annotators,
        check_share=flags.checks,
        all_pairs=flags.all_pairs,
        skip_unreadable=flags.skip_unreadable,
    )
    study = drawing.draw(found, pictures, settings, folder, progress)
    return replace(study, versions={"im3d": _version(), "python": platform.python_version()})


def _version() -> str:
    try:
        return version("im3d")
    except PackageNotFoundError:  # a source tree that is only on the path
        return "not installed"


def _told(out: Path, study: Study) -> str:
    """What the study is, what is left out of it, and what comes next."""
    pictures = sum(bool(prompt.picture) for prompt in study.prompts.values())
    num_answers = len(study.items) * study.answers_per_item
    pairs = " and ".join(" against ".join(pair) for pair in study.pairs)
    lines = [
        *study.left_out,
        f"{out}: {pairs}, on {len(study.prompts)} prompts ({pictures} with a picture):"
        f" {len(study.items)} items for {study.answers_per_item} annotators each are {num_answers} answers;"
        f" {len(study.checks)} check{'s' * (len(study.checks) != 1)}",
        f"{out / ANNOTATORS} has the tokens of {study.num_annotators} annotators,"
        f" for {study.items_each} items each",
        f"next: im3d study serve {out}, or for Mechanical Turk im3d study export {out} --video-url URL",
    ]
    return "\n".join(lines)


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("study new", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("methods", nargs="+", metavar="NAME=DIR", help="a method, and its outputs")
    add("--out", type=Path, required=True, metavar="STUDY", help="directory for the study")
    add("--pictures", type=Path, metavar="DIR",
        help="NAME.png for prompts, to compare with; by default what the assets of im3d were made from")
    add("--annotators", type=whole(1, 100_000), default=10, metavar="N", help="tokens to make" + default)
    add("--answers", type=whole(1, 1000), default=5, metavar="N", help="annotators per item" + default)
    add("--checks", type=real(0, 0.5), default=0.1, metavar="SHARE", help="of attention checks" + default)
    add("--seed", type=Flag(Seed), default=0, help="of order, sides and checks" + default)
    add("--all-pairs", action="store_true", help="compare every two methods, not the first with each other")
    add("--skip-unreadable", action="store_true", help="leave out videos that cannot be read, and name them")
    # fmt: on
    return parser.parse_args(argv)
