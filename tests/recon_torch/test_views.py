"""Views from disk: every way to a mask, composition over white, and bad directories."""

import json

import numpy as np
import pytest

from recon_torch.cameras import orbit, write_transforms
from recon_torch.errors import UserError
from recon_torch.export import write_image
from recon_torch.views import load_views

SIZE = 32


def half_red(alpha: bool) -> np.ndarray:
    """Red on the left half; the right half is transparent blue, or white without alpha."""
    image = np.zeros((SIZE, SIZE, 4 if alpha else 3), np.float32)
    image[:, :16] = [1, 0, 0, 1][: image.shape[-1]]
    image[:, 16:] = [0, 0, 1, 0] if alpha else [1, 1, 1]
    return image


def write(directory, images, **frame_entries):
    names = [f"{index}.png" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        write_image(directory / name, image)
    path = directory / "transforms.json"
    write_transforms(path, orbit(len(images), 0.3, SIZE), names)
    if frame_entries:
        content = json.loads(path.read_text())
        for frame in content["frames"]:
            frame.update(frame_entries)
        path.write_text(json.dumps(content))


EXPECTED_MASK = np.broadcast_to((np.arange(SIZE) < 16).astype(np.float32)[None, :, None], (SIZE, SIZE, 1))


@pytest.mark.parametrize("source", ["alpha", "white", "mask_path"])
def test_mask_and_composition_over_white(tmp_path, source):
    if source == "mask_path":
        image = half_red(alpha=True)[..., :3]  # the right half is blue here, and the mask takes it away
        write_image(tmp_path / "mask.png", EXPECTED_MASK)
        write(tmp_path, [image] * 2, mask_path="mask.png")
    else:
        write(tmp_path, [half_red(alpha=source == "alpha")] * 2)
    views = load_views(tmp_path)
    np.testing.assert_array_equal(views.masks, [EXPECTED_MASK] * 2)
    np.testing.assert_array_equal(views.images, [half_red(alpha=False)] * 2)
    np.testing.assert_allclose(views.cameras.w2c, orbit(2, 0.3, SIZE).w2c, atol=1e-6)


def test_only_views_without_a_mask_are_segmented(tmp_path):
    write(tmp_path, [half_red(alpha=True), half_red(alpha=False), half_red(alpha=True)])
    seen = []

    def segment(images):
        seen.append(images)
        return np.ones((*images.shape[:3], 1), np.float32)

    views = load_views(tmp_path, segment)
    assert len(seen) == 1 and len(seen[0]) == 1
    np.testing.assert_array_equal(views.masks.mean((1, 2, 3)), [0.5, 1.0, 0.5])


def test_half_transparent_pixels_blend_with_white(tmp_path):
    image = np.broadcast_to(np.float32([1, 0, 0, 0.6]), (SIZE, SIZE, 4))
    write(tmp_path, [image] * 2)
    np.testing.assert_allclose(load_views(tmp_path).images[0, 0, 0], [1, 0.4, 0.4], atol=1e-6)


def test_resizing_keeps_the_picture_and_the_geometry(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 2)
    small = load_views(tmp_path).resized(8)
    assert small.images.shape == (2, 8, 8, 3) and small.masks.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(small.masks[0, :, [0, 1, 6, 7], 0].T, [[1, 1, 0, 0]] * 8, atol=1e-6)
    np.testing.assert_allclose(small.cameras.intrinsics_px, orbit(2, 0.3, 8).intrinsics_px, rtol=1e-6)
    with pytest.raises(UserError, match="height of 0"):
        load_views(tmp_path).resized(0)


def test_taking_some(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 3)
    views = load_views(tmp_path)
    some = views.take(np.array([2, 0]))
    assert len(some) == len(some.cameras) == 2
    np.testing.assert_array_equal(some.cameras.w2c[0], views.cameras.w2c[2])


def test_bad_directories(tmp_path):
    with pytest.raises(UserError, match="transforms.json"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True), np.zeros((SIZE, SIZE, 4), np.float32)])
    with pytest.raises(UserError, match=r"1\.png: no foreground"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True), half_red(alpha=True)[:16]])
    with pytest.raises(UserError, match=r"1\.png is 32x16 px, transforms.json says 32x32"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True)] * 2, mask_path="none.png")
    with pytest.raises(UserError, match=r"none\.png"):
        load_views(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png"):
        load_views(tmp_path)
