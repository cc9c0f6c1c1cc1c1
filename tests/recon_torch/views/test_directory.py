"""Views from disk: every way to a mask, composition over white, and bad directories."""

import json
from pathlib import Path

import numpy as np
import pytest

from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit
from recon_torch.views.directory import load_split, load_views, write_views
from recon_torch.views.images import read_image, write_image
from recon_torch.views.masks import Segmented
from recon_torch.views.transforms import write_transforms

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


@pytest.mark.parametrize("source", ["alpha", "mask_path"])
def test_mask_and_composition_over_white(tmp_path, source):
    if source == "mask_path":
        image = half_red(alpha=True)[..., :3]  # the right half is blue here, and the mask takes it away
        write_image(tmp_path / "mask.png", EXPECTED_MASK)
        write(tmp_path, [image] * 2, mask_path="mask.png")
    else:
        write(tmp_path, [half_red(alpha=True)] * 2)
    views = load_views(tmp_path)
    np.testing.assert_array_equal(views.masks, [EXPECTED_MASK] * 2)
    np.testing.assert_array_equal(views.images, [half_red(alpha=False)] * 2)
    np.testing.assert_allclose(views.cameras.w2c, orbit(2, 0.3, SIZE).w2c, atol=1e-6)


def test_an_alpha_of_0_and_1_is_read_as_it_is_meant(tmp_path):
    image = half_red(alpha=True)
    image[..., 3] /= 255
    write(tmp_path, [image] * 2)
    views = load_views(tmp_path)
    np.testing.assert_array_equal(views.masks, [EXPECTED_MASK] * 2)
    assert views.notes[0] == "its alpha has values up to 1: all but 0 is the object: all 2 views"


def test_a_mask_that_its_alpha_contradicts_is_taken_with_a_note(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 2, mask_path="mask.png")
    write_image(tmp_path / "mask.png", EXPECTED_MASK)
    assert load_views(tmp_path).notes == ["the mask touches the border: all 2 views"]
    write_image(tmp_path / "mask.png", EXPECTED_MASK[::-1, ::-1])
    views = load_views(tmp_path)
    np.testing.assert_array_equal(views.masks[0], EXPECTED_MASK[::-1, ::-1])
    assert "which its alpha channel contradicts: all 2 views" in views.notes[0]


def test_only_views_without_a_mask_are_segmented(tmp_path):
    write(tmp_path, [half_red(alpha=True), half_red(alpha=False), half_red(alpha=True)])
    seen = []

    def segment(images):
        seen.append(images)
        return Segmented(images, *np.ones((2, *images.shape[:3], 1), np.float32), [()])

    views = load_views(tmp_path, segment)
    assert len(seen) == 1 and len(seen[0]) == 1
    np.testing.assert_array_equal(views.masks.mean((1, 2, 3)), [0.5, 1.0, 0.5])


def test_half_transparent_pixels_blend_with_white(tmp_path):
    image = np.broadcast_to(np.float32([1, 0, 0, 0.6]), (SIZE, SIZE, 4))
    write(tmp_path, [image] * 2)
    np.testing.assert_allclose(load_views(tmp_path).images[0, 0, 0], [1, 0.4, 0.4], atol=1e-6)


def test_resizing_keeps_the_picture_and_the_geometry(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 2)
    small = load_views(tmp_path, height=8)
    assert small.images.shape == (2, 8, 8, 3) and small.masks.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(small.masks[0, :, [0, 1, 6, 7], 0].T, [[1, 1, 0, 0]] * 8, atol=1e-6)
    # The hidden blue stays hidden: between red and white there is only pink.
    np.testing.assert_allclose(small.images[..., 1], small.images[..., 2], atol=1e-6)
    np.testing.assert_allclose(small.images[..., 1:2], 1 - small.masks, atol=1e-6)
    np.testing.assert_allclose(small.cameras.intrinsics_px, orbit(2, 0.3, 8).intrinsics_px, rtol=1e-6)
    with pytest.raises(UserError, match="height of 0"):
        load_views(tmp_path, height=0)


def dot_at(width: int, height: int, x: float, y: float) -> np.ndarray:
    """A black spot with its middle at the pixel coordinates (x, y), on white."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    spot = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 18)
    return np.repeat(1 - spot[..., None], 3, -1).astype(np.float32)


def test_images_are_resized_to_the_most_common_size(tmp_path):
    """Each image shows a point of the world where its camera sees it, also after it was resampled."""
    point = np.array([0.1, 0.15, 0.1])
    frames, sizes = [], [(64, 48), (64, 48), (96, 144), (64, 48)]
    for index, (width, height) in enumerate(sizes):
        focal = (80.0, 90.0) if index != 2 else (200.0, 230.0)
        w2c = orbit(4, 0.3, 64).w2c[index].astype(np.float64)
        x, y, depth = w2c[:3, :3] @ point + w2c[:3, 3]
        middle = (focal[0] * x / depth + width / 2 - 2, focal[1] * y / depth + height / 2 + 3)
        write_image(tmp_path / f"{index}.png", dot_at(width, height, *middle))
        c2w = np.linalg.inv(w2c) @ np.diag([1, -1, -1, 1])
        frame = {"file_path": f"{index}.png", "transform_matrix": c2w.tolist(), "w": width, "h": height}
        frames.append(frame | {"fl_x": focal[0], "fl_y": focal[1], "cx": width / 2 - 2, "cy": height / 2 + 3})
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": frames}))
    views = load_views(tmp_path)
    assert views.images.shape == (4, 48, 64, 3) and (views.cameras.width, views.cameras.height) == (64, 48)
    for w2c, intrinsics, image in zip(
        views.cameras.w2c, views.cameras.intrinsics_px, views.images, strict=True
    ):
        x, y, depth = intrinsics @ (w2c[:3, :3] @ point + w2c[:3, 3])
        weights = 1 - image[..., 0]
        columns, rows = np.meshgrid(np.arange(64) + 0.5, np.arange(48) + 0.5)
        middle = (columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()
        np.testing.assert_allclose(middle, (x / depth, y / depth), atol=0.15)


@pytest.mark.parametrize("model", ["OPENCV", "OPENCV_FISHEYE"])
@pytest.mark.parametrize("source", ["alpha", "mask_path", "none"])
def test_lens_distortion_is_undone_in_images_and_masks(tmp_path, model, source):
    """A ball as the lens shows it becomes the ball that the pinhole cameras of the views see."""
    size, f, around = 96, 130.0, orbit(2, 0.3, 96)
    center, radius = np.array([0.3, 0.25, -0.2]), 0.15  # away from the axis, where the lens matters
    coefficients = {"k1": -0.3, "k2": 0.1, "p1": 0.01, "p2": -0.02} if model == "OPENCV" else {"k1": 0.1}
    ticks = np.arange(size) + 0.5
    seen = np.stack(np.meshgrid(ticks, ticks), -1)
    for index, w2c in enumerate(around.w2c.astype(np.float64)):
        directions = inverse(model, coefficients, (seen - size / 2) / f)
        rays = np.concatenate([directions, np.ones((size, size, 1))], -1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        local = w2c[:3, :3] @ center + w2c[:3, 3]
        mask = (np.linalg.norm(np.cross(rays, local), axis=-1) < radius)[..., None].astype(np.float32)
        image = np.where(mask > 0, np.float32([0.8, 0.2, 0.1]), 1 if source == "none" else np.float32(0.4))
        write_image(tmp_path / f"{index}.png", np.concatenate([image, mask][: 1 + (source == "alpha")], -1))
        write_image(tmp_path / f"mask{index}.png", mask)
    names = ["0.png", "1.png"]
    write_transforms(tmp_path / "transforms.json", around, names)
    content = json.loads((tmp_path / "transforms.json").read_text())
    content |= {"camera_model": model, "fl_x": f, "fl_y": f} | coefficients
    for index, frame in enumerate(content["frames"]):
        frame |= {"mask_path": f"mask{index}.png"} if source == "mask_path" else {}
    (tmp_path / "transforms.json").write_text(json.dumps(content))

    views = load_views(tmp_path)
    assert any("undone: all 2 views" in note for note in views.notes)
    for w2c, intrinsics, mask, image in zip(
        views.cameras.w2c, views.cameras.intrinsics_px, views.masks, views.images, strict=True
    ):
        rays = np.concatenate(
            [(seen - intrinsics[:2, 2]) / intrinsics[[0, 1], [0, 1]], np.ones_like(seen)], -1
        )
        rays = rays[..., :3] / np.linalg.norm(rays[..., :3], axis=-1, keepdims=True)
        local = w2c[:3, :3] @ center + w2c[:3, 3]
        expected = np.linalg.norm(np.cross(rays, local), axis=-1) < radius
        assert expected.sum() > 60
        if source != "none":  # a threshold takes in all that an edge has of the object
            assert mask.sum() == pytest.approx(expected.sum(), rel=0.02)
        middle, wanted = (
            (seen * each[..., None]).sum((0, 1)) / each.sum() for each in (mask[..., 0], expected)
        )
        np.testing.assert_allclose(middle, wanted, atol=0.4 if source == "none" else 0.15)
        np.testing.assert_allclose(image[mask[..., 0] == 0], 1, atol=1e-6)


def inverse(model, coefficients, seen):
    """The directions that a lens shows at these points, by bisection along the radius and a fixed point."""
    k1, k2, p1, p2 = (coefficients.get(key, 0.0) for key in ("k1", "k2", "p1", "p2"))
    if model == "OPENCV_FISHEYE":
        wanted = np.linalg.norm(seen, axis=-1, keepdims=True)
        angle = wanted
        for _ in range(50):
            angle = wanted / (1 + k1 * angle**2)
        return seen * np.tan(angle) / np.maximum(wanted, 1e-9)
    points = seen
    for _ in range(50):
        x, y = points[..., :1], points[..., 1:]
        squared = x**2 + y**2
        shift = np.concatenate(
            [
                2 * p1 * x * y + p2 * (squared + 2 * x**2),
                p1 * (squared + 2 * y**2) + 2 * p2 * x * y,
            ],
            -1,
        )
        points = (seen - shift) / (1 + k1 * squared + k2 * squared**2)
    return points


def test_split_views_have_the_notes_of_their_masks(tmp_path):
    write(tmp_path, [half_red(alpha=False)] * 3, mask_path="mask.png")
    write_image(tmp_path / "mask.png", EXPECTED_MASK.astype(np.uint8))  # 0 and 1
    content = json.loads((tmp_path / "transforms.json").read_text()) | {"test_filenames": ["1.png"]}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    train, test = load_split(tmp_path)
    assert (train.names, test.names) == (["0.png", "2.png"], ["1.png"])
    np.testing.assert_array_equal(test.masks, [EXPECTED_MASK])
    reading = "its mask has values up to 1: all but 0 is the object"
    assert train.notes == [f"{reading}: all 2 views", "the mask touches the border: all 2 views"]
    assert test.notes[0] == f"{reading}: 1.png"
    np.testing.assert_array_equal(load_views(tmp_path).images, train.images)


def test_missing_images_are_named_and_left_out(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 4)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"frame 2: image '2\.png' does not exist"):
        load_views(tmp_path)
    views = load_views(tmp_path, allow_missing=True)
    assert views.names == ["0.png", "1.png", "3.png"] and "missing: 2.png" in views.notes[0]
    np.testing.assert_allclose(views.cameras.w2c, orbit(4, 0.3, SIZE).w2c[[0, 1, 3]], atol=1e-6)


def test_an_opaque_alpha_channel_is_not_a_mask(tmp_path):
    opaque = half_red(alpha=True)
    opaque[..., 3] = 1
    write(tmp_path, [opaque] * 2)
    seen = []

    def segment(images):
        seen.append(images.copy())
        return Segmented(images, *np.ones((2, *images.shape[:3], 1), np.float32), [(), ()])

    load_views(tmp_path, segment)
    np.testing.assert_array_equal(seen[0], [opaque[..., :3]] * 2)


def painted(masks: np.ndarray, background) -> np.ndarray:
    """Pictures [K,H,W,3] of a green object."""
    return (masks * [0.2, 0.6, 0.3] + (1 - masks) * background).astype(np.float32)


CENTER, RADIUS = np.array([0.1, -0.1, 0.05]), 0.25
CLUTTERED = np.random.default_rng(0).random((8, SIZE, SIZE, 3))


def test_views_on_a_plain_background_are_cut_out(tmp_path, ball_masks):
    masks = ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS)
    noise = np.random.default_rng(0).normal(0, 6 / 255, (8, SIZE, SIZE, 3))
    write(tmp_path, np.clip(painted(masks, 0.5) + noise, 0, 1))
    views = load_views(tmp_path)
    assert ((views.masks > 0.5) != (masks > 0.5)).mean() < 0.01
    assert (views.images[masks[..., 0] == 0] == 1).mean() > 0.9
    (note,) = views.notes
    assert note.startswith("the views have noise of about ") and views.background == 1


def test_a_view_whose_foreground_cannot_be_told_is_left_out(tmp_path, ball_masks):
    images = painted(ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS), 0.5)
    images[5] = CLUTTERED[5]
    write(tmp_path, images)
    views = load_views(tmp_path)
    assert len(views) == 7 and "5.png" not in views.names
    assert views.notes == ["left out, as their foreground cannot be told from the background: 5.png"]
    np.testing.assert_allclose(views.cameras.w2c, orbit(8, 0.3, SIZE).w2c[[0, 1, 2, 3, 4, 6, 7]], atol=1e-6)


def test_views_of_which_many_cannot_be_told_have_no_masks_and_stay_as_they_are(tmp_path, ball_masks):
    images = painted(ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS), CLUTTERED)
    images[0, :, :] = painted(ball_masks(orbit(1, 0.3, SIZE), CENTER, RADIUS), 0.5)[0]
    write(tmp_path, images)
    views = load_views(tmp_path)
    assert views.masks is None and len(views) == 8
    np.testing.assert_allclose(views.images, images, atol=0.5 / 255 + 1e-6)
    assert views.background == pytest.approx(0.5, abs=0.02)  # the median of what is at the border
    note = views.notes[-1]
    assert "foreground of 7 of 8 views cannot be told" in note and "no masks are used; give mask_path" in note
    assert views.take(np.array([1, 3])).masks is None


def test_masks_that_contradict_each_other_are_not_used(tmp_path, ball_masks):
    """Each view shows the object elsewhere."""
    places = np.array([[0, 0, 0.35], [0, 0, -0.35]] * 4)
    masks = np.concatenate([ball_masks(orbit(8, 0.3, SIZE)[k], place, 0.1) for k, place in enumerate(places)])
    write(tmp_path, painted(masks, 0.5))
    views = load_views(tmp_path)
    assert views.masks is None and views.background == pytest.approx(0.5, abs=1 / 255)
    assert (
        "0% of the masks is where the others allow the object (see --check): no masks are used"
        in views.notes[-1]
    )


def test_what_other_views_do_not_allow_is_left_out(tmp_path, ball_masks):
    masks = ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS)
    images = painted(masks, 0.9)
    images[2, 2:6, 25:31] = 0.1  # something else, in one view
    write(tmp_path, images)
    views = load_views(tmp_path)
    assert ((views.masks > 0.5) != (masks > 0.5)).mean() < 0.01
    assert (views.images[2, :7, 24:] == 1).all()
    assert views.notes == ["pieces of masks where the other masks allow no object were left out: 2.png"]


def test_masks_that_came_with_the_pictures_stay_and_are_named_where_others_contradict_them(
    tmp_path, ball_masks
):
    masks = ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS)
    masks[2] = np.roll(masks[2], 8, 1)
    write(tmp_path, np.concatenate([painted(masks, 0.5), masks], -1))
    views = load_views(tmp_path)
    np.testing.assert_array_equal(views.masks, masks)
    assert views.unsure is None
    (note,) = views.notes
    assert note.endswith("are cameras or masks wrong (--check)? 2.png")


def test_pictures_with_masks_are_fitted_without_those_that_nobody_can_cut_out(tmp_path, ball_masks):
    masks = ball_masks(orbit(8, 0.3, SIZE), CENTER, RADIUS)
    write(tmp_path, np.concatenate([painted(masks, CLUTTERED), masks], -1))
    for index in (1, 3, 5, 7):  # a tool that drops alpha has saved these
        write_image(tmp_path / f"{index}.png", read_image(tmp_path / f"{index}.png")[..., :3])
    views = load_views(tmp_path)
    assert views.names == ["0.png", "2.png", "4.png", "6.png"]
    np.testing.assert_array_equal(views.masks, masks[::2])
    (note,) = [note for note in views.notes if "left out" in note]
    assert note.endswith("1.png, 3.png, 5.png, 7.png")


def test_masks_that_look_wrong_are_noted(tmp_path):
    inside = np.zeros((SIZE, SIZE, 4), np.float32)
    inside[8:24, 8:24] = 1
    write(tmp_path, [half_red(alpha=True), inside, half_red(alpha=True)])
    assert load_views(tmp_path).notes == ["the mask touches the border: 0.png, 2.png"]


@pytest.mark.parametrize("count", [4, 64])
def test_directories_of_4_to_64_views(tmp_path, count):
    write(tmp_path, [half_red(alpha=True)[:8, 8:24]] * count)
    content = json.loads((tmp_path / "transforms.json").read_text())
    del content["w"], content["h"]
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    views = load_views(tmp_path)
    assert len(views) == count and views.images.shape == (count, 8, 16, 3)


def test_chosen_views(tmp_path):
    write(tmp_path, [half_red(alpha=True)] * 3)
    views = load_views(tmp_path)
    some = views.take(np.array([2, 0]))
    assert len(some) == len(some.cameras) == 2
    np.testing.assert_array_equal(some.cameras.w2c[0], views.cameras.w2c[2])


def test_bad_directories_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="transforms.json"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True), np.zeros((SIZE, SIZE, 4), np.float32)])
    with pytest.raises(UserError, match=r"1\.png: no foreground"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True), half_red(alpha=True)[:16]])
    with pytest.raises(UserError, match=r"frame 1: image '1\.png' is 32x16 px, w and h say 32x32"):
        load_views(tmp_path)
    write(tmp_path, [half_red(alpha=True)] * 2, mask_path="none.png")
    with pytest.raises(UserError, match=r"mask 'none\.png' does not exist"):
        load_views(tmp_path)
    write_image(tmp_path / "mask.png", EXPECTED_MASK[:16])
    write(tmp_path, [half_red(alpha=True)] * 2, mask_path="mask.png")
    with pytest.raises(UserError, match=r"mask\.png is 32x16 px, its image is 32x32"):
        load_views(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png"):
        load_views(tmp_path)


@pytest.mark.parametrize("folder", ["", "images"])
def test_written_views_are_read_again(tmp_path, folder):
    cameras = orbit(3, 0.3, SIZE)
    alpha = np.random.default_rng(0).uniform(0.6, 0.9, (3, SIZE, SIZE, 1)).astype(np.float32)
    rgba = np.concatenate([np.full((3, SIZE, SIZE, 3), 0.25, np.float32), alpha], -1)
    write_views(tmp_path, cameras, rgba, folder)
    views = load_views(tmp_path)
    assert views.names == [str(Path(folder, f"{index:03d}.png")) for index in range(3)]
    np.testing.assert_allclose(views.cameras.w2c, cameras.w2c, atol=1e-6)
    np.testing.assert_allclose(views.masks, alpha, atol=1 / 255)
    np.testing.assert_allclose(views.images, 0.25 * alpha + 1 - alpha + 0 * rgba[..., :3], atol=2 / 255)
