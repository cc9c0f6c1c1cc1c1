"""Images are read as they were written, and files that are no images are one clear error; contact sheets."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from recon_torch.errors import UserError
from recon_torch.views import images
from recon_torch.views.images import contact_sheet, image_size, read_image, to_uint8, write_image


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
def test_image_round_trip(tmp_path, channels):
    pixels = random_image(5, 7, channels)
    write_image(tmp_path / "new" / "x.png", pixels / 255.0)
    read = read_image(tmp_path / "new" / "x.png")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, pixels.astype(np.float32) / 255.0)


def test_values_are_rounded_and_clipped():
    assert to_uint8(np.array([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0])).tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([np.nan]))


def test_images_of_other_modes_are_read(tmp_path):
    grey = random_image(4, 6)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    cases = {
        "L": (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1) / 255),
        "I16": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, -1) / 255),
        "1": (Image.fromarray(grey > 99), np.repeat(grey[..., None] > 99, 3, -1)),
        "LA": (Image.fromarray(np.stack([grey, grey], -1), "LA"), np.repeat(grey[..., None], 4, -1) / 255),
        "P": (palette, [[[1, 0, 0], [0, 1, 0]]]),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_allclose(read_image(tmp_path / f"{name}.png"), expected, atol=1e-6, err_msg=name)
    palette.save(tmp_path / "clear.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0, :, 3], [0, 1])


def test_a_pointer_in_the_place_of_an_image_is_named(tmp_path, user_error):
    (tmp_path / "x.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with user_error("git-lfs pointer"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_files_of_several_pictures_are_refused_by_name(tmp_path, suffix, user_error):
    path, (first, second) = tmp_path / f"x.{suffix}", (Image.new("L", (8, 8), grey) for grey in (0, 200))
    first.save(path)
    assert read_image(path).shape == (8, 8, 3)
    first.save(path, save_all=True, append_images=[second])
    with user_error("holds several pictures"):
        read_image(path)


def test_the_preview_in_a_photo_is_no_second_picture(tmp_path):
    photo = Image.new("RGB", (8, 8), "red")
    photo.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[photo.resize((4, 4))])
    assert read_image(tmp_path / "x.jpg").shape == (8, 8, 3)


def test_exif_rotation_is_applied(tmp_path):
    pixels = random_image(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left: turn the picture clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), np.rot90(pixels, -1) / 255, atol=1e-6)
    assert image_size(tmp_path / "x.png") == (4, 6)


def test_unreadable_images_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    write_image(tmp_path / "cut.png", random_image(64, 64, 3))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name, message in [
        ("none.png", "no image at"),
        ("text.png", "cannot read"),
        ("cut.png", "cannot read"),
    ]:
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "float.tif")
    write_image(tmp_path / "large.png", random_image(8, 8, 3))
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(UserError, match="8 x 8 pixels"):
        read_image(tmp_path / "large.png")


def png_header(width, height):
    """A PNG that claims a size and holds no pixel."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ]
    sealed = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


@pytest.mark.parametrize("size", [(64_000_000, 1), (1, 32_001), (10_000, 10_000)])
def test_a_size_that_no_view_has_is_refused_by_the_header(tmp_path, size, user_error):
    (tmp_path / "large.png").write_bytes(png_header(*size))
    tracemalloc.start()
    for read in (read_image, image_size):
        with user_error(f"large.png has {size[0]} x {size[1]} pixels"):
            read(tmp_path / "large.png")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_pictures_that_do_not_fit_into_memory_are_user_errors(tmp_path, monkeypatch, user_error):
    write_image(tmp_path / "x.png", random_image(8, 8, 3))

    def no_memory(image, path):
        raise MemoryError

    monkeypatch.setattr(images, "_decode", no_memory)
    with user_error("x.png is too large for this machine's memory"):
        read_image(tmp_path / "x.png")


def test_contact_sheet_places_every_tile():
    small = random_image(2, 8, 8, 3) / 255.0
    large = random_image(1, 50, 40, 3, seed=1) / 255.0
    sheet = contact_sheet([small, large], ["views", "render"], tile_px=32, gap_px=2)
    gutter = sheet.shape[1] - 2 * (32 + 2)
    assert sheet.shape[0] == 2 + 34 + 52
    for k in range(2):
        left = gutter + 34 * k
        tile = sheet[2:34, left : left + 32]
        np.testing.assert_array_equal(tile[::4, ::4], to_uint8(small[k]))
        np.testing.assert_array_equal(tile[3::4, 3::4], to_uint8(small[k]))
    np.testing.assert_array_equal(sheet[36:86, gutter : gutter + 40], to_uint8(large[0]))
    assert sheet[:, :gutter].min() == 0  # the labels


# ---- Colour profiles ----


def icc_profile(colorants, gamma):
    """Bytes of a display's profile: D50 XYZ of its red, green and blue, and the exponent of its curves."""

    def xyz(color):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in color))

    curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    names = ("rXYZ", "gXYZ", "bXYZ", "rTRC", "gTRC", "bTRC", "wtpt")
    blocks = [*map(xyz, colorants), curve, curve, curve, xyz(D50)]
    table, data = struct.pack(">I", len(blocks)), b""
    for name, block in zip(names, blocks, strict=True):
        table += name.encode() + struct.pack(">II", 132 + 12 * len(blocks) + len(data), len(block))
        data += block
    head = struct.pack(">I4xI4s4s4s", 128 + len(table + data), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp"
    return (head.ljust(68, b"\0") + xyz(D50)[8:]).ljust(128, b"\0") + table + data


D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]
SRGB = np.array([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142)])


@pytest.mark.parametrize("mode, color", [("RGB", (200, 100, 50)), ("RGBA", (120, 140, 90, 77))])
def test_colours_are_those_that_the_profile_means(mode, color, tmp_path):
    path = tmp_path / "phone.png"
    Image.new(mode, (3, 2), color).save(path, icc_profile=icc_profile(DISPLAY_P3, 2.2))
    linear = (np.array(color[:3]) / 255) ** 2.2 @ np.array(DISPLAY_P3) @ np.linalg.inv(SRGB)
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    found = images.read_image(path)
    np.testing.assert_allclose(found[..., :3], np.broadcast_to(expected, (2, 3, 3)), atol=1.5 / 255)
    assert (np.rint(found[..., 3:] * 255) == color[3:]).all()


def test_profiles_of_srgb_or_damaged_ones_change_nothing(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, icc_profile(DISPLAY_P3, 2.2)[:90], b"no profile"):
        Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
        assert np.array_equal(np.rint(images.read_image(tmp_path / "a.png") * 255), pixels)
