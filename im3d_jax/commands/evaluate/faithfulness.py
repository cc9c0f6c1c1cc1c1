"""`im3d evaluate faithfulness`: CLIP scores of synthesised views and of renders (Table 1)."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im3d_jax.commands.evaluate import files, method_flags
from im3d_jax.evaluate.outputs import finding, names
from im3d_jax.evaluate.outputs.finding import MethodOutputs
from im3d_jax.evaluate.result_file import NAME
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import BatchSize, Flag, NumViews, Seed, whole

if TYPE_CHECKING:
    from im3d_jax.data.clip import Clip

DESCRIPTION = """Scores the outputs of one or more methods by a CLIP, as Table 1 of the paper.

    im3d evaluate faithfulness --method ours=out/batch --clip models/clip-vit-large-patch14 --out out/table1
    im3d evaluate faithfulness --method ours=out/batch --method mvdream.yaml --method syncdreamer:x=out/x
        --prompts prompts.jsonl --clip DIR --out out/table1

%s

A text score is 100 times the cosine of the embeddings of view and prompt, an image score that of view and
picture, in the mean over the views of a row. --out gets results.json and table.md."""

FOUND = Kind("evaluate faithfulness", (r"results\.json", r"table\.md"))
"""What the command writes."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    with outputs.opened(flags.out, FOUND):
        asked = finding.read_prompts(flags.prompts) if flags.prompts else ()
        methods = method_flags.find(flags.methods, asked)
        pictures = names.references(flags.pictures) if flags.pictures else {}
        # Imported now, because torch and transformers take seconds, which mistakes need not wait for.
        from im3d_jax.data.clip import Clip

        found = _measure(methods, Clip(flags.clip, "--clip"), pictures, flags)
        _write(found, flags.out)


def _measure(
    methods: Sequence[MethodOutputs], clip: Clip, pictures: dict[str, Path], flags: Namespace
) -> dict[str, Any]:
    """The content of results.json."""
    from im3d_jax.evaluate import faithfulness, published, result_file
    from im3d_jax.evaluate.outputs import reading
    from im3d_jax.evaluate.result_file import Bootstrap

    counts = {each.label: reading.expected_views(each, flags.num_views or 0) for each in methods}
    scorer = faithfulness.Scorer(clip, pictures, flags.batch_size)
    rows = list(faithfulness.measure(methods, scorer, flags.num_views or 0))
    left_out = [line for each in methods for line in each.left_out()]
    for line in (*left_out, *scorer.about()):
        print(f"im3d: {line}", file=sys.stderr)
    if not any(score is not None for row in rows for score in row.scores.values()):
        why = (left_out or scorer.about() or ["no row"])[0]
        raise UserError(f"nothing is left to score ({why}); give outputs with prompts or pictures")
    protocol = faithfulness.protocol(clip, flags.num_views or 0)
    found = result_file.content(
        "faithfulness",
        protocol,
        rows,
        methods=[{**each.about(), "num_views": counts[each.label]} for each in methods],
        config_digest=result_file.digest(protocol),
        weights_digest=clip.digest,
        bootstrap=Bootstrap(flags.resamples, flags.seed),
        about=[*left_out, *scorer.about(), clip.in_words()],
    )
    found["about"] = [*faithfulness.other_pictures(found), *found["about"]]
    return {**found, "published": published.as_json("Table 1", "Table 4")}


def _write(found: dict[str, Any], out: Path) -> None:
    from im3d_jax.evaluate import faithfulness

    text = faithfulness.table(found)
    files.write(out, FOUND, found, text)
    print(text)
    print(f"see {out / NAME} and table.md")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("evaluate faithfulness", DESCRIPTION % method_flags.HELP)
    add, default = parser.add_argument, " (default %(default)s)"
    method_flags.add(parser)
    # fmt: off
    add("--clip", type=Path, required=True, metavar="DIR",
        help="a CLIP in transformers' or open_clip's layout; nothing is fetched")
    add("--out", type=Path, required=True, metavar="DIR", help="directory for results.json and table.md")
    add("--prompts", type=Path, metavar="FILE",
        help="what was asked for, .txt, .json or .jsonl as `im3d batch` reads it; what lacks is named")
    add("--pictures", type=Path, metavar="DIR",
        help="NAME.png for prompts, to compare views with; by default what rows were made from")
    add("--num-views", type=Flag(NumViews), metavar="K",
        help="views of each row, evenly spaced, so that methods with different numbers can be compared"
        " (default all)")
    add("--batch-size", type=Flag(BatchSize), default=64, metavar="N",
        help="pictures that the CLIP sees at once" + default)
    add("--resamples", type=whole(100, 1_000_000), default=10_000, metavar="N",
        help="of the bootstrap over rows" + default)
    add("--seed", type=Flag(Seed), default=0, help="of the bootstrap" + default)
    # fmt: on
    flags = parser.parse_args(argv)
    flags.methods = method_flags.sources(flags.methods)
    return flags
