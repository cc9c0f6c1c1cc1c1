"""Masks as annotation tools, segmentation data sets and cut-out tools write them."""

import numpy as np
import pytest
from PIL import Image

from recon_torch.views.mask_files import read_mask

SIZE = 32
TICKS = np.arange(SIZE) - 15.5
RADIUS = np.hypot(TICKS[:, None], TICKS)
INSIDE = RADIUS < 9
# With an edge of one pixel, whose levels differ as there is no symmetry.
SOFT = np.clip(9.5 - np.hypot(TICKS[:, None] + 0.123, TICKS - 0.321), 0, 1)
OTHER = INSIDE & (TICKS > 0)  # a part that is a class or an object of its own
VOC = np.where(INSIDE, 15, 0)
VOC[np.abs(RADIUS - 9) < 1.5] = 255  # the outline, whose middle is the disc's border
LABELS = INSIDE.astype(np.uint8) + OTHER


def palette_image(indices, colors):
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(np.array(colors, np.uint8).ravel().tolist())
    return image


def color(mask, rgb):
    return Image.fromarray(np.rint(np.asarray(mask)[..., None] * rgb).astype(np.uint8))


def with_alpha(rgb, alpha):
    channels = [*np.broadcast_to(rgb, (SIZE, SIZE, 3)).transpose(2, 0, 1), 255 * np.asarray(alpha)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


BLACK, RED, GREEN = (0, 0, 0), (128, 0, 0), (0, 128, 0)
# What the mask should be, what the reading should say, and the file.
MASKS = {
    "white": (INSIDE, "", Image.fromarray(255 * INSIDE.astype(np.uint8))),
    "soft": (SOFT, "", Image.fromarray(np.rint(255 * SOFT).astype(np.uint8))),
    "one bit": (INSIDE, "", Image.fromarray(INSIDE)),
    "white in RGB": (INSIDE, "", color(INSIDE, [255, 255, 255])),
    "0 and 1": (INSIDE, "up to 1", Image.fromarray(INSIDE.astype(np.uint8))),
    "0 and 1 in RGB": (INSIDE, "up to 1", color(INSIDE, [1, 1, 1])),
    "0 and 128": (INSIDE, "up to 128", Image.fromarray(128 * INSIDE.astype(np.uint8))),
    "two classes": (INSIDE, "up to 2", Image.fromarray(LABELS)),
    "grey classes": (INSIDE, "up to 75", Image.fromarray((38 * LABELS - (LABELS == 2)).astype(np.uint8))),
    "VOC as numbers": (INSIDE, "classes up to 15", Image.fromarray(VOC.astype(np.uint8))),
    "VOC palette": (INSIDE, "palette", palette_image(VOC, [BLACK, RED, GREEN, *[(9, 9, 0)] * 253])),
    "DAVIS palette": (INSIDE, "palette", palette_image(LABELS, [BLACK, RED, GREEN])),
    "DAVIS in RGB": (INSIDE, "colours", color(1, np.array([BLACK, RED, GREEN])[LABELS])),
    "grey palette": (INSIDE, "", palette_image(~INSIDE, [(255,) * 3, BLACK])),
    "green": (INSIDE, "colours", color(INSIDE, [0, 255, 0])),
    "soft green": (SOFT, "shades", color(SOFT, [10, 250, 20])),
    "LA": (INSIDE, "alpha", with_alpha([90, 90, 90], INSIDE).convert("LA")),
    "LA, opaque": (INSIDE, "", Image.fromarray(255 * INSIDE.astype(np.uint8)).convert("LA")),
    "black on nothing": (SOFT, "alpha", with_alpha(BLACK, SOFT)),
    "a cut-out": (
        SOFT,
        "alpha",
        with_alpha(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3)), SOFT),
    ),
    "16 bits": (SOFT, "", Image.fromarray(np.rint(65535 * SOFT).astype(np.uint16))),
    "16 bits, 0 and 1": (INSIDE, "up to 1", Image.fromarray(INSIDE.astype(np.uint16))),
    "16 bits, 0 and 255": (INSIDE, "", Image.fromarray((255 * INSIDE).astype(np.uint16))),
    "16 bits, 0 and 4095": (INSIDE, "up to 4095", Image.fromarray((4095 * INSIDE).astype(np.uint16))),
    "glass": (SOFT * 0.6, "at most 153", Image.fromarray(np.rint(153 * SOFT).astype(np.uint8))),
    "empty": (0 * SOFT, "", Image.new("L", (SIZE, SIZE))),
    "full": (0 * SOFT + 1, "", Image.new("L", (SIZE, SIZE), 255)),
    "a trimap of matting": (
        np.where(np.abs(RADIUS - 9) < 2, 128 / 255, RADIUS < 9),
        "",
        Image.fromarray(np.where(np.abs(RADIUS - 9) < 2, 128, 255 * (RADIUS < 9)).astype(np.uint8)),
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_as_their_makers_mean_them(kind, tmp_path):
    expected, reading, image = MASKS[kind]
    image.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", SIZE, SIZE)
    assert mask.coverage.shape == (SIZE, SIZE, 1) and mask.coverage.dtype == np.float32
    wrong = np.abs(mask.coverage[..., 0] - expected) > 1.01 / 255
    assert wrong.mean() <= (0.03 if "VOC" in kind else 0)  # nearest pixels tell where an outline's middle is
    assert (reading in mask.reading) and bool(reading) == bool(mask.reading)


REFUSED = {
    "white around a black object; invert": Image.fromarray(255 * (~INSIDE).astype(np.uint8)),
    "no 0 for the background": Image.fromarray(2 - INSIDE.astype(np.uint8)),
    "first colour, the background, is .120, 120, 121": palette_image(LABELS, [(120, 120, 121), RED, GREEN]),
    "nothing of it is black": color(1, np.array([(250, 240, 0), RED, GREEN])[LABELS]),
    "more colours than a mask": color(INSIDE, np.random.default_rng(0).integers(60, 255, (SIZE, SIZE, 3))),
    "values from 0 up to 20000": Image.fromarray((np.rint(20000 * SOFT)).astype(np.uint16)),
    "floating-point": Image.fromarray(SOFT.astype(np.float32)),
    "is 32x16 px, its image is 32x32": Image.new("L", (SIZE, 16)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_masks_that_do_not_show_the_object_are_refused(message, tmp_path, user_error):
    REFUSED[message].save(tmp_path / "mask.tif")
    with user_error(rf"mask\.tif.*{message}"):
        read_mask(tmp_path / "mask.tif", SIZE, SIZE)


def test_jpeg_may_blur_a_mask(tmp_path):
    large = np.kron(INSIDE, np.ones((8, 8), bool))
    for image in (Image.fromarray(255 * large.astype(np.uint8)), color(large, [255, 255, 255])):
        image.save(tmp_path / "mask.jpg", quality=70)
        mask = read_mask(tmp_path / "mask.jpg", 8 * SIZE, 8 * SIZE)
        assert np.abs(mask.coverage[..., 0] - large).mean() < 0.01 and mask.reading == ""


def test_a_mask_may_be_turned_with_its_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((SIZE, 2 * SIZE), np.uint8)
    stored[4:9, 8:30] = 255
    Image.fromarray(stored).save(tmp_path / "mask.png", exif=exif)
    upright = np.rot90(stored, -1)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "mask.png", SIZE, 2 * SIZE).coverage[..., 0], upright / 255
    )
    np.testing.assert_array_equal(
        read_mask(tmp_path / "mask.png", 2 * SIZE, SIZE).coverage[..., 0], stored / 255
    )
