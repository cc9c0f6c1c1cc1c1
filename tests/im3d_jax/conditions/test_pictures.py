"""Pictures as view 0."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from im3d_jax.conditions import pictures
from recon_torch.errors import UserError

SETTINGS = dict(size=32, fill=0.7, background_tolerance=0.06)


def disc(height, width, row, column, radius, background):
    """A red disc over a background, float [0, 1], with soft edges; and its coverage."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    coverage = np.clip(radius + 0.5 - np.hypot(rows - row, columns - column), 0, 1)[..., None]
    return coverage * np.array([0.8, 0.1, 0.2]) + (1 - coverage) * np.array(background), coverage


def save(path, picture):
    Image.fromarray((np.asarray(picture) * 255).round().astype(np.uint8)).save(path)
    return path


def expected_coverage(size, fill):
    """A centred disc of diameter fill * size, 8 x 8 samples a pixel."""
    rows, columns = (np.mgrid[: 8 * size, : 8 * size] + 0.5) / 8 - size / 2
    inside = np.hypot(rows, columns) < fill * size / 2
    return inside.reshape(size, 8, size, 8).mean((1, 3))


@pytest.mark.parametrize("kind", ["rgba", "white", "blue", "opaque rgba"])
@pytest.mark.parametrize("place", [(60, 70, 55), (20, 90, 40)], ids=["inside", "cut off by the border"])
def test_the_object_is_centred_with_the_given_fill(tmp_path, kind, place):
    row, column, radius = place
    background = (0.1, 0.2, 0.7) if kind == "blue" else (1.0, 1.0, 1.0)
    picture, coverage = disc(150, 170, row, column, radius, background)
    if kind == "rgba":
        straight = np.broadcast_to([0.8, 0.1, 0.2], picture.shape)
        picture = np.concatenate([straight, coverage], -1)
    elif kind == "opaque rgba":
        picture = np.concatenate([picture, np.ones_like(coverage)], -1)
    rgb, alpha, *_ = pictures.load_image(save(tmp_path / "disc.png", picture), **SETTINGS)
    assert rgb.shape == (32, 32, 3) and alpha.shape == (32, 32, 1) and rgb.dtype == alpha.dtype == np.float32
    rows, columns = (np.flatnonzero(alpha[..., 0].max(axis) > 0.5) for axis in (1, 0))
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    assert abs(longer - 0.7 * 32) <= 1
    assert abs((rows[0] + rows[-1]) / 2 - 15.5) <= 0.5 and abs((columns[0] + columns[-1]) / 2 - 15.5) <= 0.5
    if place[0] == 60:
        assert np.abs(alpha[..., 0] - expected_coverage(32, 0.7)).mean() < 0.015
    np.testing.assert_allclose(rgb[16, 16], [0.8, 0.1, 0.2], atol=0.01)
    assert (rgb[0] == 1).all() and not alpha[0].any()
    mixed = alpha * np.array([0.8, 0.1, 0.2]) + 1 - alpha
    if kind == "rgba":
        np.testing.assert_allclose(rgb, mixed, atol=0.01)


def test_pictures_of_one_object_get_one_height(tmp_path):
    """A box that is 20 wide and 30 high from the front; from the side, twice as near, it is 120 by 60."""
    front, side = np.ones((80, 90, 3)), np.ones((200, 320, 3))
    front[20:50, 30:50] = side[50:110, 60:180] = [0.8, 0.1, 0.2]
    paths = [save(tmp_path / "front.png", front), save(tmp_path / "side.png", side)]
    found = pictures.load_images(paths, **SETTINGS | {"size": 64})
    boxes = [
        [np.ptp(np.flatnonzero(each.alpha[..., 0].max(axis) > 0.5)) + 1 for axis in (1, 0)] for each in found
    ]
    np.testing.assert_allclose(boxes, [[22.4, 14.9], [22.4, 44.8]], atol=1)
    alone = pictures.load_image(paths[1], **SETTINGS | {"size": 64})
    np.testing.assert_array_equal(alone.rgb, found[1].rgb)  # the widest is as it is alone


def test_a_large_picture_takes_no_more_than_a_few_copies(tmp_path):
    picture, _ = disc(1200, 1200, 600, 600, 590, (1.0, 1.0, 1.0))
    path = save(tmp_path / "large.png", picture)
    tracemalloc.start()
    pictures.load_image(path, **SETTINGS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 1200 * 1200 * 4 * 4


def test_unusable_pictures_are_one_line(tmp_path):
    transparent = np.zeros((20, 20, 4))
    rng = np.random.default_rng(0)
    cases = {
        "missing": (tmp_path / "none.png", "no image at"),
        "unreadable": (tmp_path / "text.png", "cannot read"),
        "transparent": (save(tmp_path / "transparent.png", transparent), "shows no object"),
        "one colour": (save(tmp_path / "plain.png", np.full((20, 20, 3), 0.3)), "shows no object"),
        "noise": (
            save(tmp_path / "noise.png", rng.random((20, 20, 3))),
            "neither a plain background nor alpha",
        ),
        "thin": (save(tmp_path / "thin.png", rng.random((1, 300, 3))), "has 300 x 1 pixels; give"),
        "long": (
            save(tmp_path / "long.png", rng.random((2000, 9, 4))),
            "has 9 x 2000 pixels; give",
        ),
        "a directory": (tmp_path / "directory", "is a directory; give the path of a file"),
        "a pipe": (tmp_path / "pipe", "is a pipe; give the path of a file"),
        "a device": (Path("/dev/zero"), "is a device; give the path of a file"),
    }
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes into it
    for path, words in cases.values():
        with pytest.raises(UserError, match=words) as error:
            pictures.load_image(path, **SETTINGS)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_isnet_finds_the_object_where_the_background_is_not_plain(monkeypatch):
    plain, coverage = disc(90, 120, 30, 80, 20, (0.9, 0.95, 0.9))
    inside = (coverage > 0.5).astype(np.float32)
    noise = np.random.default_rng(0).random(plain.shape)
    cluttered = np.where(inside > 0, plain, noise).astype(np.float32)
    with pytest.raises(UserError, match="the drawing has neither a plain background nor alpha"):
        pictures.place(cluttered, "the drawing", **SETTINGS)
    asked = []
    monkeypatch.setattr(
        pictures.masks,
        "isnet_masks",
        lambda images, path: asked.append((images.shape, path)) or inside[None],
    )
    masked = pictures.place(cluttered, "the drawing", **SETTINGS, mask_weights="net.onnx")
    assert asked == [((1, 90, 120, 3), "net.onnx")]
    cut_out = pictures.place(np.concatenate([cluttered, inside], -1), "the same as RGBA", **SETTINGS)
    for found, expected in zip(masked[:2], cut_out[:2], strict=True):
        np.testing.assert_array_equal(found, expected)
