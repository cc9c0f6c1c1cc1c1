"""What outputs are called: suffixes of their files, keys that join them, and names in sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from recon_torch.errors import UserError

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NUM_NAMED, LONGEST_NAMED = 5, 60


def key_of(text: str) -> str:
    """What prompts have in common that differ in case, spaces and punctuation alone."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text


def named(names: Sequence[str], what: str) -> str:
    """Such as "3 prompts (a, b, c)"; of many, the first ones stand in the brackets."""
    short = [name if len(name) <= LONGEST_NAMED else f"{name[:LONGEST_NAMED]}..." for name in names]
    shown = ", ".join(short[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def references(directory: Path) -> dict[str, Path]:
    """The pictures in a directory, by the keys of their names. Raises UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"--pictures {directory} is no directory; give one with NAME.png")
    found = {
        key_of(path.stem): path
        for path in sorted(directory.iterdir(), reverse=True)
        if path.suffix.lower() in PICTURES
    }
    if not found:
        raise UserError(f"--pictures {directory} has no pictures; give a directory with NAME.png")
    return found
