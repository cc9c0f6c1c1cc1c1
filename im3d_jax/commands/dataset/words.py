"""`im3d dataset words`: the vocabulary of the captions of data sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from im3d_jax.conditions.words import split_words
from im3d_jax.data import turntables
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import whole

DESCRIPTION = """Lists the words of the captions of data sets, sorted, one on each line.

    im3d dataset words data/meshes data/procedural --out configs/words.txt --min-count 2

A model that embeds words itself (config.text.name = "words") knows the words of such a file and leaves out
others. A word of one caption alone is better left out: the model would learn it as the name of that object.
"""


def main(argv: list[str]) -> None:
    parser = CommandParser("dataset words", DESCRIPTION)
    parser.add_argument("paths", type=Path, nargs="+", metavar="DIR", help="the directories of data sets")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the text file to write")
    parser.add_argument("--split", default="train", help="the split whose captions are read (%(default)s)")
    parser.add_argument(
        "--min-count",
        type=whole(1, 1_000_000_000),
        default=2,
        help="how many captions a word must be in (%(default)s)",
    )
    flags = parser.parse_args(argv)
    kind = Kind("dataset words", (re.escape(flags.out.name),))
    outputs.check(flags.out.parent, kind)
    sources = [turntables.TurntableSource(path, flags.split, num_views=1) for path in flags.paths]
    captions = [
        example["caption"] for source in sources for example in map(source.__getitem__, range(len(source)))
    ]
    words = vocabulary(captions, flags.min_count)
    if not words:
        raise UserError(f"no word is in {flags.min_count} of {len(captions)} captions; lower --min-count")
    text = "\n".join(words) + "\n"
    outputs.put(flags.out.parent, kind, flags.out.name, lambda path: path.write_text(text))
    print(f"{flags.out}: {len(words)} words of {len(captions)} captions")


def vocabulary(captions: Iterable[str], min_count: int) -> list[str]:
    """The words that are in at least `min_count` captions, sorted."""
    counts = Counter(word for caption in captions for word in set(split_words(caption)))
    return sorted(word for word, count in counts.items() if count >= min_count)
