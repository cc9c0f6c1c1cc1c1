"""Reading, writing and resizing of images, and contact sheets."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.text_files import BEGINNING_BYTES, check_not_stand_in

MAX_PIXELS = 64_000_000  # an image of 8000 x 8000 pixels; a few hundred bytes of PNG can claim far more
MAX_SIDE_PX = 32_000  # of a picture that claims no more pixels, but all of them in one row
SEQUENCES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # whose further pictures are no previews of the first
OPAQUE = 0.99  # an alpha channel that is nowhere below this is no mask
QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height


def straight(rgb: Float[np.ndarray, "*N 3"], alpha: Float[np.ndarray, "*N 1"]) -> Float[np.ndarray, "*N 4"]:
    """RGBA images, with colours that are not multiplied by alpha, of images composited over white.

    The colour is white where alpha is 0.
    """
    colors = np.where(alpha > 0, (rgb - (1 - alpha)) / np.maximum(alpha, 1e-3), 1)
    return np.concatenate([colors, alpha], -1).clip(0, 1)


def to_uint8(image: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Clips to [0, 1] and rounds to 0..255. Raises ValueError for NaN, which has no colour."""
    image = np.asarray(image)
    if not np.isfinite(image).all():
        raise ValueError("an image has NaN or infinite values")
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def write_image(path: str | Path, image: Float[np.ndarray, "H W C"] | UInt8[np.ndarray, "H W C"]) -> None:
    """Writes a grey (C = 1), RGB or RGBA image in the format that the suffix names."""
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = to_uint8(image)
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary)


def read_image(path: str | Path, upright: bool = True) -> Float[np.ndarray, "H W C"]:
    """Reads an image of any mode: RGBA if it has transparency, else RGB, in sRGB.

    upright: turn it as its EXIF entry says.

    Raises:
        UserError: the file is missing, is not an image, or has too many pixels for a view.
    """
    with opened(path) as image:
        return _decode(ImageOps.exif_transpose(image) if upright else image, path)


def image_size(path: str | Path) -> tuple[int, int]:
    """The (width, height) of the image that `read_image` would give. Raises UserError as that does."""
    size, orientation = stored_size(path)
    return size[::-1] if orientation in QUARTER_TURNS else size


def stored_size(path: str | Path) -> tuple[tuple[int, int], int]:
    """The (width, height) before any turn, and EXIF's orientation, which is 1 where there is nothing to turn.

    Raises UserError as `read_image` does.
    """
    with opened(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image.size, orientation if orientation in range(2, 9) else 1


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image whose header is read and says that it is of a size for a view. Raises UserError for others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are checked below
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE_PX:
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels; give one below 8000 x 8000"
                )
            if image.format in SEQUENCES and getattr(image, "is_animated", False):
                raise UserError(f"{path} holds several pictures, as animations do; give one, or a video")
            yield image
    except FileNotFoundError as error:
        raise UserError(f"no image at {path}; check the path") from error
    # Pillow raises SyntaxError and ValueError, too, for some broken files.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        check_not_stand_in(path, _beginning(path))
        raise UserError(f"cannot read {path} as an image; give a PNG, JPEG or WebP file") from error
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory; give a smaller image") from error


def _beginning(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING_BYTES)
    except (OSError, ValueError):
        return b""


def contact_sheet(
    rows: Sequence[Float[np.ndarray, "_ _ _ 3"]],
    row_labels: Sequence[str],
    *,
    tile_px: int = 96,
    gap_px: int = 2,
) -> UInt8[np.ndarray, "height width 3"]:
    """One image with a labelled row for each set of frames; rows may differ in length and image size.

    Frames lower than `tile_px` are enlarged by a whole factor, so that pixels stay square and sharp.
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


def _decode(image: Image.Image, path: str | Path) -> Float[np.ndarray, "H W C"]:
    if image.mode == "F":
        raise UserError(
            f"{path} has floating-point pixels, whose white is not known; give a PNG, JPEG or WebP"
        )
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(image, np.float32) / 65535.0, 0.0, 1.0)
        return np.repeat(grey[..., None], 3, axis=-1)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.asarray(_in_srgb(image, mode), np.float32) / 255.0


def _in_srgb(image: Image.Image, mode: str) -> Image.Image:
    """The colours that the file's ICC profile means: phones store Display P3, and printers' files are CMYK.

    A profile that cannot be read, or is not of the file's colours, counts as none, as in browsers.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert(mode)
    try:
        meant = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if meant.profile.xcolor_space == "RGB ":
            image = image.convert(mode)
        if "sRGB" in (meant.profile.profile_description or ""):
            return image.convert(mode)
        to = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, meant, to, outputMode=mode)  # type: ignore[return-value]
    except (OSError, ValueError, ImageCms.PyCMSError):
        return image.convert(mode)


def _enlarge(image: UInt8[np.ndarray, "H W 3"], tile_px: int) -> UInt8[np.ndarray, "h w 3"]:
    factor = max(1, -(-tile_px // image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
