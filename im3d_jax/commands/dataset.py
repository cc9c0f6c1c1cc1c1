"""`im3d dataset`: data sets of turntables to train on: render objects, build a data set, look at one.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --size 512
    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py
    im3d dataset show data/turntables --out sheet.png

`im3d dataset COMMAND --help` lists the flags. docs/data.md says what the directories hold.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

import grain
import numpy as np
from tqdm import tqdm

from im3d_jax import autoencoders, backbones, config_flags
from im3d_jax.conditions import text as text_module
from im3d_jax.data import CorruptRecord, mesh_rendering, objects, procedural, turntables, views
from im3d_jax.data.turntables import Record
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import write_json
from recon_torch.views.cameras import orbit
from recon_torch.views.images import contact_sheet, straight, write_image

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
ENCODED_TOGETHER = 16  # objects
NAMED = 3  # of the objects skipped, in the error that stops
LOG_EVERY_S = 60.0
BACKGROUND = 0.75  # grey of a contact sheet, on which a wrong alpha shows


class Skipped:
    """Objects left out: each is named on stderr; more than `limit` stop."""

    def __init__(self, limit: int):
        self.limit, self.messages = limit, []

    def add(self, message: str) -> None:
        self.messages.append(message)
        tqdm.write(f"im3d: skipped {message}", file=sys.stderr)
        if len(self.messages) > self.limit:
            first = "; ".join(self.messages[:NAMED])
            raise UserError(f"more than --max-skipped {self.limit} objects cannot be used: {first}")


def progress(items: Iterable, total: int, initial: int = 0) -> Iterator:
    """The items, with a bar on a terminal, and now and then a plain line in a log."""
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


# ---- Rendering ----

RENDER = """Renders objects as directories of views, for `im3d dataset build`. Goes on where it stopped.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --part 0/8
"""


def render(argv: list[str]) -> None:
    flags = _parse_render(argv)
    if flags.meshes:
        names, render_one = _mesh_renderer(flags)
    else:
        names, render_one = _procedural_renderer(flags)
    settings = {key: getattr(flags, key) for key in ("size", "num_views", "elevation_deg", "seed")}
    _keep_settings(flags.out / "render.json", settings)
    part, num_parts = flags.part
    names = names[part::num_parts]
    missing = [name for name in names if not views.is_object(flags.out / name)]
    skipped = Skipped(flags.max_skipped)
    for name in progress(missing, len(names), len(names) - len(missing)):
        try:
            rgba, cameras, caption, elevation_rad = render_one(name)
        except UserError as error:
            skipped.add(f"{name}: {error}")
        else:
            views.write_object(flags.out / name, rgba, cameras, caption, elevation_rad)
    made = len(missing) - len(skipped.messages)
    print(f"{flags.out}: {made} objects rendered, {len(names) - len(missing)} were there", end="")
    print(f", {len(skipped.messages)} skipped" if skipped.messages else "")


def _procedural_renderer(flags: Namespace):
    """Names of objects, and what renders one: (rgba, cameras, caption, elevation in radians)."""
    first = objects.SPLITS["train"][0]

    def render_one(name: str):
        number = int(name)
        elevation_rad = _elevation_rad(flags, number)
        made = procedural.turntables(
            flags.seed, [number], size=flags.size, num_views=flags.num_views, elevations_rad=[elevation_rad]
        )
        rgba = straight(np.asarray(made.views.rgb[0]), np.asarray(made.views.alpha[0]))
        cameras = orbit(flags.num_views, elevation_rad, flags.size)
        return rgba, cameras, made.captions[0], elevation_rad

    return [f"{number:08d}" for number in range(first, first + flags.procedural)], render_one


def _mesh_renderer(flags: Namespace):
    """As `_procedural_renderer`, for the meshes below a directory."""
    found = sorted(path for path in flags.meshes.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    paths = {path.relative_to(flags.meshes).with_suffix("").as_posix(): path for path in found}
    if not paths:
        raise UserError(f"no meshes ({', '.join(MESH_SUFFIXES)}) below {flags.meshes}; correct --meshes")
    if len(paths) < len(found):
        raise UserError(f"{flags.meshes} has meshes that differ only in their suffix; rename them")
    for name in paths:
        if inside := [parent for parent in PurePosixPath(name).parents if str(parent) in paths]:
            raise UserError(f"{flags.meshes} has a mesh and a folder called {inside[0]}; rename one")
    captions = read_captions(flags.captions) if flags.captions else {}
    if without := [name for name in paths if name not in captions]:
        print(
            f"im3d: {len(without)} of {len(paths)} meshes have no caption, as {without[0]}", file=sys.stderr
        )

    def render_one(name: str):
        elevation_rad = _elevation_rad(flags, zlib.crc32(name.encode()))
        cameras = orbit(flags.num_views, elevation_rad, flags.size)
        rgba, _ = mesh_rendering.render(mesh_rendering.load_mesh(paths[name], flags.up), cameras)
        return rgba, cameras, captions.get(name, ""), elevation_rad

    return list(paths), render_one


def _elevation_rad(flags: Namespace, number: int) -> float:
    if flags.elevation_deg is None:
        return objects.elevation_rad(flags.seed, number)
    return float(np.deg2rad(flags.elevation_deg))


def read_captions(path: Path) -> dict[str, str]:
    """Captions by name from a CSV file of (name, caption) rows, as Cap3D's are."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read captions from {path} ({error}); give a CSV of name,caption") from None
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong:
        raise UserError(f"{path}, row {wrong}: not name,caption; quote captions that have commas")
    return {name: caption.strip() for name, caption in rows}


def _keep_settings(path: Path, settings: dict) -> None:
    """Raises UserError if a directory was begun with other settings."""
    if not path.exists():
        write_json(path, settings)
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} cannot be read; remove it, or choose another --out") from None
    for key, value in settings.items():
        if before.get(key) != value:
            begun = f"{path.parent} was begun with {key} {before.get(key)}, now it is {value}"
            raise UserError(f"{begun}; give the same, or another --out")


def _parse_render(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset render", RENDER)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--meshes", type=Path, metavar="DIR", help="below which .glb, .gltf, .obj, .ply lie")
    source.add_argument("--procedural", type=int, metavar="N", help="the first N training objects of our own")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets a directory per object")
    parser.add_argument("--captions", type=Path, metavar="CSV", help="of meshes: rows of name,caption")
    parser.add_argument("--up", choices=mesh_rendering.UP_AXES, default="y", help="axis of meshes (y)")
    parser.add_argument("--size", type=int, default=512, help="side of the square views in pixels (512)")
    parser.add_argument("--num-views", type=int, default=16, help="evenly spaced azimuths (16)")
    parser.add_argument("--elevation-deg", type=float, help="of all; else from 0 to 45, drawn for each")
    parser.add_argument("--seed", type=int, default=0, help="of procedural objects and elevations (0)")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="render only part I of N")
    parser.add_argument("--max-skipped", type=int, default=10, help="meshes that may be unreadable (10)")
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


def check_flags(rules: dict[str, bool]) -> None:
    for message, holds in rules.items():
        if not holds:
            raise UserError(message)


# ---- Building ----

BUILD = """Builds a data set from directories of views: checked, and encoded where asked.

    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --split train=0.9,test=0.1
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py

An object goes to the split that its name's hash says, so that it stays there when others come.
"""


def build(argv: list[str]) -> None:
    parser = CommandParser("dataset build", BUILD)
    parser.add_argument("--views", type=Path, required=True, metavar="DIR", help="a directory per object")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="of the data set; not there yet"
    )
    parser.add_argument(
        "--split",
        type=parse_shares,
        default="train=0.98,validation=0.01,test=0.01",
        metavar="NAME=SHARE,...",
        help="shares of the objects (%(default)s)",
    )
    parser.add_argument("--embed", action="store_true", help="keep what the config's encoders make")
    parser.add_argument("--latents", action="store_true", help="keep its autoencoder's latents, not pictures")
    parser.add_argument("--max-skipped", type=int, default=10, help="objects that may be unfit (10)")
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    encoders = Encoders(config, flags.embed, flags.latents)
    skipped = Skipped(flags.max_skipped)
    records = encoders.encode_all(read_all(flags.views, skipped))
    placed = ((split_of(record.id, flags.split), record) for record in records)
    counts = turntables.write(flags.out, placed, list(flags.split), encoders.metadata)
    held = ", ".join(f"{count} in {split}" for split, count in counts.items())
    print(f"{flags.out}: {held}" + (f"; {len(skipped.messages)} skipped" if skipped.messages else ""))


def read_all(root: Path, skipped: Skipped) -> Iterator[Record]:
    """The records of all fit objects below `root`, alike in number and size of their views."""

    def read(directory: Path) -> Record | str:
        name = directory.relative_to(root).as_posix()
        try:
            return views.read_object(directory, name)
        except views.Unfit as error:
            return f"{name}: {error}"

    directories = views.find_objects(root)
    num_threads = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    read_ahead = grain.MapDataset.source(directories).map(read).to_iter_dataset(options)
    alike = None
    for record in progress(read_ahead, len(directories)):
        if isinstance(record, str):
            skipped.add(record)
            continue
        shape = f"{len(record.cameras)} views of {record.cameras.height} px"
        alike = alike or shape
        if shape == alike:
            yield record
        else:
            skipped.add(f"{record.id}: it has {shape}, the first object {alike}")


def parse_shares(text: str) -> dict[str, float]:
    """ "train=0.9,test=0.1" -> shares by name, which make 1."""
    try:
        shares = {name: float(share) for name, share in (each.split("=") for each in text.split(","))}
    except ValueError:
        shares = {}
    named = all(re.fullmatch("[a-z][a-z0-9_]*", name) and name != "all" for name in shares)
    if not named or min(shares.values(), default=-1) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARE,... with shares that make 1")
    return shares


def split_of(name: str, shares: dict[str, float]) -> str:
    """The split of an object, by a hash of its name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    bounds = np.cumsum(list(shares.values()))
    return list(shares)[min(int(np.searchsorted(bounds, place, side="right")), len(shares) - 1)]


class Encoders:
    """What encodes records once, so that training need not: the encoders and the autoencoder of a config.

    Attributes:
        metadata: which they are, for whoever trains on the records.
    """

    def __init__(self, config, embed: bool, latents: bool):
        self.text = self.image = self.codec = None
        self.metadata, self.size = {}, config.size
        if embed and config.text.name == "pretrained":
            self.text = text_module.build_text(config.text.name, config.text.kwargs)
            self.metadata["text_encoders"] = [encoder.digest for encoder in self.text.encoders]
        if embed and config.image_encoder.path:
            from im3d_jax.conditions.encoders import ImageEncoder  # needs the extra "hosted"

            self.image = ImageEncoder(config.image_encoder.path)
            self.metadata["image_encoder"] = config.image_encoder.path
        if embed and not self.metadata:
            raise UserError(
                f"--embed: the config names no encoders to cache (config.text.name is {config.text.name!r});"
                " give another --config"
            )
        if latents:
            model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
            self.codec = autoencoders.build(
                **config.autoencoder, size=config.size, latent_shape=model.latent_shape
            )
            self.metadata["autoencoder"] = config.autoencoder.to_dict()

    def encode_all(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records with what the encoders make of them, several at a time."""
        records = iter(records)
        while together := list(islice(records, ENCODED_TOGETHER)):
            yield from self._encode(together)

    def _encode(self, records: list[Record]) -> list[Record]:
        added: list[dict] = [{} for _ in records]
        if self.text:
            text, mask = self.text.encode([record.caption for record in records])
            for row, new in enumerate(added):
                new |= dict(
                    text=tuple(each[row] for each in text), text_mask=tuple(each[row] for each in mask)
                )
        if self.image:
            first = np.stack([turntables.decode_views(each.views[:1], each.size)[0][0] for each in records])
            for tokens, new in zip(self.image.encode(first), added, strict=True):
                new["image_tokens"] = tokens
        if self.codec:
            for record, new in zip(records, added, strict=True):
                new |= dict(latents=self._latents(record), views=None)
        return [dataclasses.replace(record, **new) for record, new in zip(records, added, strict=True)]

    def _latents(self, record: Record) -> np.ndarray:
        if record.size != self.size:
            raise UserError(
                f"--latents: config.size is {self.size}, the views are {record.size} px; match them"
            )
        rgb, alpha = turntables.decode_views(record.views, record.size)
        return np.asarray(self.codec.encode(rgb[None], alpha[None])[0])


# ---- Looking ----

SHOW = """Says what a data set holds, and draws some of its objects, a row each, over grey.

    im3d dataset show data/turntables --out sheet.png --split validation --objects 12
"""


def show(argv: list[str]) -> None:
    parser = CommandParser("dataset show", SHOW)
    parser.add_argument("path", type=Path, help="the data set's directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--split", default="train", help="whose objects to draw (%(default)s)")
    parser.add_argument("--objects", type=int, default=8, help="how many to draw (%(default)s)")
    flags = parser.parse_args(argv)
    check_flags({"--objects must be at least 1": flags.objects >= 1})
    source = turntables.TurntableSource(flags.path, flags.split)
    held = ", ".join(f"{count} in {split}" for split, count in turntables.read_splits(flags.path).items())
    num_bytes = sum(file.stat().st_size for file in flags.path.iterdir())
    print(f"{flags.path}: {held}; {num_bytes / 1e6:.1f} MB", end="; ")
    print(f"{source.num_views} views of {source.size} px")
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
