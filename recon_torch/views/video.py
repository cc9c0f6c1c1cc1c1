"""Turntable videos, written from renders, and read as views at a known elevation and field of view."""

from __future__ import annotations

import errno
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import MaskFunction, Views, assemble
from recon_torch.views.images import MAX_PIXELS, resize, to_uint8


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
    segment: MaskFunction,
    *,
    num_views: int,
    elevation_rad: float,
    fov_deg: float,
    clockwise: bool = False,
    height: int | None = None,
) -> Views:
    """Evenly spaced frames of a video of exactly one turn, whose next frame would be the first one again.

    Args:
        path: any video that ffmpeg reads.
        segment: makes the masks of the frames.
        num_views: how many frames to take.
        elevation_rad: elevation of the camera above the object's equator, the same in all frames.
        fov_deg: vertical field of view.
        clockwise: whether the camera goes round clockwise, seen from above.
        height: rows of the views; by default those of the video.

    Raises:
        UserError: the file is missing, is not a video, or has fewer frames than `num_views`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"video {path} does not exist")
    num_frames = sum(1 for _ in _frames(path))
    if not 1 <= num_views <= num_frames:
        raise UserError(
            f"{path} has {num_frames} frames; take from 1 to that many views of it, not {num_views}"
        )
    chosen = np.round(np.arange(num_views) * num_frames / num_views).astype(int)
    pictures = np.stack([_picture(frame, height) for frame in _take(_frames(path), chosen)])
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
    return assemble(cameras, pictures, names, segment, [], str(path))


def _frames(path: Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        width, height = next(reader)["size"]
        if width * height > MAX_PIXELS:
            raise UserError(f"{path} has frames of {width} x {height} px; give a smaller video")
        for frame in reader:
            yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
    # What imageio-ffmpeg raises for files that are not videos.
    except (OSError, RuntimeError, IndexError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as a video; give an .mp4 that ffmpeg plays") from None
    finally:
        reader.close()


def _take(frames: Iterator[np.ndarray], chosen: np.ndarray) -> Iterator[np.ndarray]:
    wanted = set(chosen.tolist())
    return (frame for index, frame in enumerate(frames) if index in wanted)


def _picture(frame: UInt8[np.ndarray, "H W 3"], height: int | None) -> Float[np.ndarray, "h w 4"]:
    """RGB in [0, 1] with NaN as its mask, which is not known yet."""
    rgb = frame.astype(np.float32) / 255.0
    picture = np.pad(rgb, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    if height is None:
        return picture
    return resize(picture, max(1, round(frame.shape[1] * height / frame.shape[0])), height)
