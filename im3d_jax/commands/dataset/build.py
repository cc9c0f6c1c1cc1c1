"""`im3d dataset build`: from directories of views to a data set."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from im3d_jax import autoencoders, backbones, config_flags, config_sections
from im3d_jax.clips import Clip, num_latents
from im3d_jax.commands.dataset.progress import Skipped, in_words, progress
from im3d_jax.conditions.text import build_text
from im3d_jax.data import building, placement, turntables, views
from im3d_jax.data.encoding import Encoders
from im3d_jax.generator import clip_settings
from recon_torch import locks
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import TEMPORARY, make_directory
from recon_torch.ranges import Count, Flag

SAID = 20  # so many names a line lists

DESCRIPTION = """Builds a data set from directories of views, which it checks, and encodes where asked.

    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --split train=0.9,test=0.1
    im3d dataset build --views data/views --out data/turntables --split-file split.json
    im3d dataset build --views data/views --out data/turntables --selection selected/selection.json
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py

A hash of an object's name decides its split, so an object stays in its split when others are added. A split
file is a JSON object of lists of names, {"train": ["a/mug", ...], "test": [...]}. An object that is in no
list is left out, and a name without an object is ignored; both are counted and named. A name that is there
twice is an error. A variant NAME~1 of an object (`im3d dataset render --augment`) goes where NAME goes.
"""


def main(argv: list[str]) -> None:
    parser = CommandParser("dataset build", DESCRIPTION)
    parser.add_argument(
        "--views", type=Path, required=True, metavar="DIR", help="holds a directory of views for each object"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the data set to make, not there yet"
    )
    splitting = parser.add_mutually_exclusive_group()
    splitting.add_argument(
        "--split",
        type=parse_shares,
        default="train=0.98,validation=0.01,test=0.01",
        metavar="NAME=SHARE,...",
        help="the splits' shares of the objects (%(default)s)",
    )
    splitting.add_argument(
        "--split-file", type=Path, metavar="JSON", help="the splits as lists of the names of objects"
    )
    parser.add_argument(
        "--selection",
        type=Path,
        metavar="JSON",
        help="take only the objects that `im3d dataset select` has kept",
    )
    parser.add_argument(
        "--embed", action="store_true", help="store what the config's text and image encoders make"
    )
    parser.add_argument(
        "--latents", action="store_true", help="store the latents of the config's autoencoder, not pictures"
    )
    parser.add_argument(
        "--max-skipped",
        type=Flag(Count),
        default=10,
        help="how many objects may be unfit before it stops (10)",
    )
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    turntables.refuse_taken(flags.out)
    parent = make_directory(flags.out.parent)
    with locks.hold(parent, f".{flags.out.name}{locks.LOCK}"):  # the directory itself comes with all files
        locks.clear(parent, TEMPORARY)
        _build(config, flags)


def _build(config: ConfigDict, flags: Namespace) -> None:
    encoders, metadata = load_encoders(config, flags.embed, flags.latents)
    directories = views.find_objects(flags.views)
    place, splits, chosen = choose(flags, [_name(each, flags.views) for each in directories])
    directories = [each for each in directories if _name(each, flags.views) in chosen]
    for flag in ("split_file", "selection"):
        if path := getattr(flags, flag):
            metadata[flag] = {"name": path.name, "sha256": placement.file_digest(path)}
    skipped = Skipped(flags.max_skipped)
    read = progress(building.read_objects(flags.views, directories), len(directories))
    records = encoders.encode_all(building.keep_alike(read, skipped.add))
    placed = ((str(place(record.id)), record) for record in records)
    counts = turntables.write(flags.out, placed, splits, metadata)
    skipped_too = f"; {len(skipped.messages)} skipped" if skipped.messages else ""
    print(f"{flags.out}: {in_words(counts)}{skipped_too}")


def choose(flags: Namespace, names: list[str]) -> tuple[Callable[[str], str | None], list[str], set[str]]:
    """What places an object in a split, the names of the splits, and the names of the objects to take.

    Says on stderr which objects are left out, and which names in the files have none. Raises UserError for
    files that cannot be read, and if no objects are left.
    """
    chosen = set(names)
    if flags.selection:
        selected = placement.read_selection(flags.selection)
        say_names("in the selection", "no object", [name for name in selected if name not in chosen])
        chosen &= set(selected)
        print(f"im3d: {len(chosen)} of {len(names)} objects are selected", file=sys.stderr)
    place: Callable[[str], str | None] = partial(placement.split_of, shares=flags.split)
    splits = list(flags.split)
    if flags.split_file:
        file = placement.read_split_file(flags.split_file)
        say_names("in the split file", "no object", file.without_object(names))
        homeless = [name for name in names if name in chosen and not file.split_of(name)]
        say_names("objects", "no split and are left out", homeless)
        chosen -= set(homeless)
        place, splits = file.split_of, file.splits
    if not chosen:
        raise UserError(f"none of the {len(names)} objects in {flags.views} is selected and in a split")
    return place, splits, chosen


def say_names(where: str, what: str, names: list[str]) -> None:
    """Such as "im3d: 2 names in the split file have no object: a/mug, b/cup", unless there are no names."""
    if names:
        more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
        subject = where if where == "objects" else f"names {where}"
        print(f"im3d: {len(names)} {subject} have {what}: {', '.join(names[:SAID])}{more}", file=sys.stderr)


def _name(directory: Path, root: Path) -> str:
    return directory.relative_to(root).as_posix()


def load_encoders(config: ConfigDict, embed: bool, latents: bool) -> tuple[Encoders, dict[str, Any]]:
    """The encoders of a config, and what the data set says of them to whoever trains on it.

    Raises UserError if the config names none of those that are asked for.
    """
    text = image = codec = clip = None
    metadata = {}
    if embed and config.text.name == "pretrained":
        from im3d_jax.conditions.encoders import PretrainedText  # needs the extra "hosted"

        text = build_text(config.text.name, config.text.kwargs.to_dict())
        assert isinstance(text, PretrainedText)
        metadata["text_encoders"] = [encoder.digest for encoder in text.encoders]
    if embed and config.image_encoder.path:
        from im3d_jax.conditions.encoders import ImageEncoder  # needs the extra "hosted"

        image = ImageEncoder(config.image_encoder.path)
        metadata["image_encoder"] = config.image_encoder.path
    if embed and not metadata:
        raise UserError(
            f"--embed: the config names no encoders to cache (config.text.name is {config.text.name!r});"
            " give another --config"
        )
    if latents:
        model = backbones.build(*config_sections.named(config, "backbone"))
        codec = autoencoders.build(
            *config_sections.named(config, "autoencoder"), config.size, model.latent_shape
        )
        metadata["autoencoder"] = config.autoencoder.to_dict()
        whole = Clip.of(clip_settings(config), config.num_views)
        if not (whole.is_views and num_latents(whole, codec) == whole.num_views):
            clip, metadata["clip"] = whole, whole._asdict()
    return Encoders(text, image, codec, config.size, clip), metadata


def parse_shares(text: str) -> dict[str, float]:
    """ "train=0.9,test=0.1" as shares by name. Raises ArgumentTypeError unless they sum to 1."""
    try:
        shares = {name: float(share) for name, share in (each.split("=") for each in text.split(","))}
    except ValueError:
        shares = {}
    named = all(placement.SPLIT_NAME.fullmatch(name) for name in shares)
    # Written so that NaN, which compares as false, is refused.
    if not (named and min(shares.values(), default=-1) >= 0 and abs(sum(shares.values()) - 1) <= 1e-6):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARE,... with shares that make 1")
    return shares
