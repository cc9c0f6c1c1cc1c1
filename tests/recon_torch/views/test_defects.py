"""Noise, blur and darkness of pictures that were given so much of it."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from recon_torch.views import defects
from recon_torch.views.images import read_image

SIDE = 128
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
INSIDE = np.hypot(ROWS - 60, COLUMNS - 66) < 40


def picture(background: float) -> np.ndarray:
    """A ball that is bright on one side, and has stripes."""
    shade = 0.4 + 0.3 * COLUMNS / SIDE + 0.1 * (ROWS % 24 < 12)
    grey = np.where(INSIDE, shade, background)
    return np.stack([grey, 0.8 * grey, 0.6 * grey] if background < 1 else [grey] * 3, -1).astype(np.float32)


def noisy(rgb: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma / 255, rgb.shape)
    return (np.rint(np.clip(rgb + noise, 0, 1) * 255) / 255).astype(np.float32)


@pytest.mark.parametrize("background", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("sigma", [0.0, 4.0, 10.0, 25.0])
def test_noise_is_measured_also_where_white_or_black_cut_it_off(background, sigma):
    measured = 255 * defects.noise(noisy(picture(background), sigma))
    assert measured == pytest.approx(sigma, rel=0.2, abs=0.3)


@pytest.mark.parametrize("sigma", [0.0, 8.0])
def test_a_channel_that_is_black_is_no_noise(sigma):
    """As the blue of a yellow duck is, but for some shading."""
    rgb = picture(0.5)
    rgb[..., 2] = (np.hypot(ROWS - 60, COLUMNS - 66) / 40 - 0.95).clip(0)
    rgb[..., 1] = np.where(ROWS < 70, 0.8, 0.5)
    assert 255 * defects.noise(noisy(rgb, sigma), INSIDE) == pytest.approx(sigma, rel=0.25, abs=0.5)


def test_noise_within_a_mask():
    rgb = picture(1.0)
    dirty = np.where(INSIDE[..., None], noisy(rgb, 8), rgb)
    assert defects.noise(dirty) == 0
    assert 255 * defects.noise(dirty, INSIDE) == pytest.approx(8, rel=0.2)
    assert defects.noise(dirty, INSIDE & (ROWS < 30)) == 0  # too little to tell


@pytest.mark.parametrize("sigma", [0, 6])
@pytest.mark.parametrize("blur_px", [1.0, 2.0, 4.0])
def test_blur_is_measured_beside_noise(blur_px, sigma):
    blurred = noisy(ndimage.gaussian_filter(picture(1.0), (blur_px, blur_px, 0)), sigma)
    assert defects.blur_px(blurred) == pytest.approx(blur_px, rel=0.2)


def test_sharp_and_empty_pictures():
    assert defects.blur_px(picture(0.2)) < 0.6
    assert defects.blur_px(np.full((64, 64, 3), 0.5, np.float32)) == 0
    assert defects.noise(np.full((64, 64, 3), 0.5, np.float32)) == 0


def test_words_of_one_picture_and_of_many():
    rgb, mask = picture(1.0), INSIDE[..., None].astype(np.float32)
    clean = np.concatenate([rgb, mask], -1)
    assert defects.remarks(clean) == []
    blurred = np.concatenate([ndimage.gaussian_filter(rgb, (4, 4, 0)), mask * np.nan], -1)
    assert defects.remarks(blurred) == ["it is blurred by about 4 px"]
    views = np.stack([np.concatenate([noisy(rgb, 10), mask], -1)] * 3)
    (note,) = defects.notes(views)
    assert note == "the views have noise of about 9/255, from which even a perfect fit is 29 dB away"
    assert defects.notes(np.stack([clean] * 3)) == []


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_values_that_do_not_fill_a_file_of_16_bits_are_told(tmp_path, bits):
    values = np.rint(picture(1.0)[..., 0] * (2**bits - 1)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "raw.png")
    rgb = read_image(tmp_path / "raw.png")
    for mask in (np.full_like(rgb[..., :1], np.nan), INSIDE[..., None].astype(np.float32)):
        seen = np.concatenate([rgb, mask], -1)
        found = defects.remarks(seen)
        assert len(found) == (bits < 16) == len(defects.notes(seen[None]))
        for text in found:
            share = float(text.split("brighter than ")[1].split("%")[0])
            brightest = values[INSIDE if np.isfinite(mask).all() else ...].max() / 65535
            assert share / 100 == pytest.approx(brightest, rel=0.05)
