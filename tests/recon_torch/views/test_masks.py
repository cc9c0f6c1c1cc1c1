"""Masks by threshold on drawn discs, their quality, and IS-Net through a stand-in for onnxruntime."""

import io
import os
import sys
import types
import warnings

import numpy as np
import pytest
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.views import masks
from recon_torch.views.masks import by_backdrop, by_isnet, isnet_masks, threshold_masks


def disc_on(
    background, color: float, radius: float = 10, middle: float = 15.5
) -> tuple[np.ndarray, np.ndarray]:
    ticks = np.arange(32) - middle
    inside = (ticks[:, None] ** 2 + ticks[None] ** 2 < radius**2)[..., None]
    return np.where(inside, np.float32([color, 0.5, 0.5]), np.float32(background))[None], inside[None]


@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_threshold_finds_the_disc_on_a_noisy_background(background):
    image, inside = disc_on(background, 0.2 if background != 0.2 else 0.9)
    noise = np.random.default_rng(0).uniform(-0.03, 0.03, image.shape)
    masks = threshold_masks((image + noise).astype(np.float32), background)
    np.testing.assert_array_equal(masks, inside)
    assert masks.dtype == np.float32


def test_each_picture_is_measured_by_its_own_background():
    pictures = [disc_on(color, 0.9) for color in ([0.1, 0.6, 0.2], 0.3, 1.0)]
    images = np.concatenate([image for image, _ in pictures])
    expected = np.concatenate([inside for _, inside in pictures])
    np.testing.assert_allclose(by_backdrop(images).masks, expected, atol=1e-6)


def test_where_nothing_is_even_nothing_is_told():
    noise = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    found = by_backdrop(noise)
    assert np.isnan(found.masks).all() and found.doubts == [()]
    np.testing.assert_array_equal(found.images, noise)


def test_specks_are_removed():
    image, inside = disc_on(0.0, 0.9, radius=6)
    image[0, 2, 3:5] = 0.2
    found = by_backdrop(image).masks
    assert found[0, 2].max() == 0
    np.testing.assert_allclose(found, inside, atol=1e-6)


SIDE = 64
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32)[..., None] / SIDE


def shaded_disc(background) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture of a disc, its coverage by 8 x 8 samples a pixel, and its picture on white."""
    ticks = (np.arange(SIDE * 8) + 0.5) / 8 - SIDE / 2
    inside = ((ticks[:, None] - 1.3) ** 2 + (ticks[None] + 0.6) ** 2 < 20**2).astype(np.float32)
    coverage = inside.reshape(SIDE, 8, SIDE, 8).mean((1, 3))[None, ..., None]
    shade = np.linspace(0.4, 0.9, SIDE, dtype=np.float32)[None, None, :, None] * np.float32([1.0, 0.8, 0.3])
    image = shade * coverage + np.float32(background) * (1 - coverage)
    return image.astype(np.float32), coverage, shade * coverage + 1 - coverage


@pytest.mark.parametrize("background", [[0.25, 0.3, 0.6], [0.1, 0.5, 0.2], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
def test_edges_are_soft_and_free_of_the_background(background):
    image, coverage, on_white = shaded_disc(background)
    found = by_backdrop(image)
    hard = threshold_masks(image, np.float32(background))
    edge = (coverage > 0) & (coverage < 1)
    assert np.abs(found.masks - coverage)[edge].mean() < 0.05 < 0.2 < np.abs(hard - coverage)[edge].mean()
    assert np.abs(found.images - on_white).max(-1, keepdims=True)[edge].mean() < 0.03
    np.testing.assert_allclose(found.masks[~edge], coverage[~edge], atol=0.02)
    np.testing.assert_array_equal(found.images[coverage[..., 0] == 0], 1)


BACKDROPS = {
    "grey": np.full(3, 0.5),
    "vignette": 0.9 - 0.45 * ((ROWS - 0.5) ** 2 + (COLUMNS - 0.5) ** 2) * np.ones(3),
    "gradient": (0.55 + 0.4 * ROWS) * np.ones(3),
    "white": np.ones(3),
}


@pytest.mark.parametrize("sigma", [0, 4.5, 10])
@pytest.mark.parametrize("backdrop", BACKDROPS)
def test_noise_and_uneven_light_are_not_the_object_and_vanish(backdrop, sigma):
    image, coverage, on_white = shaded_disc(BACKDROPS[backdrop])
    noise = np.random.default_rng(0).normal(0, sigma / 255, image.shape)
    found = by_backdrop(np.clip(image + noise, 0, 1).astype(np.float32))
    inside, true = found.masks > 0.5, coverage > 0.5
    assert (inside & true).sum() / (inside | true).sum() > 0.94
    far = np.hypot(ROWS - 0.52, COLUMNS - 0.49)[None, ..., 0] > 25 / SIDE  # 5 px away from the disc
    np.testing.assert_array_equal(found.images[far], 1)
    assert np.abs(found.images - on_white)[(coverage == 1)[..., 0]].mean() < sigma / 255 + 1e-3


def striped_disc(background) -> tuple[np.ndarray, np.ndarray]:
    """A dark disc with a light stalk that covers a third of its pixels, and that stalk's pixels."""
    image, coverage, _ = shaded_disc(background)
    stalk = np.zeros((SIDE, SIDE), bool)
    stalk[SIDE // 2, :14] = coverage[0, SIDE // 2, :14, 0] == 0
    stalk[:, :4] = False
    image[0, stalk] = np.float32([0.9, 0.6, 0.5]) / 3 + np.float32(background) * 2 / 3
    return image, stalk


@pytest.mark.parametrize("background", [[0.25, 0.3, 0.6], [1.0, 1.0, 1.0]])
def test_what_one_picture_does_not_tell_of_the_outline_is_unsure(background):
    image, stalk = striped_disc(background)
    _, coverage, _ = shaded_disc(background)
    found = by_backdrop(image)
    unsure = found.unsure[0, ..., 0]
    assert unsure[stalk].all()
    partly = (coverage > 0.02) & (coverage < 0.98)
    assert unsure[partly[0, ..., 0]].all()
    assert unsure.sum() < 3 * (partly.sum() + stalk.sum())
    background_alone = (coverage[0, ..., 0] == 0) & ~stalk
    assert not unsure[background_alone].any()
    inside = np.hypot(ROWS - 0.52, COLUMNS - 0.49)[..., 0] < 17 / SIDE
    assert not unsure[inside].any()
    # What the mask says is object has the same part of the backdrop taken away as the mask says.
    expected = image[0] + (1 - found.masks[0]) * (1 - np.float32(background))
    np.testing.assert_allclose(found.images[0][unsure], expected[unsure].clip(0, 1), atol=0.01)


@pytest.mark.parametrize(
    ("radius", "middle", "expected"),
    [
        (0.1, 15.5, "shows nothing"),
        (1, 15.5, None),
        (15, 15.5, None),
        (10, 4.0, "touches the border"),
        (30, 15.5, "covers everything"),
    ],
)
def test_what_speaks_against_a_mask(radius, middle, expected):
    inside = disc_on(1.0, 0.2, radius, middle)[1][0]
    assert masks.problem(inside.astype(np.float32)) == expected


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "isnet.onnx"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def predict(monkeypatch, weights):
    """Installs a stand-in for onnxruntime whose network predicts what the test wants, at 1024 x 1024."""

    class Session:
        def __init__(self, path, providers):
            assert path == weights and providers == ["CPU"]

        def get_inputs(self):
            return [types.SimpleNamespace(name="pixels")]

        def run(self, names, inputs):
            pixels = inputs["pixels"]
            assert pixels.shape == (1, 3, 1024, 1024) and pixels.dtype == np.float32
            assert pixels.min() >= -0.5 and pixels.max() == 0.5
            small = Image.fromarray(np.float32(predictions.pop(0)[..., 0]))
            return [np.asarray(small.resize((1024, 1024), Image.Resampling.NEAREST))[None, None]]

    predictions = []
    stand_in = types.SimpleNamespace(InferenceSession=Session, get_available_providers=lambda: ["CPU"])
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    return lambda *wanted: predictions.extend(wanted) or predictions


def test_a_prediction_with_contrast_is_stretched(predict, weights):
    image, inside = disc_on(1.0, 0.2)
    rest = predict(np.where(inside[0], 0.8, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = isnet_masks(image, weights)
    assert found.shape == (1, 32, 32, 1) and found.dtype == np.float32 and not rest
    assert found.min() == 0 and found.max() == 1
    assert np.mean((found > 0.5) == inside) > 0.99


def test_a_flat_prediction_is_not_stretched_into_an_object(predict, weights):
    """Between 0.001 and 0.002 there is an object too: noise. The background knows better."""
    image, inside = disc_on([0.2, 0.5, 0.9], 0.9)
    other = np.zeros((32, 32, 1), bool)
    other[2:8, 2:8] = True
    predict(np.where(other, 0.002, 0.001), np.where(other, 0.998, 0.999))
    with pytest.warns(UserWarning) as caught:
        found = isnet_masks(np.concatenate([image, image]), weights)
    assert ["shows nothing: the mask by its plain" in str(caught[0].message), len(caught)] == [True, 2]
    assert "picture 1 covers everything: the mask by its plain" in str(caught[1].message)
    np.testing.assert_allclose(found, np.concatenate([inside, inside]), atol=1e-6)


def test_without_a_plain_background_the_mask_stays_with_a_warning(predict, weights):
    noise = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    predict(np.full((32, 32, 1), 0.01))
    with pytest.warns(UserWarning, match="picture 0 shows nothing: there is none better"):
        np.testing.assert_array_equal(isnet_masks(noise, weights), 0)


def test_a_mask_at_the_border_gives_way_to_a_plain_background(predict, weights):
    image, inside = disc_on(0.0, 0.9)
    with_floor = inside[0].copy()
    with_floor[28:] = True
    predict(np.where(with_floor, 0.9, 0.0))
    with pytest.warns(UserWarning, match="touches the border: the mask by its plain background is taken"):
        np.testing.assert_allclose(isnet_masks(image, weights), inside, atol=1e-6)


@pytest.mark.parametrize(("quality", "grey", "least"), [(30, 0.3, 0.92), (75, 0.3, 0.99), (75, 0.7, 0.96)])
def test_what_jpeg_spreads_within_its_blocks_is_no_object(quality, grey, least):
    """A lever on a half disc, whose blocks are a small part of what is around it."""
    y, x = np.mgrid[:128, :128]
    disc, lever = np.hypot(x - 64, y - 84) < 30, np.abs(x - 64) < 4
    inside = ((disc | (lever & (y > 20))) & (y < 84)) | ((np.abs(x - 64) < 30) & (y >= 84) & (y < 100))
    lit = (grey + 0.12 * ((x // 5 + y // 7) % 3 - 1))[..., None] * [1, 0.95, 0.9]
    picture, file = np.where(inside[..., None], lit, 1.0).clip(0, 1), io.BytesIO()
    Image.fromarray(np.uint8(np.rint(picture * 255))).save(file, "JPEG", quality=quality)
    found = by_backdrop(np.asarray(Image.open(file), np.float32)[None] / 255).masks[0, ..., 0] > 0.5
    assert (found & inside).sum() > least * (found | inside).sum()


def test_light_parts_beside_edges_are_no_halos_of_jpeg():
    """A dish of light facets, half of which has a rim: its file has no losses, so all of it is the object."""
    y, x = np.mgrid[:128, :128]
    from_middle = np.hypot(x - 64, y - 64)
    rim = (from_middle < 44) & (from_middle >= 41) & (y > 64)
    facets = 1 - 0.03 * (1 + (np.arctan2(y - 64, x - 64) // (np.pi / 3)) % 3)
    picture = np.where(rim, 0.4, np.where(from_middle < 44, facets, 1.0))[..., None] * np.ones(3)
    picture = np.float32(np.rint(picture * 255) / 255)
    found = by_backdrop(picture[None]).masks[0, ..., 0] > 0.5
    np.testing.assert_array_equal(found, from_middle < 44)


@pytest.mark.skipif("ISNET_WEIGHTS" not in os.environ, reason="ISNET_WEIGHTS names no file of IS-Net")
@pytest.mark.parametrize("background", [1.0, 0.5])
def test_the_real_isnet_finds_what_noise_hides_from_the_backdrop(background):
    """A mug, lit from one side: the file of IS-Net is the user's own, and any of its forms has to do."""
    pytest.importorskip("onnxruntime")
    y, x = np.mgrid[:128, :128][..., None] / 128
    handle = np.abs(np.hypot(x - 0.63, y - 0.5) - 0.105) < 0.025
    inside = (np.abs(x - 0.45) < 0.18) & (np.abs(y - 0.5) < 0.22) | handle & (x > 0.6)
    lit = 0.35 + 0.5 * np.clip(1 - np.abs(x - 0.4) / 0.3, 0, 1)
    noise = np.random.default_rng(0).normal(0, 20 / 255, (128, 128, 3))
    picture = np.where(inside, lit * [0.9, 0.5, 0.3], background) + noise
    pictures = picture.clip(0, 1).astype(np.float32)[None]

    def iou(mask):
        return ((mask > 0.5) & inside).sum() / ((mask > 0.5) | inside).sum()

    found = iou(isnet_masks(pictures, os.environ["ISNET_WEIGHTS"])[0])
    assert found > 0.97 and found > iou(np.nan_to_num(by_backdrop(pictures).masks[0]))


def test_weights_that_predict_nan_are_refused(predict, weights, user_error):
    predict(np.full((32, 32, 1), np.nan))
    with user_error("isnet.onnx predict NaN"):
        isnet_masks(disc_on(0.0, 0.9)[0], weights)


def test_missing_isnet_weights_or_packages_are_user_errors(monkeypatch, weights, tmp_path):
    image, _ = disc_on(1.0, 0.2)
    with pytest.raises(UserError, match="do not exist"):
        isnet_masks(image, tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"im3d\[masks\]"):
        isnet_masks(image, weights)

    def fail(path, providers):
        raise RuntimeError("INVALID_PROTOBUF\nand more")

    stand_in = types.SimpleNamespace(InferenceSession=fail, get_available_providers=list)
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    with pytest.raises(UserError, match="INVALID_PROTOBUF$"):
        isnet_masks(image, weights)


def test_what_isnet_finds_is_put_over_white_without_the_background(predict, weights):
    image, coverage, on_white = shaded_disc([0.25, 0.3, 0.6])
    predict(coverage[0])
    found = by_isnet(image, weights)
    assert np.abs(found.masks - coverage).mean() < 0.01
    assert np.abs(found.images - on_white).mean() < 0.01
    assert np.abs(found.images - image)[0, :5].min() > 0.3  # which was blue


def test_views_are_told_by_name_what_was_wrong_with_masks_by_isnet(predict, weights):
    image, inside = disc_on(0.0, 0.9)
    predict(np.full((32, 32, 1), 0.01), np.where(inside[0], 0.9, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = by_isnet(np.concatenate([image, image]), weights)
    (doubt,), fine = found.doubts
    assert doubt.startswith("has a mask by IS-Net that shows nothing: the mask by its plain") and fine == ()
