"""`im3d dataset`: data sets of turntables to train on. It renders objects, builds a data set, and shows one.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --size 512
    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py
    im3d dataset show data/turntables --out sheet.png

`im3d dataset COMMAND --help` lists the flags of each. docs/data.md describes the directories.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from im3d_jax import autoencoders, backbones, config_flags
from im3d_jax.conditions.text import build_text
from im3d_jax.data import CorruptRecord, Renderer, building, rendering, turntables, views
from im3d_jax.data.captions import read_captions
from im3d_jax.data.encoding import Encoders
from im3d_jax.data.mesh_rendering import UpAxis
from im3d_jax.data.rendering import MeshRenderer, ProceduralRenderer, Turntable
from recon_torch.errors import CommandParser, UserError
from recon_torch.views.images import contact_sheet, write_image

T = TypeVar("T")

NAMED = 3  # so many of the skipped objects are named in the error that stops
LOG_EVERY_S = 60.0
BACKGROUND = 0.75  # the grey behind a contact sheet's objects, on which a wrong alpha shows


class Skipped:
    """Objects that are left out. Each is named on stderr; more than `limit` of them stop the command."""

    def __init__(self, limit: int):
        self.limit = limit
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)
        tqdm.write(f"im3d: skipped {message}", file=sys.stderr)
        if len(self.messages) > self.limit:
            first = "; ".join(self.messages[:NAMED])
            raise UserError(f"more than --max-skipped {self.limit} objects cannot be used: {first}")


def progress(items: Iterable[T], total: int, initial: int = 0) -> Iterator[T]:
    """Passes the items on, and shows a bar on a terminal or writes a plain line once a minute to a log."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, initial=initial, desc="objects", unit="object")
        return
    began = written = time.monotonic()
    for done, item in enumerate(items, initial + 1):
        yield item
        now = time.monotonic()
        if now - written >= LOG_EVERY_S:
            rate, written = (done - initial) / (now - began), now
            eta = tqdm.format_interval((total - done) / rate)
            print(f"objects {done}/{total} {rate:.3g}/s ETA {eta}", file=sys.stderr, flush=True)


def check_flags(rules: Mapping[str, bool]) -> None:
    """Raises a UserError with the message of the first rule that does not hold."""
    for message, holds in rules.items():
        if not holds:
            raise UserError(message)


# ---- Rendering ----

RENDER = """Renders objects as directories of views, which `im3d dataset build` reads.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --part 0/8

Objects that are in --out already are kept, so an interrupted command is simply started again.
"""


def render(argv: list[str]) -> None:
    flags = _parse_render(argv)
    renderer = _renderer(flags)
    settings = {key: getattr(flags, key) for key in ("size", "num_views", "elevation_deg", "seed")}
    rendering.keep_settings(flags.out / "render.json", settings)
    part, num_parts = flags.part
    names = renderer.names[part::num_parts]
    missing = [name for name in names if not views.is_object(flags.out / name)]
    num_kept = len(names) - len(missing)
    skipped = Skipped(flags.max_skipped)
    for name in progress(missing, len(names), num_kept):
        try:
            made = renderer.render(name)
        except UserError as error:
            skipped.add(f"{name}: {error}")
        else:
            views.write_object(flags.out / name, *made)
    num_made = len(missing) - len(skipped.messages)
    print(f"{flags.out}: {num_made} objects rendered, {num_kept} were there", end="")
    print(f", {len(skipped.messages)} skipped" if skipped.messages else "")


def _renderer(flags: Namespace) -> Renderer:
    turntable = Turntable(flags.size, flags.num_views, flags.elevation_deg, flags.seed)
    if not flags.meshes:
        return ProceduralRenderer(flags.procedural, turntable)
    captions = read_captions(flags.captions) if flags.captions else {}
    renderer = MeshRenderer(flags.meshes, captions, flags.up, turntable)
    if without := renderer.without_caption:
        of_all = f"{len(without)} of {len(renderer.names)} meshes have no caption"
        print(f"im3d: {of_all}, as {without[0]}", file=sys.stderr)
    return renderer


def _parse_render(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset render", RENDER)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--meshes", type=Path, metavar="DIR", help="render the .glb, .gltf, .obj and .ply files below DIR"
    )
    source.add_argument(
        "--procedural", type=int, metavar="N", help="render the first N procedural training objects"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets a directory for each object"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="CSV", help="captions of the meshes, in rows of name,caption"
    )
    parser.add_argument(
        "--up", type=UpAxis, choices=list(UpAxis), default=UpAxis.Y, help="the meshes' axis that is up (y)"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the square views in pixels (512)")
    parser.add_argument("--num-views", type=int, default=16, help="number of evenly spaced azimuths (16)")
    parser.add_argument(
        "--elevation-deg", type=float, help="of all cameras; default: drawn from 0 to 45 for each object"
    )
    parser.add_argument("--seed", type=int, default=0, help="of procedural objects and elevations (0)")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="render only part I, from 0, of N parts"
    )
    parser.add_argument(
        "--max-skipped", type=int, default=10, help="how many meshes may be unusable before it stops (10)"
    )
    flags = parser.parse_args(argv)
    check_flags(
        {
            "--procedural must be at least 1": flags.procedural is None or flags.procedural >= 1,
            "--size must be from 8 to 4096": 8 <= flags.size <= 4096,
            "--num-views must be at least 1": flags.num_views >= 1,
            "--elevation-deg must lie between -90 and 90": abs(flags.elevation_deg or 0) < 90,
            "--seed must not be negative": flags.seed >= 0,
        }
    )
    return flags


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])


# ---- Building ----

BUILD = """Builds a data set from directories of views, which it checks, and encodes where asked.

    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --split train=0.9,test=0.1
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py

A hash of an object's name decides its split, so an object stays in its split when others are added.
"""


def build(argv: list[str]) -> None:
    parser = CommandParser("dataset build", BUILD)
    parser.add_argument(
        "--views", type=Path, required=True, metavar="DIR", help="holds a directory of views for each object"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the data set to make, not there yet"
    )
    parser.add_argument(
        "--split",
        type=parse_shares,
        default="train=0.98,validation=0.01,test=0.01",
        metavar="NAME=SHARE,...",
        help="the splits' shares of the objects (%(default)s)",
    )
    parser.add_argument(
        "--embed", action="store_true", help="store what the config's text and image encoders make"
    )
    parser.add_argument(
        "--latents", action="store_true", help="store the latents of the config's autoencoder, not pictures"
    )
    parser.add_argument(
        "--max-skipped", type=int, default=10, help="how many objects may be unfit before it stops (10)"
    )
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    encoders, metadata = load_encoders(config, flags.embed, flags.latents)
    skipped = Skipped(flags.max_skipped)
    directories = views.find_objects(flags.views)
    read = progress(building.read_objects(flags.views, directories), len(directories))
    records = encoders.encode_all(building.keep_alike(read, skipped.add))
    placed = ((building.split_of(record.id, flags.split), record) for record in records)
    counts = turntables.write(flags.out, placed, list(flags.split), metadata)
    skipped_too = f"; {len(skipped.messages)} skipped" if skipped.messages else ""
    print(f"{flags.out}: {_in_words(counts)}{skipped_too}")


def load_encoders(config: ConfigDict, embed: bool, latents: bool) -> tuple[Encoders, dict[str, Any]]:
    """The encoders of a config, and what the data set says of them to whoever trains on it.

    Raises UserError if the config names none of those that are asked for.
    """
    text = image = codec = None
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
        model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
        codec = autoencoders.build(
            **config.autoencoder.to_dict(), size=config.size, latent_shape=model.latent_shape
        )
        metadata["autoencoder"] = config.autoencoder.to_dict()
    return Encoders(text, image, codec, config.size), metadata


def parse_shares(text: str) -> dict[str, float]:
    """ "train=0.9,test=0.1" as shares by name. Raises ArgumentTypeError unless they sum to 1."""
    try:
        shares = {name: float(share) for name, share in (each.split("=") for each in text.split(","))}
    except ValueError:
        shares = {}
    named = all(re.fullmatch("[a-z][a-z0-9_]*", name) and name != "all" for name in shares)
    if not named or min(shares.values(), default=-1) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARE,... with shares that make 1")
    return shares


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {split}" for split, count in counts.items())


# ---- Showing ----

SHOW = """Prints what a data set holds, and draws some of its objects over grey, one in each row.

    im3d dataset show data/turntables --out sheet.png --split validation --objects 12
"""


def show(argv: list[str]) -> None:
    parser = CommandParser("dataset show", SHOW)
    parser.add_argument("path", type=Path, help="the data set's directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--split", default="train", help="the split whose objects are drawn (%(default)s)")
    parser.add_argument("--objects", type=int, default=8, help="how many objects are drawn (%(default)s)")
    flags = parser.parse_args(argv)
    check_flags({"--objects must be at least 1": flags.objects >= 1})
    source = turntables.TurntableSource(flags.path, flags.split)
    num_bytes = sum(file.stat().st_size for file in flags.path.iterdir())
    counts = _in_words(turntables.read_splits(flags.path))
    print(f"{flags.path}: {counts}; {num_bytes / 1e6:.1f} MB; {source.num_views} views of {source.size} px")
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
    write_image(flags.out, contact_sheet(rows, labels))


COMMANDS = {"render": render, "build": build, "show": show}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in COMMANDS:
        raise UserError(f"im3d dataset has no {argv[0]!r}; it has {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])
