"""The files that annotators see: videos that every browser plays, and pictures.

All videos go through one encoder, so that no side shows by its codec, sound or metadata whose it is.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
from PIL import Image

from im3d_jax.evaluate.outputs import pictures
from im3d_jax.evaluate.outputs.layouts import Kind
from im3d_jax.study.sources import Turntable
from recon_torch.errors import UserError
from recon_torch.views.images import read_image, to_uint8
from recon_torch.views.video_alpha import over_white

LARGEST_PX = 1024
PICTURE_PX = 512
BROKEN_PX, TILE_PX = 256, 32
"""Sides of the frames of a broken video, and of the tiles whose places are exchanged."""

TURN_S = 4.0
"""How long a turn of pictures takes."""
LEFT_SQUARE = "crop=w=min(iw\\,ih):h=ih:x=0:y=0"
EVEN = "scale=w=max(2\\,2*trunc({w}/2)):h=max(2\\,2*trunc({h}/2)),setsar=1"
# Square pixels first; then no side is longer than LARGEST_PX.
WHOLE = ",".join(
    [
        EVEN.format(w="iw*sar", h="ih"),
        EVEN.format(w=f"iw*min(1\\,{LARGEST_PX}/max(iw\\,ih))", h=f"ih*min(1\\,{LARGEST_PX}/max(iw\\,ih))"),
    ]
)


def write_video(source: Turntable, target: Path) -> None:
    """Encodes a turntable as H.264 without sound and metadata. Raises UserError if it cannot be read."""
    _encode(source, target, WHOLE)


def write_broken(source: Turntable, target: Path, seed: int) -> None:
    """Encodes a turntable whose tiles are exchanged at random, so that nobody takes it for an object."""
    tiles = f"scale={BROKEN_PX}:{BROKEN_PX},setsar=1,shufflepixels=m=block:w={TILE_PX}:h={TILE_PX}:s={seed}"
    _encode(source, target, tiles)


def _encode(source: Turntable, target: Path, filters: str) -> None:
    try:
        executable = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError("videos need ffmpeg; reinstall imageio-ffmpeg") from None
    layout, first, frames = source.layout, source.paths[0], b""
    if layout is not None and layout.kind != Kind.VIDEO:
        views = pictures.over_white(pictures.read(layout, source.paths, source.num_views))
        height, width = views.shape[1:3]
        rate, frames = len(views) / TURN_S, views.tobytes()
        form = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {rate:.6f}"
        reads = ["-v", "error", *form.split(), "-i", "-"]
    else:
        # Playlists name further files, which may be anywhere: of all protocols, only this one file is read.
        file = ["-protocol_whitelist", "file", "-i", f"file:{first}"]
        alpha = over_white(executable, file)
        reads = ["-nostdin", "-v", "error", "-xerror", *alpha.options, *file]
        if layout is not None and layout.square:
            filters = f"{LEFT_SQUARE},{filters}"
        filters = alpha.filters + filters
    drops = ["-map", "0:v:0", "-an", "-sn", "-dn", "-map_metadata", "-1", "-fflags", "+bitexact"]
    codec = "-c:v libx264 -pix_fmt yuv420p -crf 16 -flags:v +bitexact -threads 1 -movflags +faststart"
    command = [executable, "-y", *reads, *drops, "-vf", filters, *codec.split(), str(target)]
    done = subprocess.run(command, capture_output=True, input=frames or None)
    if done.returncode or not target.is_file() or not target.stat().st_size:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no frames"]
        if any("No space left" in line for line in lines):
            raise UserError(f"cannot write {target} (No space left on device); make room")
        reason = lines[0].rpartition("] ")[2][:80]
        raise UserError(f"{first} cannot be read as a video ({reason}); render it again")


def write_picture(source: Path, target: Path) -> None:
    """Writes a reference as PNG, over white. Raises UserError if it cannot be read."""
    pixels = to_uint8(read_image(source))
    picture = Image.fromarray(pixels).convert("RGBA")
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").save(target)
