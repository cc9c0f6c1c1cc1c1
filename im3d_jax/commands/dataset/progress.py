"""What the subcommands share: the objects that are left out, progress, and checks of flags."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

from recon_torch.errors import UserError

T = TypeVar("T")

NAMED = 3  # so many of the skipped objects are named in the error that stops
LOG_EVERY_S = 60.0


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


def parse_part(text: str) -> tuple[int, int]:
    """ "I/N" as a type of argparse. Raises ArgumentTypeError unless I is from 0 to N - 1."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def in_words(counts: Mapping[str, int]) -> str:
    """Such as "9 in train, 1 in test"."""
    return ", ".join(f"{count} in {split}" for split, count in counts.items())
