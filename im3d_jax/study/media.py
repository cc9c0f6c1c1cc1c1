"""The files that annotators see: videos that every browser plays, and pictures.

All videos go through one encoder, so that no side shows by its codec, sound or metadata whose it is.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
from PIL import Image, ImageOps

from recon_torch.errors import UserError, first_line

LARGEST_PX = 1024
PICTURE_PX = 512
BROKEN_PX, TILE_PX = 256, 32
"""Sides of the frames of a broken video, and of the tiles whose places are exchanged."""

EVEN = "scale=w=max(2\\,2*trunc({w}/2)):h=max(2\\,2*trunc({h}/2)),setsar=1"
# Square pixels first; then no side is longer than LARGEST_PX.
WHOLE = ",".join(
    [
        EVEN.format(w="iw*sar", h="ih"),
        EVEN.format(w=f"iw*min(1\\,{LARGEST_PX}/max(iw\\,ih))", h=f"ih*min(1\\,{LARGEST_PX}/max(iw\\,ih))"),
    ]
)


def write_video(source: Path, target: Path) -> None:
    """Encodes a video as H.264 without sound and metadata. Raises UserError if it cannot be read."""
    _encode(source, target, WHOLE)


def write_broken(source: Path, target: Path, seed: int) -> None:
    """Encodes a video whose tiles are exchanged at random, so that nobody takes it for an object."""
    tiles = f"scale={BROKEN_PX}:{BROKEN_PX},setsar=1,shufflepixels=m=block:w={TILE_PX}:h={TILE_PX}:s={seed}"
    _encode(source, target, tiles)


def _encode(source: Path, target: Path, filters: str) -> None:
    try:
        executable = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError("videos need ffmpeg; reinstall imageio-ffmpeg") from None
    # Playlists name further files, which may be anywhere: of all protocols, only this one file is read.
    reads = ["-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file", "-i", f"file:{source}"]
    drops = ["-map", "0:v:0", "-an", "-sn", "-dn", "-map_metadata", "-1", "-fflags", "+bitexact"]
    codec = "-c:v libx264 -pix_fmt yuv420p -crf 16 -flags:v +bitexact -threads 1 -movflags +faststart"
    command = [executable, "-y", *reads, *drops, "-vf", filters, *codec.split(), str(target)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode or not target.is_file() or not target.stat().st_size:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no frames"]
        if any("No space left" in line for line in lines):
            raise UserError(f"cannot write {target} (No space left on device); make room")
        reason = lines[0].rpartition("] ")[2][:80]
        raise UserError(f"{source} cannot be read as a video ({reason}); render it again")


def write_picture(source: Path, target: Path) -> None:
    """Writes a reference as PNG, over white. Raises UserError if it cannot be read."""
    try:
        with Image.open(source) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception as error:  # damaged pictures raise many kinds
        raise UserError(f"{source} cannot be read as a picture ({first_line(error, 80)})") from None
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").save(target)
