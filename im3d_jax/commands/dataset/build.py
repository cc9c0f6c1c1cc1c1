"""`im3d dataset build`: from directories of views to a data set."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from im3d_jax import autoencoders, backbones, config_flags
from im3d_jax.commands.dataset.progress import Skipped, in_words, progress
from im3d_jax.conditions.text import build_text
from im3d_jax.data import building, turntables, views
from im3d_jax.data.encoding import Encoders
from recon_torch.errors import CommandParser, UserError

DESCRIPTION = """Builds a data set from directories of views, which it checks, and encodes where asked.

    im3d dataset build --views data/views --out data/turntables
    im3d dataset build --views data/views --out data/turntables --split train=0.9,test=0.1
    im3d dataset build --views data/views --out data/turntables --embed --latents --config=my/paper.py

A hash of an object's name decides its split, so an object stays in its split when others are added.
"""


def main(argv: list[str]) -> None:
    parser = CommandParser("dataset build", DESCRIPTION)
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
    print(f"{flags.out}: {in_words(counts)}{skipped_too}")


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
