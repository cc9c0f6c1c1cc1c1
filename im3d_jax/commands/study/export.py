"""`im3d study export`: the files of a project on Mechanical Turk."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from urllib.parse import urlsplit

from im3d_jax.study import FILES, plan
from im3d_jax.study.extra import needed
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import whole

DESCRIPTION = """Writes what Mechanical Turk asks for: an input file and a layout.

    im3d study export study --video-url https://my.host/study

Put STUDY/files where --video-url says, for everybody to read. In a new project, paste layout.html as its
design and publish a batch with input.csv; the number of assignments per HIT is that of the annotators per
item. `im3d study import` reads the results. Prompts stand in input.csv, methods do not."""
MTURK = Kind("study export", (r"input\.csv", r"layout\.html"))
"""What the command writes."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    url = urlsplit(flags.video_url)
    if url.scheme != "https" or not url.netloc or not flags.video_url.isascii() or " " in flags.video_url:
        raise UserError(f"--video-url {flags.video_url!r} is no https:// address; give one, as browsers ask")
    study = plan.read(flags.study)
    needed("sqlalchemy")
    from im3d_jax.study import mturk

    out = flags.out or flags.study / "mturk"
    texts = {
        "input.csv": mturk.input_csv(study, flags.per_hit, flags.video_url),
        "layout.html": mturk.template(study, flags.per_hit),
    }
    with outputs.opened(out, MTURK), outputs.owned(out) as staging:
        for name, text in texts.items():
            (staging / name).write_bytes(text.encode())
        outputs.replace(staging, out, MTURK)
    hits = mturk.hits(study, flags.per_hit)
    most = max(map(len, hits))
    print(
        f"{out}: input.csv with {len(hits)} HITs of up to {most} questions, and layout.html; publish"
        f" {study.answers_per_item} assignments per HIT; {flags.study / FILES} belongs at {flags.video_url}"
    )


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("study export", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("study", type=Path, metavar="STUDY", help="a directory that `im3d study new` made")
    add("--video-url", required=True, metavar="URL", help="the https:// address of STUDY/files")
    add("--out", type=Path, metavar="DIR", help="directory for the files (default STUDY/mturk)")
    add("--per-hit", type=whole(1, 100), default=10, metavar="N", help="items per HIT" + default)
    # fmt: on
    return parser.parse_args(argv)
