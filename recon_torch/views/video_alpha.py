"""Videos whose frames have alpha: they are put on white, as pictures are, or hidden colours would be seen."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

FORMATS = re.compile(
    r"Stream #0:\d+.*? Video: .*[ ,](yuva\w+|argb|rgba\w*|abgr|bgra\w*|gbrap\w*|ya8|ya16\w*|pal8)\b"
)
"""What ffmpeg says of a stream whose decoder gives alpha."""
WEBM = re.compile(r"^\s*alpha_mode\s*:\s*1\s*$", re.MULTILINE | re.IGNORECASE)
"""What it says of a stream whose alpha its own decoder leaves out."""
DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
OVER_WHITE = (
    "format=rgba,split[over][under];[under]drawbox=t=fill:c=white:replace=1[white];"
    "[white][over]overlay=format=rgb,"
)


class OverWhite(NamedTuple):
    """What puts a video on white. options: before its `-i`; filters: before all others, "" without alpha."""

    options: list[str]
    filters: str


def over_white(executable: str, source: Sequence[str]) -> OverWhite:
    """Looks whether a video has alpha. source: the options of ffmpeg that name it, its file last."""
    command = [executable, "-hide_banner", "-nostdin", *source]
    log = subprocess.run(command, capture_output=True, text=True, errors="replace").stderr
    codec = re.search(r" Video: (\w+)", log)
    if WEBM.search(log) and codec and codec[1] in DECODERS:
        return OverWhite(["-c:v", DECODERS[codec[1]]], OVER_WHITE)
    return OverWhite([], OVER_WHITE if FORMATS.search(log) else "")
