"""`im3d embed`: encodes prompts once, onto disk, so that training runs without the text encoders.

    im3d embed --config=configs/paper_512.py --prompts captions.txt --out data/captions

--prompts is a file as `im3d batch` reads it: .txt, .json or .jsonl.

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
from im3d_jax.jobs import prompt_files
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of prompts; entries that are an image alone have none.

    Raises UserError for a file that `prompt_files.read` refuses or that has no prompt.
    """
    prompts = [entry.prompt.strip() for entry in prompt_files.read(path, find_images=False)]
    if not any(prompts):
        raise UserError(f"{path} has no prompts, only images")
    if without := prompts.count(""):
        print(f"im3d: {without} of {len(prompts)} entries of {path} are an image alone", file=sys.stderr)
    return [prompt for prompt in prompts if prompt]


def main(argv: list[str]) -> None:
    parser = CommandParser("embed", __doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="a .txt, .json or .jsonl of prompts")
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
