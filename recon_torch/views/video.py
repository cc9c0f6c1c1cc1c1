"""Turntable videos, written from renders, and read as views at a known elevation and field of view."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Segment, Views, assemble
from recon_torch.views.images import MAX_PIXELS, to_uint8
from recon_torch.views.resizing import resize
from recon_torch.views.video_alpha import over_white

# Formats that hold a video themselves. Playlists name further files, which may be anywhere in a network.
CONTAINERS = "mov,matroska,avi,gif,apng,mpegts,mpeg,asf,flv,ogg,ivf,mxf,h264,hevc,m4v"
# Those that state how long the video is before it begins or in an index. The time that ffmpeg gives for the
# others is that of the frames it found.
STATING = ("mov", "matroska", "avi", "flv", "ivf", "mxf", "asf")
# How pictures that move end. What follows of PADDING is no part of them.
ENDS, PADDING = {"gif": b";", "apng": b"IEND\xaeB`\x82"}, b"\0\r\n "
# How much shorter than its container states a whole video may be: a degree of the turn, but no less and no
# more than so many frames. ffmpeg rounds the stated time to 10 ms, and sound begins or ends up to SOUND_S
# beside the pictures.
LEAST_FRAMES, MOST_FRAMES, ROUNDING_S, SOUND_S = 0.5, 1.5, 0.006, 0.05
DURATION = r"Duration: (\d+):(\d+):([\d.]+)"


def write_video(path: str | Path, frames: Float[np.ndarray, "T H W 3"], fps: int = 24) -> Path:
    """Writes an H.264 video in yuv420p, which browsers play; odd sizes are padded by one row or column.

    Returns the path of the file: `path`, or a .gif beside it, with a warning, where no ffmpeg can be found.
    """
    frames = to_uint8(frames)
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        path = Path(path).with_suffix(".gif")
        warnings.warn(f"no ffmpeg found, writing {path}; reinstall imageio-ffmpeg for an .mp4", stacklevel=2)
        images = [Image.fromarray(frame) for frame in frames]
        with replacing(path) as temporary:
            images[0].save(temporary, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
        return path
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    with replacing(path) as temporary:
        _encode(temporary, frames, fps)
    return Path(path)


def _encode(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> None:
    """Pipes frames of even size to ffmpeg. Raises OSError if ffmpeg cannot write all of them."""
    # RGB is converted with the matrix that the file declares, or players would shift the colours. "bitexact"
    # leaves out the encoder's version, so that equal frames give equal files.
    source = f"-f rawvideo -pix_fmt rgb24 -s {frames.shape[2]}x{frames.shape[1]} -r {fps} -i -"
    target = (
        "-c:v libx264 -pix_fmt yuv420p -crf 18 -vf scale=out_color_matrix=bt709:out_range=tv"
        " -colorspace bt709 -color_primaries bt709 -color_trc bt709 -movflags +faststart -fflags +bitexact"
    )
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
    # imageio's own writer would take a video that a full disk cut short for a good one.
    command = [*ffmpeg, *source.split(), *target.split(), str(path)]
    with warnings.catch_warnings():
        # JAX warns of every fork in its process; this one becomes ffmpeg at once.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line), f"exit code {done.returncode}")
        raise OSError(errno.EIO, f"ffmpeg: {reason.rpartition('] ')[2][:120]}")


def load_video(
    path: str | os.PathLike,
    segment: Segment,
    *,
    num_views: int,
    elevation_rad: float,
    fov_deg: float,
    clockwise: bool = False,
    height: int | None = None,
) -> Views:
    """Evenly spaced frames of a video of exactly one turn, whose next frame would be the first one again.

    Args:
        path: any video that ffmpeg reads. Pixels that are not square are made so.
        segment: makes the masks of the frames.
        num_views: how many frames to take.
        elevation_rad: elevation of the camera above the object's equator, the same in all frames.
        fov_deg: vertical field of view.
        clockwise: whether the camera goes round clockwise, seen from above.
        height: rows of the views; by default those of the video.

    Raises:
        UserError: the file is missing, is not a video, ends before the turn does, or has fewer frames than
            `num_views`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"video {path} does not exist")
    num_frames, notes = count_frames(path)
    if not 1 <= num_views <= num_frames:
        raise UserError(
            f"{path} has {num_frames} frames; take from 1 to that many views of it, not {num_views}"
        )
    chosen = np.round(np.arange(num_views) * num_frames / num_views).astype(int)
    pictures = np.stack([_picture(frame, height) for frame in frames_at(path, chosen)])
    rows, columns = pictures.shape[1:3]
    azimuths_rad = 2 * np.pi * chosen / num_frames
    square = orbit(
        elevation_rad=elevation_rad,
        size=rows,
        fov_deg=fov_deg,
        azimuths_rad=-azimuths_rad if clockwise else azimuths_rad,
    )
    square.intrinsics_px[:, 0, 2] = columns / 2
    cameras = Cameras(square.w2c.astype(np.float64), square.intrinsics_px, columns, rows)
    names = [f"frame {index}" for index in chosen]
    return assemble(cameras, pictures, names, segment, notes, str(path))


def count_frames(path: Path) -> tuple[int, list[str]]:
    """How many frames a video has, and notes where some are damaged or where there may have been more.

    Raises UserError if it is no video, or if less is in the file than its container states, because the rest
    of a turn would be fitted as a full one.
    """
    with contextlib.closing(_frames(path)) as frames:
        next(frames, None)  # refuses frames that are too large before all of them are decoded
    # Sound that is longer than the pictures makes the container state more than these fill.
    rest = ["-map", "0:a?", "-c:a", "copy", "-progress", "-", "-f", "null", os.devnull]
    done = subprocess.run(
        [*_ffmpeg(path, "level+info"), *rest], capture_output=True, text=True, errors="replace"
    )
    counts = re.findall(r"^frame=\s*(\d+)", done.stdout, re.MULTILINE)
    if done.returncode or not counts or not int(counts[-1]):
        raise _no_video(path)
    complaints = re.findall(r"^(\[.*)\[(?:error|fatal)\] (.*)$", done.stderr, re.MULTILINE)
    reasons = [said[:80] for who, said in complaints if who.startswith("[in#")]
    reasons += _cut_short(path, done.stdout, done.stderr, int(counts[-1]))
    if reasons:
        raise UserError(
            f"{path} is cut short or damaged ({reasons[0]}); copy it again: it must show a full turn"
        )
    notes = []
    if complaints:
        notes.append(f"the video is damaged, ffmpeg cannot decode all of it: {complaints[0][1][:80]}")
    if not _states_its_end(path, done.stderr):
        notes.append(
            "nothing in the video states how long it is, so that it cannot be told from a part of it: "
            f"make sure that its {counts[-1]} frames are a full turn"
        )
    return int(counts[-1]), notes


def frames_at(path: Path, chosen: Int[np.ndarray, " K"]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The frames of these numbers, in their order in the video. Raises UserError if there is no video."""
    wanted = set(chosen.tolist())
    return (frame for index, frame in enumerate(_frames(path)) if index in wanted)


def _cut_short(path: Path, progress: str, log: str, count: int) -> list[str]:
    """What shows that a video of `count` frames ends before its container says."""
    if end := ENDS.get(_container(log)):
        return [] if path.read_bytes().rstrip(PADDING).endswith(end) else ["its last bytes are missing"]
    missing_s, frame_s = _missing_s(progress, log, count)
    degree_s = frame_s * count / 360
    allowed_s = max(LEAST_FRAMES * frame_s, min(MOST_FRAMES * frame_s, degree_s), ROUNDING_S)
    if missing_s > allowed_s + SOUND_S * ("Audio:" in log):
        return [f"it ends {missing_s:.2f} s before the time that it states"]
    return []


def _missing_s(progress: str, log: str, count: int) -> tuple[float, float]:
    """How much earlier a video ends than its container states, and how long a frame is shown, in seconds."""
    ends_us = re.findall(r"^out_time_us=(\d+)", progress, re.MULTILINE)
    stated = re.search(DURATION, log)
    if not ends_us or stated is None:
        return 0.0, 0.0
    hours, minutes, seconds = map(float, stated.groups())
    stated_s = 3600 * hours + 60 * minutes + seconds
    return stated_s - int(ends_us[-1]) / 1e6, stated_s / count


def _container(log: str) -> str:
    """ffmpeg's first name of the format that it read."""
    name = re.search(r"^(?:\[info\] )?Input #0, (\w+)", log, re.MULTILINE)
    return name[1] if name else ""


def _states_its_end(path: Path, log: str) -> bool:
    """Whether a file that ends too early can be told from a whole one."""
    container = _container(log)
    if container in ENDS:
        return True
    return container in STATING and re.search(DURATION, log) is not None and not _has_fragments(path)


def _has_fragments(path: Path) -> bool:
    """Whether it is an .mp4 in fragments, each of which states its own length alone."""
    with path.open("rb") as file:
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if kind == b"moof":
                return True
            read = 8
            if length == 1:  # the length is in the next eight bytes
                length, read = int.from_bytes(file.read(8), "big"), 16
            if length < read:  # to the end of the file; in other containers these are no lengths
                return False
            file.seek(length - read, os.SEEK_CUR)
    return False


def _frames(path: Path) -> Generator[UInt8[np.ndarray, "H W 3"], None, None]:
    """The frames of a video, with square pixels, one by one. Raises UserError if there is none."""
    alpha = over_white(_executable(path), _source(path))
    square = ["-vf", f"{alpha.filters}scale=w=max(1\\,round(iw*sar)):h=ih,setsar=1"]
    command = [*_ffmpeg(path, before=alpha.options), *square, "-f", "image2pipe", "-c:v", "ppm", "-"]
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline() == b"P6\n":
                width, height = map(int, process.stdout.readline().split())
                if width * height > MAX_PIXELS:
                    raise UserError(f"{path} has frames of {width} x {height} px; give a smaller video")
                process.stdout.readline()  # the largest value, which is 255
                content = process.stdout.read(width * height * 3)
                yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
                count += 1
        finally:
            process.kill()
    if not count:
        raise _no_video(path)


def _ffmpeg(path: Path, log_level: str = "error", before: Sequence[str] = ()) -> list[str]:
    """The beginning of a command that decodes each frame of a video once. before: options of its file."""
    start = [_executable(path), "-hide_banner", "-nostdin", "-v", log_level, *before]
    return [*start, *_source(path), "-map", "0:v:0", "-fps_mode", "passthrough"]


def _executable(path: Path) -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError(f"{path} needs ffmpeg; reinstall imageio-ffmpeg") from None


def _source(path: Path) -> list[str]:
    return ["-format_whitelist", CONTAINERS, "-protocol_whitelist", "file", "-i", f"file:{path}"]


def _no_video(path: Path) -> UserError:
    return UserError(f"{path} cannot be read as a video; give an .mp4 that ffmpeg plays")


def _picture(frame: UInt8[np.ndarray, "H W 3"], height: int | None) -> Float[np.ndarray, "h w 4"]:
    """RGB in [0, 1] with NaN as its mask, which is not known yet."""
    rgb = frame.astype(np.float32) / 255.0
    picture = np.pad(rgb, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    if height is None:
        return picture
    return resize(picture, max(1, round(frame.shape[1] * height / frame.shape[0])), height)
