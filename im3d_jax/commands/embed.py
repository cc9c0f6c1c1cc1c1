"""`im3d embed`: encodes prompts once, onto disk, so that training runs without the text encoders.

    im3d embed --config=configs/paper_512.py --prompts captions.txt --out data/captions

Emu Video trains against frozen CLIP and T5 encoders (Girdhar et al. 2023), and the same captions come again
in every epoch. The directory OUT gets files of embeddings and an index.json, and a config reads them with
`config.text = dict(name="precomputed", kwargs=dict(path=OUT))`. A command that was interrupted goes on where
it stopped when it is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from im3d_jax import config_flags, config_sections
from im3d_jax.conditions.encoders import PretrainedText
from im3d_jax.conditions.precomputed import EMBEDDINGS, StoredDtype, write
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises UserError for a file that cannot be read or has no such line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read prompts from {path} ({error}); give a text file, one on a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompts; write one on each line")
    return prompts


def main(argv: list[str]) -> None:
    parser = CommandParser("embed", __doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="text file with a prompt on each line")
    parser.add_argument("--out", type=Path, required=True, help="directory for the embeddings")
    parser.add_argument(
        "--dtype",
        choices=[*StoredDtype],
        default=StoredDtype.FLOAT32,
        help="type of the numbers in the files (default %(default)s)",
    )
    flags, config = config_flags.parse(argv, parser)
    config_sections.named(config, "text")
    if config.text.name != "pretrained":
        raise UserError(f"config.text.name is {config.text.name!r}; im3d embed needs 'pretrained'")
    prompts = read_prompts(flags.prompts)
    outputs.check(flags.out, EMBEDDINGS, [flags.prompts])
    text = PretrainedText(config.text.kwargs["encoders"])
    for warning in dict.fromkeys(each for prompt in prompts for each in text.warnings(prompt)):
        print(f"im3d: warning: {warning}", file=sys.stderr)
    with outputs.opened(flags.out, EMBEDDINGS):
        encoded = write(text.encoders, prompts, flags.out, StoredDtype(flags.dtype))
    print(f"{flags.out}: {len(set(prompts)) + 1} prompts, {encoded} of them encoded now")
