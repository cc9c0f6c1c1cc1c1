"""`im3d dataset show`: what a data set holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from im3d_jax.commands.dataset.progress import in_words
from im3d_jax.data import CorruptRecord, turntables
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import replacing
from recon_torch.ranges import whole
from recon_torch.views.images import contact_sheet

SOFTWARE = "im3d dataset show"
BACKGROUND = 0.75  # the grey behind a contact sheet's objects, on which a wrong alpha shows

DESCRIPTION = """Prints what a data set holds, and draws some of its objects over grey, one in each row.

    im3d dataset show data/turntables --out sheet.png --split validation --objects 12
"""


def main(argv: list[str]) -> None:
    parser = CommandParser("dataset show", DESCRIPTION)
    parser.add_argument("path", type=Path, help="the data set's directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--split", default="train", help="the split whose objects are drawn (%(default)s)")
    parser.add_argument(
        "--objects",
        type=whole(1, 10_000),
        default=8,
        help="how many objects are drawn (%(default)s)",
    )
    flags = parser.parse_args(argv)
    outputs.check_file(flags.out, "dataset show", _is_ours)
    source = turntables.TurntableSource(flags.path, flags.split)
    num_bytes = sum(file.stat().st_size for file in flags.path.iterdir())
    counts = in_words(turntables.read_splits(flags.path))
    print(f"{flags.path}: {counts}; {num_bytes / 1e6:.1f} MB; {source.num_views} views of {source.size} px")
    if sources := source.metadata.get("sources"):
        meshes = f"{sources['num_meshes']} with the digest of their mesh"
        print(f"  made of sources {sources['sha256']}: {sources['num_objects']} objects, {meshes}")
    for what in ("split_file", "selection"):
        if file := source.metadata.get(what):
            print(f"  {what.replace('_', ' ')} {file['name']}, SHA-256 {file['sha256']}")
    rows, labels = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, flags.objects).astype(int)):
        try:
            example = source[int(index)]
        except CorruptRecord as error:
            print(f"im3d: corrupt {error}", file=sys.stderr)
            continue
        arrays = {key: value.shape for key, value in example.items() if isinstance(value, np.ndarray)}
        elevation_deg = np.rad2deg(example["elevation_rad"])
        print(f"  {example['id']}: {example['caption']!r}, {elevation_deg:.1f} deg, {arrays}")
        if "rgb" in example:
            rows.append(example["rgb"] - (1 - BACKGROUND) * (1 - example["alpha"]))
            labels.append(example["id"].split("/")[-1][:24])
    if not rows:
        raise UserError(f"{flags.path} has no pictures to draw in {flags.split}: its records hold latents")
    signed = PngInfo()
    signed.add_text("Software", SOFTWARE)
    with replacing(flags.out) as temporary:
        Image.fromarray(contact_sheet(rows, labels)).save(temporary, pnginfo=signed)


def _is_ours(path: Path) -> bool:
    """Whether a picture is a sheet of an earlier call; only a .png can say so."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False
