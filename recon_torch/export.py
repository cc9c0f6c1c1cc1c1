"""Images, videos, contact sheets and JSON on disk. A file is whole or absent: written aside, then renamed.

Images are float32 in [0, 1], channels last. NumPy only, so that both the JAX and the PyTorch half can use it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from recon_torch.errors import UserError

MAX_PIXELS = 64_000_000  # a picture of 8000 x 8000; a few hundred bytes of PNG can claim far more


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix, that takes its name if the block succeeds.

    Makes the parent folders. Raises UserError where the system refuses to write.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(FILE_MODE)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(path: str | Path) -> Path:
    """Makes an output directory if there is none. Raises UserError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"directory {path} cannot be made: {error.strerror}; choose another one") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"directory {path} cannot be written to; choose another one")
    return Path(path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, indented. NumPy scalars and arrays become numbers and lists; NaN is a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda value: value.tolist())
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def straight(rgb: Float[np.ndarray, "*N 3"], alpha: Float[np.ndarray, "*N 1"]) -> Float[np.ndarray, "*N 4"]:
    """Pictures over white as RGBA with the colours of the object alone; white where there is nothing."""
    colors = np.where(alpha > 0, (rgb - (1 - alpha)) / np.maximum(alpha, 1e-3), 1)
    return np.concatenate([colors, alpha], -1).clip(0, 1)


def to_uint8(image: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[0, 1] -> 0..255, rounded, clipped. Raises ValueError for NaN, which has no colour."""
    image = np.asarray(image)
    if not np.isfinite(image).all():
        raise ValueError("an image has NaN or infinite values")
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def write_image(path: str | Path, image: Float[np.ndarray, "H W C"] | UInt8[np.ndarray, "H W C"]) -> None:
    """Writes a grey (C = 1), RGB or RGBA picture in the format that the suffix names."""
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = to_uint8(image)
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary)


def read_image(path: str | Path) -> Float[np.ndarray, "H W C"]:
    """Reads a picture of any mode, upright: RGBA if it has transparency, RGB otherwise.

    Raises UserError if the file is missing, is no picture, or has more than 64 million pixels.
    """
    with _opened(path) as image:
        return _decode(ImageOps.exif_transpose(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """The (width, height) of the picture that `read_image` would give. Raises UserError as that does."""
    with _opened(path) as image:
        quarter_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if quarter_turned else image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels; give one below 8000 x 8000"
                )
            yield image
    except FileNotFoundError as error:
        raise UserError(f"no image at {path}; check the path") from error
    # Pillow raises SyntaxError and ValueError for some broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path} as an image; give a PNG, JPEG or WebP file") from error


def write_video(path: str | Path, frames: Float[np.ndarray, "T H W 3"], fps: int = 24) -> Path:
    """Writes an H.264 video (yuv420p, so that browsers play it), odd sizes padded by one row or column.

    Returns the path written: `path`, or, where no ffmpeg can be found, a .gif beside it, with a warning.
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


def contact_sheet(
    rows: Sequence[Float[np.ndarray, "T H W 3"]],
    row_labels: Sequence[str],
    *,
    tile_px: int = 96,
    gap_px: int = 2,
) -> UInt8[np.ndarray, "height width 3"]:
    """One picture with a labelled row for each set of frames; rows may differ in length and image size.

    Images smaller than `tile_px` are enlarged by a whole factor, so that pixels stay square and sharp.
    """
    tiles = [[_enlarge(to_uint8(image), tile_px) for image in row] for row in rows]
    font = ImageFont.load_default(size=14)
    gutter = 2 * gap_px + max(int(np.ceil(font.getlength(label))) for label in row_labels)
    width = gutter + max(sum(tile.shape[1] + gap_px for tile in row) for row in tiles)
    heights = [max(tile.shape[0] for tile in row) + gap_px for row in tiles]
    sheet = Image.new("RGB", (width, sum(heights) + gap_px), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap_px
    for row, label, height in zip(tiles, row_labels, heights, strict=True):
        draw.text((gap_px, top + height // 2), label, fill="black", font=font, anchor="lm")
        left = gutter
        for tile in row:
            sheet.paste(Image.fromarray(tile), (left, top))
            left += tile.shape[1] + gap_px
        top += height
    return np.asarray(sheet)


def _encode(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> None:
    """Pipes frames of even size to ffmpeg. Raises OSError where that cannot write all of them."""
    # RGB is converted with the matrix that the file then declares, or players would shift the colours;
    # bitexact leaves out the encoder's version, so that equal frames give equal files.
    source = f"-f rawvideo -pix_fmt rgb24 -s {frames.shape[2]}x{frames.shape[1]} -r {fps} -i -"
    target = (
        "-c:v libx264 -pix_fmt yuv420p -crf 18 -vf scale=out_color_matrix=bt709:out_range=tv"
        " -colorspace bt709 -color_primaries bt709 -color_trc bt709 -movflags +faststart -fflags +bitexact"
    )
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
    # Not imageio's own writer, which takes a video that a full disk cut short for a good one.
    command = [*ffmpeg, *source.split(), *target.split(), str(path)]
    with warnings.catch_warnings():
        # JAX warns of any fork in its process; this one becomes ffmpeg at once.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line), f"exit code {done.returncode}")
        raise OSError(errno.EIO, f"ffmpeg: {reason.rpartition('] ')[2][:120]}")


def _decode(image: Image.Image) -> Float[np.ndarray, "H W C"]:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(image, np.float32) / 65535.0, 0.0, 1.0)
        return np.repeat(grey[..., None], 3, axis=-1)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(image.convert(mode), np.float32) / 255.0


def _enlarge(image: UInt8[np.ndarray, "H W 3"], tile_px: int) -> UInt8[np.ndarray, "h w 3"]:
    factor = max(1, -(-tile_px // image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FILE_MODE = 0o666 & ~_umask()  # read once: to read it is to change it, for all threads
