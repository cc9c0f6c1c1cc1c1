"""`im3d dataset caption`: captions of rendered objects by an image captioning network."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from im3d_jax.commands.dataset.progress import Skipped, parse_part, progress
from im3d_jax.data import captioning, views
from im3d_jax.data.captioning import Captioner, Combine
from recon_torch import locks
from recon_torch.errors import CommandParser
from recon_torch.files import TEMPORARY
from recon_torch.hosting import Dtype
from recon_torch.ranges import BatchSize, Count, Flag, NumViews, whole
from recon_torch.views.images import to_uint8

DESCRIPTION = """Writes captions of rendered objects by an image captioning network.

    im3d dataset caption --views data/views --model models/blip-image-captioning-base
    im3d dataset caption --views data/views --model models/blip2-opt-2.7b --dtype bfloat16 --part 3/8

The network is read from a local directory in the layout of transformers, with safetensors: a BLIP, BLIP-2 or
GIT, or any other model that AutoModelForImageTextToText loads (pip install "im3d[hosted]"). It sees views on
white. The caption goes into the object's metadata.json, which `im3d dataset build` reads, with a note of the
network's name and digest.

An object that has a caption keeps it, so an interrupted command is simply started again. --replace writes new
captions for all objects; a caption that no network made is kept beside the new one as "caption_before".
"""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    directories = views.find_objects(flags.views)
    number, num_parts = flags.part
    directories = directories[number::num_parts]
    with locks.hold_part(flags.views, *flags.part):
        _caption(directories, flags)


def _caption(directories: list[Path], flags: Namespace) -> None:
    captioner = Captioner(
        flags.model,
        prompt=flags.prompt,
        num_beams=flags.num_beams,
        max_tokens=flags.max_tokens,
        dtype=flags.dtype,
    )
    origin = _origin(flags, captioner)
    skipped = Skipped(flags.max_skipped)
    missing, kept = [], 0
    for directory in directories:
        if wanted := _wants_caption(directory, origin, flags, skipped):
            missing.append(directory)
        kept += wanted is False
    empty = made = 0
    pictures = _pictures(missing, flags, skipped)
    for directory in missing:
        locks.clear(directory, TEMPORARY)
    for directory, caption in progress(_captions(pictures, captioner, flags), len(directories), kept):
        if not caption.text:
            empty += 1
            print(f"im3d: {_name(directory, flags)}: the network says nothing of it", file=sys.stderr)
            continue
        try:
            views.write_caption(directory, caption.text, origin | {"log_likelihood": round(caption.score, 4)})
        except views.Unfit as error:
            skipped.add(f"{_name(directory, flags)}: {error}")
            continue
        made += 1
    said = f"{flags.views}: {made} objects got a caption, {kept} had one"
    said += f", {empty} got an empty one, which was not written" if empty else ""
    print(said + (f", {len(skipped.messages)} skipped" if skipped.messages else ""))


def _origin(flags: Namespace, captioner: Captioner) -> dict[str, Any]:
    """Where the captions come from, as the objects' metadata says it."""
    made = {name: getattr(flags, name) for name in ("views_per_object", "prompt", "num_beams", "max_tokens")}
    how = {"combine": str(flags.combine), "dtype": str(flags.dtype)}
    return {"model": captioner.path.resolve().name, "model_sha256": captioner.digest, **made, **how}


def _wants_caption(
    directory: Path, origin: dict[str, Any], flags: Namespace, skipped: Skipped
) -> bool | None:
    """Whether an object is to get a caption; None if its metadata cannot be read."""
    try:
        metadata = views.read_metadata(directory)
    except views.Unfit as error:
        skipped.add(f"{_name(directory, flags)}: {error}")
        return None
    if not flags.replace:
        return not metadata.get("caption")
    before = metadata.get("caption_origin")
    if not isinstance(before, dict):
        return True
    # A run with --replace that was interrupted does not do again what it did.
    return {key: value for key, value in before.items() if key != "log_likelihood"} != origin


def _pictures(
    directories: list[Path], flags: Namespace, skipped: Skipped
) -> Iterator[tuple[Path, list[UInt8[np.ndarray, "H W 3"]]]]:
    """The views of each object that the network reads."""
    for directory in directories:
        try:
            pictures = to_uint8(views.read_pictures(directory, flags.views_per_object))
        except views.Unfit as error:
            skipped.add(f"{_name(directory, flags)}: {error}")
            continue
        yield directory, list(pictures)


def _captions(
    objects: Iterator[tuple[Path, list[UInt8[np.ndarray, "H W 3"]]]], captioner: Captioner, flags: Namespace
) -> Iterator[tuple[Path, captioning.Caption]]:
    """The caption of each object, as soon as the batch with its last view is done."""
    together = max(1, flags.batch_size // flags.views_per_object)
    while chunk := list(itertools.islice(objects, together)):
        pictures = [picture for _, each in chunk for picture in each]
        batches = (pictures[at : at + flags.batch_size] for at in range(0, len(pictures), flags.batch_size))
        made = iter([caption for batch in batches for caption in captioner.caption(batch)])
        for directory, each in chunk:
            yield directory, captioning.combine(list(itertools.islice(made, len(each))), flags.combine)


def _name(directory: Path, flags: Namespace) -> str:
    return directory.relative_to(flags.views).as_posix()


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset caption", DESCRIPTION)
    # fmt: off
    add = parser.add_argument
    add("--views", type=Path, required=True, metavar="DIR", help="holds a directory of views for each object")
    add("--model", type=Path, required=True, metavar="DIR", help="the directory of the network")
    add("--views-per-object", type=Flag(NumViews), default=4, metavar="N",
        help="how many views of each object the network reads, evenly spaced (4)")
    add("--combine", type=Combine, choices=list(Combine), default=Combine.BEST,
        help="take the likeliest of the views' captions, or join all different ones (best)")
    add("--replace", action="store_true", help="write new captions for objects that have one")
    add("--prompt", default="", metavar="TEXT",
        help="words that the captions continue, which are not kept; for a model that chats, what it is asked")
    add("--num-beams", type=whole(1, 64), default=1, help="of the beam search (1)")
    add("--max-tokens", type=whole(1, 4096), default=40, help="the longest caption in tokens (40)")
    add("--batch-size", type=Flag(BatchSize), default=16, metavar="N", help="pictures read at once (16)")
    add("--dtype", type=Dtype, choices=list(Dtype), default=Dtype.FLOAT32,
        help="what the network computes in (float32)")
    add("--part", type=parse_part, default=(0, 1), metavar="I/N",
        help="caption only part I, from 0, of N parts, so that N jobs share the objects")
    add("--max-skipped", type=Flag(Count), default=10,
        help="how many objects may be unfit before it stops (10)")
    # fmt: on
    return parser.parse_args(argv)
